"""What REBAR and RELAX share: a control variate of the relaxed value, and its slope at two coupled relaxations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from ..core import relaxation
from ..core.estimator import Array, Costs, Draw, Estimator, Local, Noise, Ops, Site
from ..core.families import ONEHOT, probabilities, score, threshold
from ..core.keep import Initial, Keeps, Kept, Network, predict
from .baselines.base import WithLevel


class RelaxedControl(Estimator):
    """Base: z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b."""

    #: arguments whose logarithms are trained: "<site>$log_<name>"
    positive: ClassVar[tuple[str, ...]] = ("temperature", "scale")

    def __post_init__(self) -> None:
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{type(self).__name__}({name}=...) needs a positive number, got {getattr(self, name)!r}."
                )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return Keeps({f"log_{name}": Initial(value=math.log(getattr(self, name))) for name in self.positive})

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = tuple(site.logits.shape)
        return {"u": Noise("uniform", shape), "v": Noise("uniform", shape)}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return Draw(threshold(ops, site.family, site.logits, noise["u"]), noise)

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return soft_values(ops, site, draw, kept)[index](ops.stop_gradient(site.logits))

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        return ops.exp(kept.parameters["log_temperature"])


class Variate(NamedTuple):
    """c(z̃), and the slopes of c(z) and c(z̃) in the logits."""

    tilde: Array
    slope: Array
    slope_tilde: Array

    def __add__(self, other: Variate) -> Variate:  # type: ignore[override]
        return Variate(*(x + y for x, y in zip(self, other, strict=True)))


class RelaxedNetwork(RelaxedControl, WithLevel):
    """Base: c has a network of the relaxed value in it, and a baseline takes the level of what c leaves over."""

    hidden: int
    network: Any

    def __post_init__(self) -> None:
        RelaxedControl.__post_init__(self)
        WithLevel.__post_init__(self)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        network = Network(2 * site.opened.feature_count(site.logits), self.hidden, self.network)
        return (
            RelaxedControl.keeps(self, site, given)
            | Keeps(networks={"control": network})
            | WithLevel.keeps(self, site, given)
        )

    def variate(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Variate:
        raise NotImplementedError

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        c = self.variate(ops, site, draw, costs, kept)
        level = self.level(ops, site, costs.value - c.tilde, kept)
        local = assemble(ops, site, draw, costs.value - level.value, c)
        auxiliary = ops.sum(local.auxiliary)
        if level.auxiliary is not None:
            auxiliary = auxiliary + ops.sum(level.auxiliary)
        return Local(local.surrogate, auxiliary, level.state)


def soft_values(ops: Ops, site: Site, draw: Draw, kept: Kept) -> tuple[Any, Any]:
    """a ↦ σ_λ(z) and a ↦ σ_λ(z̃), as functions of the logits at fixed noise and fixed b."""
    temperature = ops.exp(kept.parameters["log_temperature"])
    u, v = draw.extra["u"], draw.extra["v"]

    def soft_z(a: Array) -> Array:
        return relaxation.soften(ops, site.family, relaxation.unconditional(ops, site.family, a, u), temperature)

    def soft_z_tilde(a: Array) -> Array:
        z_tilde = relaxation.conditional(ops, site.family, a, v, draw.value)
        return relaxation.soften(ops, site.family, z_tilde, temperature)

    return soft_z, soft_z_tilde


def of_model(ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Variate:
    """c = η f(σ_λ(·)), η being "log_scale"."""
    a, eta = ops.stop_gradient(site.logits), ops.exp(kept.parameters["log_scale"])
    slopes = [ops.vjp(soft, a, costs.relaxed_slope[i]) for i, soft in enumerate(soft_values(ops, site, draw, kept))]
    return Variate(eta * costs.relaxed[1], eta * slopes[0], eta * slopes[1])


def of_network(ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Variate:
    """c = r_ρ(σ_λ(·)), in units of the site's scale; the network sees the site's own probabilities too."""
    a = ops.stop_gradient(site.logits)
    whole = site.opened
    p = whole.features(ops, probabilities(ops, site.family, a))
    unit = site.unit(ops, costs.value)

    def network(soft: Array) -> Array:  # [K, *plates]
        x = ops.concat([2 * whole.features(ops, soft) - 1, 2 * p - 1], axis=-1)
        return unit * site.to_plates(ops, predict(site.name, kept.networks["control"], x))

    soft_z, soft_z_tilde = soft_values(ops, site, draw, kept)
    tilde = network(soft_z_tilde(a))
    one = ops.ones_like(tilde)
    slope = ops.vjp(lambda a: network(soft_z(a)), a, one)
    return Variate(tilde, slope, ops.vjp(lambda a: network(soft_z_tilde(a)), a, one))


def assemble(ops: Ops, site: Site, draw: Draw, cost: Array, c: Variate) -> Local:
    """(f(b) − c(z̃)) ∇ log q(b) + ∇c(z) − ∇c(z̃), and its square as the objective of whatever c keeps."""
    trailing = site.logits.ndim - site.lead - len(site.batch_shape) - len(site.event_shape)
    trailing += site.family == ONEHOT
    a = ops.stop_gradient(site.logits)
    signal = site.spread(ops, ops.stop_gradient(cost) - c.tilde, trailing)
    gradient = signal * score(ops, site.family, a, draw.value) + c.slope - c.slope_tilde
    return Local(
        ops.stop_gradient(gradient) * site.logits,
        (gradient / site.spread(ops, site.unit(ops, cost), trailing)) ** 2,
    )
