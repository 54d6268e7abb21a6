"""The reparameterisation gradient of any distribution with a cdf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import site_error
from ..core.estimator import Array, Draw, Estimator, Ops, Site, Value
from ..core.families import DISCRETE


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitPathwise(Estimator):
    """Implicit reparameterisation: the slope of a draw from the cdf, without a formula for drawing.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          f'(z) ∂_λ z,   ∂_λ z = −∂_λ F_λ(z) / q_λ(z),   F_λ the cdf, z drawn by whatever sampler there is
    Requires      a univariate continuous distribution (elements may be many) whose `cdf` and `log_prob` the library
                  can differentiate; f differentiable in z. One evaluation. Unbiased.
    For           mixtures and truncated distributions
    Not for       sites with a sampler of their own: Pathwise()

    For distributions that have no reparameterised sampler: a `MixtureSameFamily` with univariate components (the
    weights get their gradient too), truncated distributions, your own with a `cdf`. Where there is one, Pathwise()
    does the same without evaluating a cdf. As with Pathwise(), the model must not jump in z. In Pyro the cdf of a
    Gamma has no derivative in its shape, and Gamma is reparameterised anyway.

    >>> ImplicitPathwise()
    ImplicitPathwise()

    Reference: Figurnov, Mohamed & Mnih (2018), "Implicit Reparameterization Gradients", arXiv:1805.08498.
    """

    value: ClassVar[Value] = Value.OWN

    def check(self, site: Site, particles: int) -> None:
        """Asks the distribution: there is no list of those that have a cdf with a derivative."""
        if site.family in DISCRETE or site.law.discrete:
            self._refuse(site, particles, "needs a continuous distribution", "discrete")
        if site.law.event_shape:
            self._refuse(site, particles, "needs a univariate distribution", f"of event shape {site.law.event_shape}")
        try:
            site.law.slope(site.value)
        except Exception as error:  # whatever the library says when it cannot
            self._refuse(
                site, particles, "needs a cdf with a derivative", f"without one ({type(error).__name__}: {error})"
            )

    def _refuse(self, site: Site, particles: int, wants: str, fact: str) -> None:
        raise site_error(
            site.name, f"{type(self).__name__} {wants}, got {site.distribution}, {fact}", self.advice(site, particles)
        )

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        z = ops.stop_gradient(noise["value"])
        cdf, density = site.law.cdf(z), ops.exp(ops.stop_gradient(site.law.log_prob(z)))
        inside = density > 0
        move = (cdf - ops.stop_gradient(cdf)) / ops.where(inside, density, ops.ones_like(density))
        return Draw(z - ops.where(inside, move, ops.zeros_like(move)))
