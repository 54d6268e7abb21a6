"""The score-function estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import site_error
from ..core.estimator import Estimator
from ..core.keep import Initial, Kept, Network
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .baselines.base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class Reinforce(Estimator):
    """Score function with any baseline: REINFORCE, NVIL, leave-one-out (VarGrad).

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          (f(z) − b) ∇_λ log q_λ(z),   b independent of z
    Requires      a distribution that can sample and has a log_prob; nothing of f. One evaluation. Unbiased.

    f is the downstream cost of the site, summed to the site's plates: costs that z cannot move are left out
    (Rao-Blackwellisation). Without a baseline the variance is rarely tolerable: plain ``Reinforce()`` with one
    particle is not recommended, and warns. With several particles use ``LeaveOneOut()``; with one,
    ``MovingAverage()``, ``Learned()`` or their sum.

    >>> Reinforce(baseline=None)
    Reinforce()

    Reference: Williams (1992), "Simple statistical gradient-following algorithms"; Ranganath, Gerrish & Blei (2014),
    "Black Box Variational Inference", arXiv:1401.0118.
    """

    baseline: Baseline | None = None

    score: ClassVar[bool] = True
    instead: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.baseline is not None and not isinstance(self.baseline, Baseline):
            raise TypeError(
                f"Reinforce(baseline=...) takes a baseline such as LeaveOneOut() or MovingAverage(), "
                f"got {self.baseline!r}."
            )

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        check_score(site)
        if self.baseline is not None:
            self.baseline.check(site, particles)

    @property
    def keeps(self) -> bool:
        return self.baseline is not None and self.baseline.keeps

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.baseline.given(args, kwargs) if self.baseline else {}

    def parameters(self, site: Site) -> dict[str, Initial]:
        return self.baseline.parameters(site) if self.baseline else {}

    def networks(self, site: Site, given: Mapping[str, Array]) -> dict[str, Network]:
        return self.baseline.networks(site, given) if self.baseline else {}

    def state(self, site: Site) -> dict[str, Initial]:
        return self.baseline.state(site) if self.baseline else {}

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        if self.baseline is None:
            return Local(ops.stop_gradient(costs.value) * site.log_q)
        b = self.baseline.evaluate(ops, site, costs.value, kept)
        surrogate = ops.stop_gradient(costs.value - b.value) * site.log_q
        return Local(surrogate, b.auxiliary, b.state)


def check_score(site: Site) -> None:
    """A Delta has no density: its log_prob says nothing of how the parameter moves the draw."""
    if site.distribution == "Delta":
        raise site_error(
            site.name,
            "a Delta has no score function, its draw is its parameter",
            "Use Pathwise() here; in an autoguide choose the estimator at the auxiliary site behind it.",
        )
