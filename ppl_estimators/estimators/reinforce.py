"""The score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.densities import check_score
from ..core.estimator import Control, Costs, Draw, Kept, Local, Measure, Ops, Site
from .baselines.base import Baseline, WithBaseline


@dataclass(frozen=True, eq=False, repr=False)
class Reinforce(WithBaseline):
    """Score function with any baseline: REINFORCE, NVIL, leave-one-out (VarGrad).

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          (f(z) − b) ∇_λ log q_λ(z),   b independent of z
    Requires      a distribution that can sample and has a log_prob; nothing of f. One evaluation. Unbiased.
    Not advised   for comparison; any baseline has less variance

    f is the downstream cost of the site, summed to the site's plates: costs that z cannot move are left out
    (Rao-Blackwellisation). Without a baseline the variance is rarely tolerable: plain ``Reinforce()`` with one
    particle is not recommended, and warns. With several particles use ``LeaveOneOut()``; with one,
    ``MovingAverage()``, ``Learned()`` or their sum.

    >>> Reinforce(baseline=None)
    Reinforce()

    Reference: Williams (1992), "Simple statistical gradient-following algorithms" [williams1992simple];
    Ranganath, Gerrish & Blei (2014), "Black Box Variational Inference", arXiv:1401.0118.
    """

    baseline: Baseline | None = None

    own_measures: ClassVar[frozenset[Measure]] = frozenset({Measure.LOG_Q})
    instead: ClassVar[str] = ""

    @property
    def control(self) -> Control:  # type: ignore[override]
        return Control.NOTHING if self.baseline is None else self.baseline.control

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        check_score(site)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        signal, auxiliary, state = self.subtract(ops, site, costs.value, kept)
        return Local(signal * site.log_q, auxiliary, state)
