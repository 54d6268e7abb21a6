"""The constant that minimises the variance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

from ...core.errors import site_error
from ...core.estimator import Array, Keeps, Kept, Measure, Ops, Site
from ...core.particles import of_the_others
from ...core.regression import OtherParticles, Source, check_source
from .base import Baseline, Baselined


@dataclass(frozen=True, eq=False, repr=False)
class OptimalConstant(Baseline):
    """The variance-minimising constant c* = E[f s²] / E[s²], with s the score; f enters once.

    For           eight particles or more
    Not for       few particles: LeaveOneOut() has less variance

    s² is the squared norm of ∂ log q / ∂ λ over the parameters λ of the site's own distribution, per plate element.
    The moments are never taken from the draw that the baseline is subtracted from (that is biased):

    - ``OptimalConstant()``: from the other particles, per plate element; needs two particles or more, and earns its
      place from about eight. With few particles `LeaveOneOut` has the lower variance.
    - ``OptimalConstant(PastSteps(0.99))``: from past steps, as moving averages, one pair of numbers per site, of the
      cost of one element (without the N/B of a minibatch).

    >>> from ppl_estimators import PastSteps
    >>> OptimalConstant(PastSteps(0.9))
    OptimalConstant(PastSteps(0.9))

    Reference: Greensmith, Bartlett & Baxter (2004) [greensmith2004variance]; Ranganath, Gerrish & Blei (2014),
    arXiv:1401.0118.
    """

    moments: Source = field(default=OtherParticles())
    decay: InitVar[float | None] = field(default=None, kw_only=True)

    measures: ClassVar[frozenset[Measure]] = frozenset({Measure.SCORE_NORM})

    def __post_init__(self, decay: float | None) -> None:
        check_source(self, "moments", decay)

    @property
    def from_particles(self) -> bool:  # type: ignore[override]
        return self.moments.from_particles

    def check(self, site: Site, particles: int) -> None:
        if self.from_particles and particles < 2:
            raise site_error(
                site.name,
                f"OptimalConstant() takes its moments from the other particles, got num_particles={particles}",
                "Pass num_particles=2 or more, or OptimalConstant(PastSteps(0.99)) to take them from past steps.",
            )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.moments.keeps(("weighted", "weight"))

    def evaluate(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Baselined:
        s2 = site.score_norm + ops.zeros_like(cost)
        now = {"weighted": cost * s2 / site.subsampling, "weight": s2}
        sums, state = self.moments.sums(ops, now, kept.state)
        none = sums["weight"] <= 0  # no score was seen but zero: any constant will do
        level = of_the_others(ops, cost) if self.from_particles else ops.zeros_like(cost)
        ratio = sums["weighted"] / ops.where(none, ops.ones_like(s2), sums["weight"])
        return Baselined(ops.where(none, level, ratio * site.subsampling), None, state)

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return self.evaluate(ops, site, cost, kept).value
