"""What REBAR and RELAX share: a control variate of the relaxed value, and its slope at two coupled relaxations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..core import relaxation
from ..core.estimator import Estimator, Noise
from ..core.families import ONEHOT, score, threshold
from ..core.keep import Initial, Kept
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site


class RelaxedControl(Estimator):
    """Base: z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b."""

    temperature: float
    scale: float

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{type(self).__name__}({name}=...) needs a positive number, got {getattr(self, name)!r}."
                )

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = tuple(site.logits.shape)
        return {"u": Noise("uniform", shape), "v": Noise("uniform", shape)}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return Draw(threshold(ops, site.family, site.logits, noise["u"]), noise)

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return soft_values(ops, site, draw, kept)[index](ops.stop_gradient(site.logits))

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        return ops.exp(kept.parameters["log_temperature"])


def log_initial(x: float) -> Initial:
    return Initial(value=math.log(x))


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


def assemble(
    ops: Ops, site: Site, draw: Draw, costs: Costs, c_tilde: Array, slope_z: Array, slope_z_tilde: Array
) -> Local:
    """(f(b) − c(z̃)) ∇ log q(b) + ∇c(z) − ∇c(z̃), and its square as the objective of whatever c keeps."""
    trailing = site.logits.ndim - site.lead - len(site.batch_shape) - len(site.event_shape)
    trailing += site.family == ONEHOT
    a = ops.stop_gradient(site.logits)
    signal = site.spread(ops, ops.stop_gradient(costs.value) - c_tilde, trailing)
    gradient = signal * score(ops, site.family, a, draw.value) + slope_z - slope_z_tilde
    return Local(
        ops.stop_gradient(gradient) * site.logits,
        (gradient / site.spread(ops, site.unit(ops, costs.value), trailing)) ** 2,
    )
