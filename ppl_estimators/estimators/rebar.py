"""REBAR: the relaxed model as a control variate of the score function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core import relaxation
from ..core.estimator import Estimator, Noise
from ..core.families import BERNOULLI, ONEHOT, score, threshold
from ..core.keep import Initial, Kept
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site


@dataclass(frozen=True, eq=False, repr=False)
class REBAR(Estimator):
    """The cost at a relaxed value as control variate, its scale and temperature learned.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − c(z̃)) ∇_a log q_a(b) + ∇_a c(z) − ∇_a c(z̃),   c = η f(σ_λ(·)),
                  z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b
    Requires      Bernoulli or OneHotCategorical sites; a model that accepts relaxed values and is differentiable in
                  them. Three evaluations, two of them differentiated. Unbiased for every η and λ.

    η (``scale``) and λ (``temperature``) are trained by your optimiser on the variance of the site's local gradient,
    from the given start. Discrete sites downstream of this one are relaxed too while c is evaluated, so that chains
    stay unbiased; the model must accept their relaxed values as well. Where the model's cost at relaxed values says
    little about the cost at 0 and 1 it is no better than plain score function, at three times the price: measure.

    >>> REBAR(temperature=0.5)
    REBAR()

    Reference: Tucker, Mnih, Maddison, Lawson & Sohl-Dickstein (2017), "REBAR", arXiv:1703.07370.
    """

    temperature: float = 0.5
    scale: float = field(default=1.0, kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, ONEHOT)
    shared: ClassVar[bool] = True
    keeps: ClassVar[bool] = True  # type: ignore[assignment]
    instead: ClassVar[str] = "Use OneHotCategorical here, RELAX() without the model term, or Reinforce(LeaveOneOut())"

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{type(self).__name__}({name}=...) needs a positive number, got {getattr(self, name)!r}."
                )

    def relaxations(self, site: Site) -> int:
        return 2

    def parameters(self, site: Site) -> dict[str, Initial]:
        return {"log_temperature": log_initial(self.temperature), "log_scale": log_initial(self.scale)}

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = tuple(site.logits.shape)
        return {"u": Noise("uniform", shape), "v": Noise("uniform", shape)}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return Draw(threshold(ops, site.family, site.logits, noise["u"]), noise)

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return soft_values(ops, site, draw, kept)[index](ops.stop_gradient(site.logits))

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        return ops.exp(kept.parameters["log_temperature"])

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a = ops.stop_gradient(site.logits)
        eta = ops.exp(kept.parameters["log_scale"])
        slopes = [ops.vjp(soft, a, costs.relaxed_slope[i]) for i, soft in enumerate(soft_values(ops, site, draw, kept))]
        return assemble(ops, site, draw, costs, eta * costs.relaxed[1], eta * slopes[0], eta * slopes[1])


def log_initial(x: float) -> Initial:
    import math

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
    return Local(ops.stop_gradient(gradient) * site.logits, (gradient / site.unit(ops, trailing)) ** 2)
