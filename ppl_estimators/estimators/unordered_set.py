"""Draws without replacement, their order averaged out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.errors import site_error
from ..core.estimator import Estimator, Noise
from ..core.families import CATEGORICAL, ONEHOT, encoded, gumbel, possible
from ..core.keep import Kept
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site

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
    lanewise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"UnorderedSet(k) draws k categories: k must be an integer, 1 or more, got {self.k!r}.")

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        if LARGEST < self.k < site.categories:
            raise site_error(
                site.name,
                f"{self!r} visits the 2^{self.k} subsets of the categories that it draws",
                f"Use UnorderedSet({LARGEST}), SumAndSample({self.k}) or Enumerate().",
            )

    def alternatives(self, site: Site) -> int:
        return site.lanes * (self._size(site) - 1)

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

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        k, members, a = self._size(site), draw.extra["members"], site.logits
        f = [site.spread(ops, costs.value)]
        if k > 1:
            f += [lanes.by_lane(ops, site, costs.alternatives[i :: k - 1]) for i in range(k - 1)]
        p = ops.softmax(a)
        f = [possible(ops, ops.take_last(p, members)[..., i], x + ops.zeros_like(p[..., 0])) for i, x in enumerate(f)]
        weights = coefficients(ops, ops.stop_gradient(a), members, f)
        # Σ_s weights_s (e_s − p)
        chosen = ops.one_hot(members, a.shape[-1], a)
        gradient = ops.sum(weights[..., None] * chosen, axis=-2)
        gradient = gradient - p * ops.sum(weights, axis=-1, keepdims=True)
        return Local(ops.stop_gradient(gradient) * a)

    def _size(self, site: Site) -> int:
        return min(self.k, site.categories)


def coefficients(ops: Ops, a: Array, members: Array, f: list[Array]) -> Array:
    """p_s R(S, s) (f(s) − Σ_{s'} p_{s'} R_s(S, s') f(s')) for each member s, ``[..., k]``.

    p_s R(S, s) is the chance that s was the first, given S; p_{s'} R_s(S, s') is 1 − p_s times the chance that s' was
    the second, given S and s first. Both are normalised in log space: no probability is divided by, 1 − Σ p is never
    formed.
    """
    k, categories = len(f), a.shape[-1]
    if k == 1:
        return f[0][..., None]
    if k == categories:
        p, stacked = ops.take_last(ops.softmax(a), members), ops.stack(f, axis=-1)
        return p * (stacked - ops.sum(p * stacked, axis=-1, keepdims=True))
    log_p = ops.log_softmax(a)
    floor = ops.full_like(log_p, -1e4)  # a category of probability zero stays one, without infinities
    log_p = ops.where(log_p > floor, log_p, floor)
    outside = ops.sum(ops.one_hot(members, categories, a), axis=-2) == 0
    log_rest = ops.logsumexp(ops.where(outside, log_p, 2 * floor), axis=-1)
    log_s = ops.take_last(log_p, members)
    log_s = [log_s[..., i] for i in range(k)]
    # log P(the rest of S comes next | the members in the bits of ``drawn`` came first), by the member that comes next
    completes = {2**k - 1: ops.zeros_like(log_rest)}
    for drawn in range(2**k - 2, 0, -1):
        left = [i for i in range(k) if not drawn >> i & 1]
        next_one = ops.stack([log_s[i] + completes[drawn | 1 << i] for i in left], axis=-1)
        remaining = ops.stack([*(log_s[i] for i in left), log_rest], axis=-1)  # log(1 − p of those drawn)
        completes[drawn] = ops.logsumexp(next_one, axis=-1) - ops.logsumexp(remaining, axis=-1)
    first = ops.softmax(ops.stack([log_s[i] + completes[1 << i] for i in range(k)], axis=-1))
    found = []
    for s in range(k):
        others = [i for i in range(k) if i != s]
        second = ops.softmax(ops.stack([log_s[i] + completes[1 << s | 1 << i] for i in others], axis=-1))
        gain = f[s] - ops.sum(second * ops.stack([f[i] for i in others], axis=-1), axis=-1)
        found.append(first[..., s] * -ops.expm1(log_s[s]) * gain)
    return ops.stack(found, axis=-1)
