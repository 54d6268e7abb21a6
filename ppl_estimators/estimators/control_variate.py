"""A control variate with known expectation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

from ..core.densities import check_score
from ..core.errors import site_error
from ..core.estimator import Array, Costs, Draw, Keeps, Kept, Local, Measure, Ops, Site
from ..core.regression import FEWEST, MOMENTS, OtherParticles, Source, check_source, fitted
from .baselines.base import Baseline, WithBaseline


@dataclass(frozen=True, eq=False, repr=False)
class ControlVariate(WithBaseline):
    """Score function with a function h whose expectation under q is known in closed form.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          (f(z) − a h(z) − b) ∇_λ log q_λ(z) + a ∇_λ E_q[h],   a and b independent of z
    Requires      any distribution; h and its mean. One evaluation. Unbiased.
    For           when you know a function like the cost, and its mean

    ``h(value)`` returns one number per draw, ``[*batch]``; ``mean(distribution)`` returns E_q[h] ``[*batch]``,
    differentiable in the parameters of the library's distribution object that it is given. Its gradient is added
    back: subtracting a *centred* h alone would be biased, because E[(h − E h) ∇ log q] = ∇ E[h].

    ``coefficient``: a number; or where the regression coefficient of f on h comes from, never from the draw it is
    applied to: ``OtherParticles()`` (five in all, three at a discrete site: a slope through fewer draws has tails
    without a variance), or ``PastSteps(0.99)``. ``baseline`` applies to what is left over.

    >>> from ppl_estimators import PastSteps
    >>> ControlVariate(abs, abs, PastSteps(0.9)).coefficient
    PastSteps(0.9)

    Reference: Paisley, Blei & Jordan (2012), "Variational Bayesian Inference with Stochastic Search",
    arXiv:1206.6430.
    """

    h: Callable[[Any], Any]
    mean: Callable[[Any], Any]
    coefficient: float | Source = field(default=OtherParticles())
    decay: InitVar[float | None] = field(default=None, kw_only=True)
    baseline: Baseline | None = field(default=None, kw_only=True)

    own_measures: ClassVar[frozenset[Measure]] = frozenset({Measure.LOG_Q, Measure.FUNCTIONS})

    def __post_init__(self, decay: float | None) -> None:
        super().__post_init__()
        fixed = self.coefficient
        if isinstance(fixed, Source) or decay is not None:
            check_source(self, "coefficient", decay)
        elif not math.isfinite(fixed):
            raise ValueError(
                "ControlVariate(coefficient=...) takes a finite number, OtherParticles() or PastSteps(0.99), got "
                f"{fixed!r}."
            )

    def check(self, site: Site, particles: int) -> None:
        check_score(site)
        if site.time:
            raise site_error(
                site.name,
                "ControlVariate needs the expectation of h under the site's distribution given its parents, and the "
                "steps of a scan are each other's parents",
                "Use Reinforce(LeaveOneOut()) with several particles.",
            )
        fewest = 1 + (2 if site.law.discrete else FEWEST)
        if self._fitted and particles < fewest:
            raise site_error(
                site.name,
                f"ControlVariate estimates its coefficient from the other particles, got num_particles={particles}"
                + ("" if particles < 3 else ", and a slope through so few continuous draws has no variance"),
                f"Pass num_particles={fewest} or more, a fixed coefficient, or coefficient=PastSteps(0.99) to estimate "
                "it from past steps.",
            )
        super().check(site, particles)
        if self.baseline is not None and self._each_its_own and len(self.baseline.parts) > 1:
            raise site_error(
                site.name,
                f"ControlVariate takes its coefficient from the other particles, and {self.baseline!r} mixes them with "
                "the past",
                "Use LeaveOneOut() alone, or coefficient=PastSteps(0.99).",
            )

    @property
    def _each_its_own(self) -> bool:
        """Are coefficient and baseline both taken from the other particles?"""
        return self._fitted and self.baseline is not None and self.baseline.from_particles

    @property
    def _fitted(self) -> bool:
        """Is the coefficient taken from the other particles?"""
        return isinstance(self.coefficient, Source) and self.coefficient.from_particles

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return self._fitted or super().compares

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        past = self.coefficient.keeps(MOMENTS) if isinstance(self.coefficient, Source) else Keeps()
        return past | super().keeps(site, given)

    def measured(self, value: Array, distribution: Any) -> dict[str, Array]:
        """What the adapter evaluates on its own objects: h at the draw, and E[h], both ``[*batch]``."""
        return {"h": self.h(value), "mean": self.mean(distribution)}

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        f = ops.stop_gradient(costs.value)
        h = ops.stop_gradient(_plates(ops, site, "h", draw.extra["h"]))
        mean = _plates(ops, site, "mean", draw.extra["mean"])
        log_q = site.to_plates(ops, site.log_q)
        state: Mapping[str, Array] = {}
        if isinstance(self.coefficient, Source):
            a, state = fitted(ops, f, h, kept.state, self.coefficient)
        else:
            a = self.coefficient + ops.zeros_like(f)
        rest, auxiliary = f - a * h, None
        if self.baseline is not None and self._each_its_own:
            # a_k holds every other draw: the baseline of draw k takes a_k too, never a_j, which has seen draw k
            h = h + ops.zeros_like(f)
            rest = f - self.baseline.predict(ops, site, f, kept) - a * (h - self.baseline.predict(ops, site, h, kept))
        elif self.baseline is not None:
            b = self.baseline.evaluate(ops, site, rest, kept)
            rest, auxiliary, state = rest - b.value, b.auxiliary, {**state, **b.state}
        return Local(ops.stop_gradient(rest) * log_q + ops.stop_gradient(a) * mean, auxiliary, state)


def _plates(ops: Ops, site: Site, what: str, x: Array) -> Array:
    """What the user's function returned, one number per draw ``[K, *batch]``, summed to the plates: batch dimensions
    that no plate declares are dependent elements of one."""
    got, wanted = tuple(x.shape[site.lead :]), site.batch_shape
    if len(got) != len(wanted) or any(g not in (1, w) for g, w in zip(got, wanted, strict=True)):
        raise site_error(
            site.name,
            f"{what} of ControlVariate returned the shape {got}, and {wanted} is the batch shape",
            f"Return one number for each draw, {wanted}: sum over event dimensions.",
        )
    return site.to_plates(ops, ops.broadcast_to(x, (*x.shape[: site.lead], *wanted)))
