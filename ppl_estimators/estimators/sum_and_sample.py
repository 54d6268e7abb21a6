"""Sum over the likeliest categories, sample among the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import CATEGORICAL, ONEHOT, category, encoded, gumbel, possible


@dataclass(frozen=True, eq=False, repr=False)
class SumAndSample(Estimator):
    """Sum over the k likeliest categories, and one draw from the rest.

    Approximates  ∇_a E_{z ~ softmax(a)}[f(z)]
    With          Σ_{c ∈ top} p_c (f(c) − B) ∇ log p_c + w (f(r) − B) ∇ log p_r,   w = 1 − Σ_{c ∈ top} p_c,
                  r ~ p given not in top,   B = Σ_{c ∈ top} p_c f(c) / (1 − w)
    Requires      Categorical or OneHotCategorical sites; nothing of f. 1 + D k evaluations for D dependent elements.
                  Unbiased; exact for a single element with k ≥ C − 1.
    For           a few likely categories, many unlikely ones
    Not for       categories of like probability: UnorderedSet()

    ``k``: how many categories are summed. The value of the run is r itself with probability w, else one of the top,
    so it is a draw from p, and k further evaluations complete the k + 1 terms. Prefer it where a categorical has
    few likely values and many unlikely ones; while the probabilities are alike UnorderedSet(k + 1) is better for as
    many evaluations. Dependent elements are moved one at a time, as in Enumerate(). The baseline B is ours: it costs
    nothing and sees nothing of r.

    >>> SumAndSample(2)
    SumAndSample(2)

    Reference: Liu, Regier, Tripuraneni, Jordan & McAuliffe (2019), "Rao-Blackwellized Stochastic Gradients for
    Discrete Distributions", arXiv:1810.04777.
    """

    k: int

    families: ClassVar[tuple[str, ...] | None] = (CATEGORICAL, ONEHOT)

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"SumAndSample(k) sums k categories: k must be an integer, 1 or more, got {self.k!r}.")

    def alternatives(self, site: Site) -> Moves:
        return Moves(site.lanes * self._summed(site), self.weights)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", tuple(site.logits.shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        """The largest of the perturbed log probabilities is z, the largest outside the top is r; where z is in the
        top says nothing of r."""
        a = site.logits
        perturbed = gumbel(ops, a, noise["u"])
        top = ops.argsort(-a, axis=-1)[..., : self._summed(site)]
        in_top = ops.sum(ops.one_hot(top, a.shape[-1], a), axis=-2) > 0
        rest = ops.argmax(ops.where(in_top, ops.full_like(perturbed, -float("inf")), perturbed), axis=-1)
        terms = ops.concat([top, rest[..., None]], axis=-1)  # [*batch, *event, k + 1]
        return Draw(encoded(ops, site.family, ops.argmax(perturbed, axis=-1), a), {"terms": terms})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Lane ``index // k`` takes its term ``index % k``, or r where that term is the drawn value."""
        k, terms = self._summed(site), draw.extra["terms"]
        z = category(ops, site.family, draw.value)
        here = lanes.numbers(ops, site, z) == index // k
        term = terms[..., index % k]
        other = ops.where(term == z, terms[..., k], term)
        return encoded(ops, site.family, ops.where(here, other, z), site.logits)

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        k, terms = self._summed(site), draw.extra["terms"]
        z = category(ops, site.family, draw.value)
        p_top = ops.take_last(ops.softmax(site.logits), terms[..., :k])
        w = 1 - ops.sum(p_top, axis=-1)
        is_drawn = terms[..., :k] == z[..., None]
        moved = ops.where(is_drawn, w[..., None], p_top)
        in_top = ops.any(is_drawn, axis=-1)
        drawn = ops.where(in_top, ops.sum(ops.where(is_drawn, p_top, ops.zeros_like(p_top)), axis=-1), w)
        return lanes.weights(ops, site, drawn, moved)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        k, terms, a = self._summed(site), draw.extra["terms"], site.logits
        drawn = site.spread(ops, costs.value)[..., None]
        others = lanes.by_lane(ops, site, costs.alternatives)  # [K, *batch, *event, k]
        is_drawn = terms[..., :k] == category(ops, site.family, draw.value)[..., None]
        f_top = ops.where(is_drawn, drawn, others)
        f_rest = ops.sum(ops.where(is_drawn, others, ops.zeros_like(others)), axis=-1, keepdims=True)
        f_rest = ops.where(ops.any(is_drawn, axis=-1, keepdims=True), f_rest, drawn)
        p, chosen = ops.softmax(a), ops.one_hot(terms, a.shape[-1], a)  # [K, *batch, *event, k + 1, C]
        p_top = ops.take_last(p, terms[..., :k])
        f_top = possible(ops, p_top, f_top)
        in_top = ops.sum(chosen[..., :k, :], axis=-2) > 0
        w = ops.sum(ops.where(in_top, ops.zeros_like(p), p), axis=-1, keepdims=True)
        f_rest = possible(ops, w, f_rest)
        baseline = ops.sum(p_top * f_top, axis=-1, keepdims=True) / ops.sum(p_top, axis=-1, keepdims=True)
        weighted = ops.concat([p_top * (f_top - baseline), w * (f_rest - baseline)], axis=-1)
        # Σ_j weighted_j (e_j − p)
        gradient = ops.sum(weighted[..., None] * chosen, axis=-2) - p * ops.sum(weighted, axis=-1, keepdims=True)
        return Local(ops.stop_gradient(gradient) * a)

    def _summed(self, site: Site) -> int:
        return min(self.k, site.categories - 1)
