"""The exact local expectation over a finite support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Ops, Site
from ..core.families import BERNOULLI, DISCRETE, category, possible, probabilities


@dataclass(frozen=True, eq=False, repr=False)
class Enumerate(Estimator):
    """Local expectation: sum over every value of a site, given its parents.

    Approximates  ∇_a E_{z ~ q_a}[f(z)]
    With          Σ_v f(v) ∇_a q_a(v),   f(v) the cost when z = v and its downstream is drawn afresh
    Requires      Bernoulli, Categorical or OneHotCategorical sites; nothing of f. 1 + D(C − 1) evaluations for D
                  dependent elements of C categories. Unbiased; exact for a single site.
    For           small supports; exact for a single site
    Not for       many dependent elements: DisARM() or LeaveOneOut()

    Elements that a plate makes independent are enumerated side by side, at no extra cost. Dependent elements (event
    dimensions, batch dimensions without a plate, plates that a later cost sums over) are enumerated one at a time
    with the others at their drawn values: the local expectation gradient, D(C − 1) more evaluations. The extra
    evaluations run in chunks of ``EstimatorELBO(max_parallel=...)``. Best while D·C is small; use DisARM() or
    LeaveOneOut() beyond that.

    >>> Enumerate()
    Enumerate()

    Reference: Titsias & Lázaro-Gredilla (2015), "Local Expectation Gradients for Black Box Variational Inference",
    arXiv:1503.01494.
    """

    families: ClassVar[tuple[str, ...] | None] = DISCRETE
    sums: ClassVar[bool] = True

    def alternatives(self, site: Site) -> Moves:
        return Moves(site.lanes * (site.categories - 1), self.weights)

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return lanes.shifted(ops, site, draw.value, index)

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        p, c = probabilities(ops, site.family, site.logits), site.categories
        if site.family == BERNOULLI:
            drawn = ops.where(draw.value > 0, p, 1 - p)
            return lanes.weights(ops, site, drawn, 1 - drawn[..., None])
        z = category(ops, site.family, draw.value)
        each = ops.take_last(p, (z[..., None] + ops.indices(c, z)) % c)
        return lanes.weights(ops, site, each[..., 0], each[..., 1:])

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        c = site.categories
        p = probabilities(ops, site.family, site.logits)
        drawn = site.spread(ops, costs.value)
        moved = lanes.by_lane(ops, site, costs.alternatives)  # [K, *batch, *event, C - 1]
        if site.family == BERNOULLI:  # p (1 - p) (f(1) - f(0))
            sign = 1 - 2 * draw.value
            weight = p * ops.sigmoid(-site.logits)
            gradient = sign * possible(ops, weight, weight * (moved[..., 0] - drawn))
        else:  # p ⊙ (F - p·F), F[v] = f(v): the shift from the drawn category to v is (v - z) mod C
            index = category(ops, site.family, draw.value)
            by_shift = ops.concat([drawn[..., None] + ops.zeros_like(moved[..., :1]), moved], axis=-1)
            by_shift = ops.broadcast_to(by_shift, p.shape)
            shift = (ops.indices(c, index) - index[..., None]) % c
            f = possible(ops, p, ops.take_last(by_shift, shift))
            gradient = p * (f - ops.sum(p * f, axis=-1, keepdims=True))
        return Local(ops.stop_gradient(gradient) * site.logits)
