"""Draws without replacement, their order averaged out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.errors import site_error
from ..core.estimator import Array, Control, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import CATEGORICAL, ONEHOT, encoded, gumbel, possible

#: sets of k categories have 2^k subsets, and each is visited
LARGEST = 8


@dataclass(frozen=True, eq=False, repr=False)
class UnorderedSet(Estimator):
    """k different categories drawn without replacement, with the baseline that they form together.

    Approximates  ∇_a E_{z ~ softmax(a)}[f(z)]
    With          Σ_{s ∈ S} ∇p_s R(S, s) (f(s) − Σ_{s' ∈ S} p_{s'} R_s(S, s') f(s')),   p = softmax(a),
                  R(S, s) = P(rest of S | s first) / P(S),   R_s(S, s') the same after s was drawn, R_s(S, s) = 1
    Requires      Categorical or OneHotCategorical sites; nothing of f. 1 + D (k − 1) evaluations for D dependent
                  elements. Unbiased; exact for a single element with k ≥ C. k = 1 is Reinforce().
    For           too many categories for Enumerate()
    Not for       several dependent elements: compare with LeaveOneOut()

    ``k``: how many categories, at most 8 unless that is all of them. The set is the k largest Gumbel-perturbed log
    probabilities, so its first is a draw from p, and the run uses that. Prefer it for a categorical with too many
    categories for Enumerate(): unlike k independent draws none is wasted on a repetition. For several dependent
    elements, moved one at a time as in Enumerate(), compare with LeaveOneOut().

    >>> UnorderedSet(3)
    UnorderedSet(3)

    Reference: Kool, van Hoof & Welling (2020), "Estimating Gradients for Discrete Random Variables by Sampling
    without Replacement", arXiv:2002.06043.
    """

    k: int

    families: ClassVar[tuple[str, ...] | None] = (CATEGORICAL, ONEHOT)

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"UnorderedSet(k) draws k categories: k must be an integer, 1 or more, got {self.k!r}.")

    @property
    def control(self) -> Control:  # type: ignore[override]
        return Control.NOTHING if self.k == 1 else Control.OWN

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        if LARGEST < self.k < site.categories:
            raise site_error(
                site.name,
                f"{self!r} visits the 2^{self.k} subsets of the categories that it draws",
                f"Use UnorderedSet({LARGEST}), SumAndSample({self.k}) or Enumerate().",
            )

    def alternatives(self, site: Site) -> Moves:
        return Moves(site.lanes * (self._size(site) - 1), self.weights)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", tuple(site.logits.shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        order = ops.argsort(-gumbel(ops, site.logits, noise["u"]), axis=-1)
        members = order[..., : self._size(site)]  # [*batch, *event, k], in the order of the draw
        return Draw(encoded(ops, site.family, members[..., 0], site.logits), {"members": members})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Lane ``index // (k - 1)`` takes member ``1 + index % (k - 1)``."""
        others, members = self._size(site) - 1, draw.extra["members"]
        here = lanes.numbers(ops, site, members[..., 0]) == index // others
        value = ops.where(here, members[..., 1 + index % others], members[..., 0])
        return encoded(ops, site.family, value, site.logits)

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        members = draw.extra["members"]
        first = firsts(ops, site.logits, members)
        return lanes.weights(ops, site, first[..., 0], first[..., 1:])

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        k, members, a = self._size(site), draw.extra["members"], site.logits
        p = ops.softmax(a)
        f = site.spread(ops, costs.value)[..., None] + ops.zeros_like(p[..., :1])
        if k > 1:
            f = ops.concat([f, lanes.by_lane(ops, site, costs.alternatives)], axis=-1)  # [K, *batch, *event, k]
        weights = coefficients(ops, ops.stop_gradient(a), members, possible(ops, ops.take_last(p, members), f))
        # Σ_s weights_s (e_s − p)
        chosen = ops.one_hot(members, a.shape[-1], a)
        gradient = ops.sum(weights[..., None] * chosen, axis=-2)
        gradient = gradient - p * ops.sum(weights, axis=-1, keepdims=True)
        return Local(ops.stop_gradient(gradient) * a)

    def _size(self, site: Site) -> int:
        return min(self.k, site.categories)


def coefficients(ops: Ops, a: Array, members: Array, f: Array) -> Array:
    """p_s R(S, s) (f(s) − Σ_{s'} p_{s'} R_s(S, s') f(s')) for each member s, ``[..., k]``."""
    k, categories = f.shape[-1], a.shape[-1]
    if k == 1:
        return f
    if k == categories:
        p = ops.take_last(ops.softmax(a), members)
        return p * (f - ops.sum(p * f, axis=-1, keepdims=True))
    first, second, log_s = chances(ops, a, members)
    gain = f - ops.sum(second * f[..., None, :], axis=-1)
    return first * -ops.expm1(log_s) * gain


def firsts(ops: Ops, a: Array, members: Array) -> Array:
    """p_s R(S, s), the chance that s was the first, for each member s, ``[..., k]``."""
    if members.shape[-1] == a.shape[-1]:
        return ops.take_last(ops.softmax(a), members)
    return chances(ops, a, members)[0]


def chances(ops: Ops, a: Array, members: Array) -> tuple[Array, Array, Array]:
    """p_s R(S, s) is the chance that s was the first, given S; p_{s'} R_s(S, s') is 1 − p_s times the chance that s'
    was the second, given S and s first. Both chances, ``[..., k]`` and ``[..., s, s']``, and log p_s.

    They are normalised in log space: no probability is divided by, 1 − Σ p is never formed.
    """
    k, categories = members.shape[-1], a.shape[-1]
    log_p = ops.log_softmax(a)
    floor = ops.full_like(log_p, -1e4)  # a category of probability zero stays one, without infinities
    log_p = ops.where(log_p > floor, log_p, floor)
    outside = ops.sum(ops.one_hot(members, categories, a), axis=-2) == 0
    log_rest = ops.logsumexp(ops.where(outside, log_p, 2 * floor), axis=-1)[..., None, None]
    log_s, never = ops.take_last(log_p, members), -1e5
    # a subset of S is a number whose bits are the members it has
    subset, power = ops.indices(2**k, members), 2 ** ops.indices(k, members)
    inside = subset[:, None] // power % 2 == 1  # [2^k, k]
    joined = ops.where(inside, subset[:, None], subset[:, None] + power)
    left = ops.where(inside, ops.full_like(log_s[..., None, :], never), log_s[..., None, :])
    ends = [left, ops.broadcast_to(log_rest, (*left.shape[:-1], 1))]
    remaining = ops.logsumexp(ops.concat(ends, axis=-1), axis=-1)  # log(1 − p of the subset), [..., 2^k]
    # log P(the other members come next | those of the subset came first), over which of them is the next; right for
    # subsets of k members at the start, and for those of one less after each round
    completes = ops.zeros_like(remaining)
    for _ in range(k - 1):
        completes = ops.logsumexp(left + completes[..., joined], axis=-1) - remaining
        completes = ops.where(subset == 2**k - 1, ops.zeros_like(completes), completes)
    first = ops.softmax(log_s + completes[..., power])
    pairs = log_s[..., None, :] + completes[..., joined[power]]  # [..., s, s'], wrong where s' is s
    second = ops.softmax(ops.where(power[:, None] == power, ops.full_like(pairs, never), pairs))
    return first, second, log_s
