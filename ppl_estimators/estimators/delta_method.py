"""The delta method: a quadratic expansion of the cost at a Gaussian's mean as control variate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

from ..core.errors import site_error
from ..core.estimator import Array, Costs, Draw, Keeps, Kept, Local, Measure, Noise, Ops, Relaxations, Site
from ..core.families import NORMAL
from ..core.regression import FEWEST, MOMENTS, OtherParticles, Source, check_source, fitted
from .baselines.base import Baseline, WithBaseline


@dataclass(frozen=True, eq=False, repr=False)
class DeltaMethod(WithBaseline):
    """Score function of a Gaussian site, with an expansion of the cost at its mean as control variate.

    Approximates  ∇_λ E_{z ~ N(μ, σ²)}[f(z)],   λ = (μ, σ)
    With          (f(z) − a c(z) − b) ∇_λ log q_λ(z) + a ∇_λ E_q[c],
                  c(z) = f(m) + g·(z − m) + ½ Σ_i h_i (z_i − m_i)²,
                  E_q[c] = f(m) + g·(μ − m) + ½ Σ_i h_i (σ_i² + (μ_i − m_i)²)
    Requires      Normal sites; a model that is differentiable in z. Three evaluations, two of them differentiated.
                  Unbiased for every a that does not see the draw.
    For           Normal sites with hard decisions downstream
    Not for       models with a useful slope: Pathwise()

    m is μ as a constant, in both places. g is the slope there, and h_i the secant curvature to m + sσ for random signs
    s, which is the second derivative of a quadratic without mixed terms, and needs no second differentiation. The
    coefficient a is estimated (a = 1 can raise the variance): from the other particles (five in all: a slope through
    fewer draws has tails without a variance), or with ``PastSteps(0.99)`` from those. Where the model is differentiable
    Pathwise() is simpler and usually better; this is for sites whose pathwise gradient is not to be had, such as one
    with hard decisions downstream.

    >>> from ppl_estimators import PastSteps
    >>> DeltaMethod(PastSteps(0.9))
    DeltaMethod(PastSteps(0.9))

    Reference: Paisley, Blei & Jordan (2012), "Variational Bayesian Inference with Stochastic Search",
    arXiv:1206.6430.
    """

    moments: Source = field(default=OtherParticles())
    decay: InitVar[float | None] = field(default=None, kw_only=True)
    baseline: Baseline | None = field(default=None, kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = (NORMAL,)
    own_measures: ClassVar[frozenset[Measure]] = frozenset({Measure.LOG_Q})

    def __post_init__(self, decay: float | None) -> None:
        super().__post_init__()
        check_source(self, "moments", decay)
        if self.baseline is not None and self.baseline.from_particles:
            raise ValueError(
                f"DeltaMethod(baseline=...) takes a baseline of the past, got {self.baseline!r}: what the expansion "
                "leaves of the other particles' costs has seen this one's. Use MovingAverage() or Learned()."
            )

    def check(self, site: Site, particles: int) -> None:
        if self.moments.from_particles and particles < 1 + FEWEST:
            raise site_error(
                site.name,
                f"DeltaMethod estimates its coefficient from the other particles, got num_particles={particles}, and a "
                "slope through so few draws has no variance",
                f"Pass num_particles={1 + FEWEST} or more, or DeltaMethod(PastSteps(0.99)) to use past steps.",
            )
        super().check(site, particles)

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return self.moments.from_particles or super().compares

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.moments.keeps(MOMENTS) | super().keeps(site, given)

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(2, "redrawn")

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"value": Noise("value"), "sign": Noise("uniform", (*site.batch_shape, *site.event_shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        sign = ops.where(noise["sign"] < 0.5, -1.0, 1.0)
        return Draw(noise["value"], {"step": sign * site.named["scale"]})

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        loc = ops.stop_gradient(site.named["loc"])
        return loc + index * draw.extra["step"]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        loc, scale, step = site.named["loc"], site.named["scale"], draw.extra["step"]
        m = ops.stop_gradient(loc)
        slope, beyond = (ops.stop_gradient(costs.relaxed_slope[i]) for i in range(2))
        curvature = (beyond - slope) / step
        at_mean = ops.stop_gradient(costs.relaxed[0])
        z = ops.stop_gradient(draw.value)
        c = at_mean + site.sum_elements(ops, slope * (z - m) + 0.5 * curvature * (z - m) ** 2)
        mean = at_mean + site.sum_elements(ops, slope * (loc - m) + 0.5 * curvature * (scale**2 + (loc - m) ** 2))
        f = ops.stop_gradient(costs.value)
        a, past = fitted(ops, f, c, kept.state, self.moments)
        rest, auxiliary, state = self.subtract(ops, site, f - a * c, kept)
        return Local(rest * site.to_plates(ops, site.log_q) + a * mean, auxiliary, {**state, **past})
