"""LAX: a learned network as control variate of the score function, at continuous sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.estimator import Estimator
from ..core.families import LOCATION_SCALE, standard_score
from ..core.keep import Initial, Kept, Network, predict, prefixed, strip
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .baselines.base import Baseline
from .baselines.moving_average import MovingAverage

_LEVEL = "level_"


@dataclass(frozen=True, eq=False, repr=False)
class LAX(Estimator):
    """A network of the value as control variate, reparameterised, trained on the variance of the gradient.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)],   λ = (μ, s)
    With          (f(z) − b₀ − c(z)) ∇_λ log q_λ(z) + ∇_λ c(μ + s ε),   z = μ + s ε, c = r_ρ a network
    Requires      Normal, Laplace, Logistic, Gumbel or Cauchy sites; nothing of f. One evaluation, one of the network
                  and its slope. Unbiased for every ρ.

    With c = f it would be Pathwise(): so it is for models that have no derivative (a simulator, a threshold), or one
    that is wrong; Pathwise() is better wherever it works. r_ρ sees z, μ and s; it starts at 0 and is trained by your
    optimiser on the squared gradient in units of s. ``baseline`` (b₀) takes the level of f − c off its hands; None
    for the paper's form. ``network`` is None for one tanh layer of ``hidden`` units, else a `torch.nn.Module` (Pyro)
    or a flax, nnx or equinox module (NumPyro) from ``[..., F]`` to ``[..., 1]``. The cost is divided by the site's
    scale for the network. Worth its tuning when one evaluation is all you can afford; with several particles try
    Reinforce(LeaveOneOut()) first.

    >>> LAX(hidden=16)
    LAX(hidden=16)

    Reference: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018), "Backpropagation through the Void", arXiv:1711.00123.
    """

    network: Any = None
    hidden: int = field(default=32, kw_only=True)
    baseline: Baseline | None = field(default=MovingAverage(), kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = LOCATION_SCALE
    keeps: ClassVar[bool] = True  # type: ignore[assignment]
    instead: ClassVar[str] = "Use RELAX() for discrete sites, Pathwise() or Reinforce(LeaveOneOut()) for others"

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        if self.baseline is not None:
            self.baseline.check(site, particles)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return prefixed(_LEVEL, self.baseline.given(args, kwargs)) if self.baseline else {}

    def parameters(self, site: Site) -> dict[str, Initial]:
        return prefixed(_LEVEL, self.baseline.parameters(site)) if self.baseline else {}

    def networks(self, site: Site, given: Mapping[str, Array]) -> dict[str, Network]:
        declared = {"control": Network(3 * site.feature_count(site.named["loc"]), self.hidden, self.network)}
        below = self.baseline.networks(site, strip(_LEVEL, given)) if self.baseline else {}
        return declared | prefixed(_LEVEL, below)

    def state(self, site: Site) -> dict[str, Initial]:
        return prefixed(_LEVEL, self.baseline.state(site)) if self.baseline else {}

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        loc, scale = (ops.stop_gradient(site.named[k]) for k in ("loc", "scale"))
        z = ops.stop_gradient(draw.value)
        unit = site.unit(ops, costs.value)
        known = [site.features(ops, loc), site.features(ops, scale)]

        def network(z: Array) -> Array:  # [K, *plates]
            x = ops.concat([site.features(ops, z), *known], axis=-1)
            return unit * predict(site.name, kept.networks["control"], x)

        c = network(z)
        slope = ops.vjp(network, z, ops.ones_like(c))
        cost, auxiliary, state = ops.stop_gradient(costs.value), None, {}
        if self.baseline is not None:
            level = self.baseline.evaluate(ops, site, ops.stop_gradient(cost - c), kept.sub(_LEVEL))
            cost, auxiliary, state = cost - level.value, level.auxiliary, prefixed(_LEVEL, level.state)
        signal = site.spread(ops, cost - c)
        # ∂ log q / ∂μ = −ψ'(ε) / s, ∂ log q / ∂s = −(1 + ε ψ'(ε)) / s with ψ the log density at μ = 0, s = 1
        epsilon = (z - loc) / scale
        psi = standard_score(ops, site.family, epsilon)
        of_loc = -signal * psi / scale + slope
        of_scale = -signal * (1 + epsilon * psi) / scale + slope * epsilon
        surrogate = ops.stop_gradient(of_loc) * site.named["loc"] + ops.stop_gradient(of_scale) * site.named["scale"]
        in_scales = scale / site.spread(ops, unit)
        variance = ops.sum((of_loc * in_scales) ** 2) + ops.sum((of_scale * in_scales) ** 2)
        return Local(surrogate, variance if auxiliary is None else variance + ops.sum(auxiliary), state)
