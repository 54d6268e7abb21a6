"""What the generalised reparameterisations share: gamma draws as a function of noise whose law still moves a little.

A Gamma is g / rate, a Beta and a Dirichlet are gammas over their sum. With g = T(ε; α), and π(ε; α) what is left of
the density of ε,

    ∇_α E[f(g)] = E[ f'(g) ∂_α T(ε; α) + f(g) ∂_α log π(ε; α) ],   log π = log q(T(ε; α); α) + log |∂_ε T|
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Noise, Ops, Site, Value
from ..core.families import BETA, CONTINUOUS, DIRICHLET, GAMMA


class CorrectedGamma(Estimator):
    """Base: a subclass gives ``log T``, its inverse and ``log |∂_ε log T|``, each for gammas of unit rate."""

    families: ClassVar[tuple[str, ...] | None] = (GAMMA, BETA, DIRICHLET)
    value: ClassVar[Value] = Value.PARTIAL

    #: how far above the site's own concentration the gammas are drawn
    boost: int

    def standardise(self, ops: Ops, log_g: Array, concentration: Array) -> Array:
        """ε such that ``transform(ε)`` is ``log_g``."""
        raise NotImplementedError

    def transform(self, ops: Ops, epsilon: Array, concentration: Array) -> tuple[Array, Array]:
        """log T(ε; α) and log |∂_ε log T(ε; α)|."""
        raise NotImplementedError

    def noise(self, site: Site) -> Mapping[str, Noise]:
        own = concentrations(site)
        shape = tuple(own[0].shape)
        gammas = {f"g{i}": Noise("log gamma", shape, a + self.boost) for i, a in enumerate(own)}
        return gammas | {f"u{i}_{step}": Noise("uniform", shape) for i in range(len(own)) for step in range(self.boost)}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        logs, extra = [], {}
        for i, a in enumerate(concentrations(site)):
            boosted = a + self.boost
            epsilon = ops.stop_gradient(self.standardise(ops, noise[f"g{i}"], boosted))
            extra[f"epsilon{i}"] = epsilon
            log_g = self.transform(ops, epsilon, boosted)[0]
            for step in range(self.boost):  # g u^(1/α) is a gamma of shape α if g is one of shape α + 1
                log_g = log_g + ops.log(noise[f"u{i}_{step}"]) / (a + step)
            logs.append(log_g)
        return Draw(_value(ops, site, logs), extra)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        cost, log_pi = ops.stop_gradient(costs.value), 0.0
        for i, a in enumerate(concentrations(site)):
            a = a + self.boost
            log_g, log_slope = self.transform(ops, draw.extra[f"epsilon{i}"], a)
            # the density of log g is g^α e^{-g} / Γ(α)
            log_pi = log_pi + a * log_g - ops.exp(log_g) - ops.lgamma(a) + log_slope
        return Local(site.spread(ops, cost) * log_pi)


def concentrations(site: Site) -> list[Array]:
    """Shapes of the gammas behind a site; those of a Dirichlet are one array, its last axis the categories."""
    return [site.named[name] for name in CONTINUOUS[site.family] if name != "rate"]


def _value(ops: Ops, site: Site, logs: list[Array]) -> Array:
    """From logarithms, which do not underflow where the gammas of small shape do."""
    if site.family == DIRICHLET:
        return ops.softmax(logs[0])
    if site.family == BETA:
        return ops.sigmoid(logs[0] - logs[1])
    return ops.exp(logs[0] - ops.log(site.named["rate"]))
