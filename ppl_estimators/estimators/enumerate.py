"""The exact local expectation over a finite support."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Estimator
from ..core.families import BERNOULLI, DISCRETE, ONEHOT, probabilities
from ..core.keep import Kept
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site


@dataclass(frozen=True, eq=False, repr=False)
class Enumerate(Estimator):
    """Local expectation: sum over every value of a site, given its parents.

    Approximates  ∇_a E_{z ~ q_a}[f(z)]
    With          Σ_v f(v) ∇_a q_a(v),   f(v) the cost when z = v and its downstream is drawn afresh
    Requires      Bernoulli, Categorical or OneHotCategorical sites; nothing of f. 1 + D(C − 1) evaluations for D
                  dependent elements of C categories. Unbiased; exact for a single site.

    Elements that a plate makes independent are enumerated side by side, at no extra cost. Dependent elements (event
    dimensions, batch dimensions without a plate, plates that a later cost sums over) are enumerated one at a time
    with the others at their drawn values: the local expectation gradient, D(C − 1) more evaluations. The extra
    evaluations run in chunks of ``EstimatorELBO(max_parallel=...)``. Best while D·C is small; use DisARM() or
    LeaveOneOut() beyond that.

    >>> Enumerate()
    Enumerate()

    Reference: Titsias & Lázaro-Gredilla (2015), "Local Expectation Gradients for Black Box Variational Inference".
    """

    families: ClassVar[tuple[str, ...] | None] = DISCRETE
    instead: ClassVar[str] = "Use Pathwise() if the distribution is reparameterisable, or Reinforce(LeaveOneOut())"

    def alternatives(self, site: Site) -> int:
        return site.lanes * (site.categories - 1)

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Lane ``index // (C - 1)`` moved on by ``1 + index % (C - 1)`` categories; every plate element at once."""
        c = site.categories
        lane, shift = index // (c - 1), 1 + index % (c - 1)
        here = self._lane_indices(ops, site, draw.value) == lane
        if site.family == BERNOULLI:
            return ops.where(here, 1 - draw.value, draw.value)
        if site.family == ONEHOT:
            moved = (ops.argmax(draw.value, axis=-1) + shift) % c
            return ops.where(here[..., None], ops.one_hot(moved, c, draw.value), draw.value)
        return ops.where(here, (draw.value + shift) % c, draw.value)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        c = site.categories
        p = probabilities(ops, site.family, site.logits)
        drawn = site.spread(ops, costs.value)
        moved = [self._by_lane(ops, site, costs.alternatives[s :: c - 1]) for s in range(c - 1)]
        if site.family == BERNOULLI:  # p (1 - p) (f(1) - f(0))
            sign = 1 - 2 * draw.value
            gradient = p * (1 - p) * sign * (moved[0] - drawn)
        else:  # p ⊙ (F - p·F), F[v] = f(v): the shift from the drawn category to v is (v - z) mod C
            index = ops.argmax(draw.value, axis=-1) if site.family == ONEHOT else draw.value
            by_shift = ops.stack([drawn + ops.zeros_like(moved[0]), *moved], axis=-1)
            by_shift = ops.broadcast_to(by_shift, p.shape)
            shift = (ops.indices(c, index) - index[..., None]) % c
            f = ops.take_last(by_shift, shift)
            gradient = p * (f - ops.sum(p * f, axis=-1, keepdims=True))
        return Local(ops.stop_gradient(gradient) * site.logits)

    @staticmethod
    def _lane_indices(ops: Ops, site: Site, value: Array) -> Array:
        """``[*batch, *event]`` (1 along plates): which lane an element is."""
        shape = [1] * (len(site.batch_shape) + len(site.event_shape) - (site.family == ONEHOT))
        for axis, size in zip(site.lane_axes, site.lane_shape, strict=True):
            shape[axis] = size
        return ops.reshape(ops.indices(math.prod(shape), value), tuple(shape))

    @staticmethod
    def _by_lane(ops: Ops, site: Site, costs: Array) -> Array:
        """Costs ``[D, K, *plates]`` of moving each lane, as ``[K, *batch, *event]``."""
        n = len(site.batch_shape)
        events = len(site.event_shape) - (site.family == ONEHOT)
        x = ops.reshape(costs, (*site.lane_shape, *costs.shape[1:]))
        lanes = len(site.lane_shape)
        undeclared = lanes - events
        # axes of x: [lanes..., K, batch...]; a batch axis that is a lane has size 1 and gives way to it
        order, lane = [lanes], 0
        dropped = set(site.lane_axes[:undeclared])
        for axis in range(n):
            if axis in dropped:
                order.append(lane)
                lane += 1
            else:
                order.append(lanes + 1 + axis)
        order += list(range(undeclared, lanes))
        if dropped:
            keep = [i for i in range(x.ndim) if i <= lanes or i - lanes - 1 not in dropped]
            x = ops.reshape(x, tuple(x.shape[i] for i in keep))
            rank = {axis: i for i, axis in enumerate(keep)}
            order = [rank[axis] for axis in order]
        return ops.permute_dims(x, tuple(order))
