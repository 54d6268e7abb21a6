"""An exponential moving average of past costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import site_error
from ...core.estimator import Array, Ops, Site
from ...core.keep import Initial, Keeps, Kept, guarded
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class MovingAverage(Baseline):
    """Running mean of past downstream costs: m ← decay · m + (1 − decay) · mean(f), started at the first cost.

    For           one particle, cheap
    Not for       costs that differ much from datum to datum: add Learned()

    One number per site, whatever the batch: the mean over particles and plate elements, of the cost of one element (the
    N/B of a minibatch is taken out, and put back where the average is subtracted). The baseline of a step is the
    average *before* that step; the first step has none. A step whose cost is not finite leaves the average alone. Each
    step of a NumPyro `scan` has an average of its own, as each site of a Python loop has.

    >>> MovingAverage(decay=0.95)
    MovingAverage(0.95)

    ``decay``: weight of the past, in [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"MovingAverage(decay) needs 0 <= decay < 1, got {self.decay!r}.")

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        each = Initial(site.batch_shape[: site.time])
        return Keeps(state={"mean": each, "started": each})

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        old = kept.state["mean"]
        if site.time:
            if tuple(old.shape) != site.batch_shape[: site.time]:
                raise site_error(
                    site.name,
                    f"MovingAverage() keeps an average for each of {math.prod(old.shape)} steps of a scan, and there "
                    f"are {site.steps} now",
                    "Pad the series to one length, or use Reinforce(LeaveOneOut()) with several particles.",
                )
            old = ops.reshape(old, (*old.shape, *(1,) * (cost.ndim - 1 - site.time)))
        return ops.zeros_like(cost) + ops.like(old, cost) * site.subsampling

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        old, started = kept.state["mean"], kept.state["started"]
        others = tuple(i for i in range(cost.ndim) if not 1 <= i <= site.time)
        now = ops.like(ops.mean(cost, axis=others) / site.subsampling, old)
        mean = ops.where(started > 0, self.decay * old + (1 - self.decay) * now, now)
        return None, guarded(ops, kept.state, {"mean": mean, "started": ops.ones_like(started) + 0 * now})
