"""The constant that minimises the variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import site_error
from ...core.estimator import Measure
from ...core.keep import Initial, Keeps, Kept, guarded
from ...core.ops import Array, Ops
from ...core.site import Site
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class OptimalConstant(Baseline):
    """The variance-minimising constant c* = E[f s²] / E[s²], with s the score; f enters once.

    For           eight particles or more
    Not for       few particles: LeaveOneOut() has less variance

    s² is the squared norm of ∂ log q / ∂ λ over the parameters λ of the site's own distribution, per plate element.
    The moments are never taken from the draw that the baseline is subtracted from (that is biased):

    - ``OptimalConstant()``: from the other particles, per plate element; needs two particles or more, and earns its
      place from about eight. With few particles `LeaveOneOut` has the lower variance.
    - ``OptimalConstant(decay=0.99)``: from past steps, as moving averages, one pair of numbers per site, of the cost of
      one element (without the N/B of a minibatch).

    >>> OptimalConstant(decay=0.99)
    OptimalConstant(0.99)

    Reference: Greensmith, Bartlett & Baxter (2004) [greensmith2004variance]; Ranganath, Gerrish & Blei (2014),
    arXiv:1401.0118.
    """

    decay: float | None = None

    measures: ClassVar[frozenset[Measure]] = frozenset({Measure.SCORE_NORM})

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"OptimalConstant(decay) needs 0 <= decay < 1 or None, got {self.decay!r}.")

    @property
    def from_particles(self) -> bool:  # type: ignore[override]
        return self.decay is None

    def check(self, site: Site, particles: int) -> None:
        if self.decay is None and particles < 2:
            raise site_error(
                site.name,
                f"OptimalConstant() takes its moments from the other particles, got num_particles={particles}",
                "Pass num_particles=2 or more, or OptimalConstant(decay=0.99) to take them from past steps.",
            )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return Keeps(state={} if self.decay is None else {"weighted": Initial(), "weight": Initial()})

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        if self.decay is not None:
            weight = kept.state["weight"]
            safe = ops.where(weight > 0, weight, ops.ones_like(weight))
            ratio = ops.where(weight > 0, kept.state["weighted"] / safe, ops.zeros_like(weight))
            return ops.zeros_like(cost) + ops.like(ratio, cost) * site.subsampling
        s2 = site.score_norm + ops.zeros_like(cost)
        weighted = _others(ops, cost * s2)  # Σ_{j ≠ k} f_j s_j²
        weight = _others(ops, s2)
        none = weight <= 0  # every other score vanishes: any constant will do
        mean = _others(ops, cost) / max(cost.shape[0] - 1, 1)
        return ops.where(none, mean, weighted / ops.where(none, ops.ones_like(weight), weight))

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        if self.decay is None:
            return None, {}
        s2 = site.score_norm + ops.zeros_like(cost)
        now = {"weighted": ops.mean(cost * s2) / site.subsampling, "weight": ops.mean(s2)}
        old = kept.state
        # Both moments decay alike, so their ratio needs no correction for the start at zero.
        new = {k: self.decay * old[k] + (1 - self.decay) * ops.like(now[k], old[k]) for k in now}
        return None, guarded(ops, old, new)


def _others(ops: Ops, x: Array) -> Array:
    return ops.sum(x, axis=0, keepdims=True) - x
