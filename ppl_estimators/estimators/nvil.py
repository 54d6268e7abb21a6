"""NVIL: the published recipe of running average, learned baseline and variance normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.densities import check_score
from ..core.estimator import Array, Costs, Draw, Local, Measure, Ops, Site
from ..core.keep import Initial, Keeps, Kept, guarded
from .baselines.base import Baseline, WithBaseline
from .baselines.learned import Learned
from .baselines.moving_average import MovingAverage


@dataclass(frozen=True, eq=False, repr=False)
class NVIL(WithBaseline):
    """Biased: in scale only. Running average, learned baseline, and a learning signal of unit variance (NVIL).

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)], divided by max(1, √v)
    With          (f(z) − m − C_ψ(x)) / max(1, √v) · ∇_λ log q_λ(z),   m and v the running mean and variance of the past
    Requires      a distribution that can sample and has a log_prob; nothing of f. One evaluation. The
                  expectation is the gradient times a positive number that depends on past steps.
    For           to repeat the paper: unit-variance learning signals
    Not for       several sites, or plain SGD: it rescales a site's gradient

    The normalisation is what the paper trains with; it shrinks the site's gradient to the scale of one nat, which
    changes its weight against other sites and its meaning under plain SGD. For the unnormalised gradient use
    ``Reinforce(MovingAverage() + Learned())``. Never compare its variance with that of unnormalised estimators.

    ``network``, ``inputs``, ``hidden``: as in `Learned`. ``decay``: weight of the past in m and v, in [0, 1).

    >>> NVIL(decay=0.9)
    NVIL(decay=0.9)

    Reference: Mnih & Gregor (2014), "Neural Variational Inference and Learning in Belief Networks", arXiv:1402.0030.
    """

    network: Any = None
    inputs: Any = None
    hidden: int = field(default=32, kw_only=True)
    decay: float = field(default=0.8, kw_only=True)

    unbiased: ClassVar[bool] = False
    own_measures: ClassVar[frozenset[Measure]] = frozenset({Measure.LOG_Q})

    @property
    def baseline(self) -> Baseline:  # type: ignore[override]
        return MovingAverage(self.decay) + Learned(self.network, self.inputs, hidden=self.hidden)

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        check_score(site)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return super().keeps(site, given) | Keeps(state={"variance": Initial(value=1.0)})

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        rest, auxiliary, state = self.subtract(ops, site, costs.value, kept)
        old = kept.state["variance"]
        now = ops.like(ops.mean((rest / site.subsampling) ** 2), old)
        new = guarded(ops, {"variance": old}, {"variance": self.decay * old + (1 - self.decay) * now})
        norm = ops.like(ops.where(old > 1, old, ops.ones_like(old)), rest) ** 0.5
        return Local(rest / norm * site.log_q, auxiliary, {**state, **new})
