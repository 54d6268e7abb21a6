"""LAX: a learned network as control variate of the score function, at continuous sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.estimator import Array, Costs, Draw, Local, Ops, Site
from ..core.families import LOCATION_SCALE, standard_score
from ..core.keep import Keeps, Kept, Network, predict
from .baselines.base import Baseline, WithLevel
from .baselines.moving_average import MovingAverage


@dataclass(frozen=True, eq=False, repr=False)
class LAX(WithLevel):
    """A network of the value as control variate, reparameterised, trained on the variance of the gradient.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)],   λ = (μ, s)
    With          (f(z) − b₀ − c(z)) ∇_λ log q_λ(z) + ∇_λ c(μ + s ε),   z = μ + s ε, c = r_ρ a network
    Requires      Normal, Laplace, Logistic, Gumbel or Cauchy sites; nothing of f. One evaluation, one of the network
                  and its slope. Unbiased for every ρ.
    For           a black box that you can afford to run once
    Not for       models with a useful slope: Pathwise()

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
    instead: ClassVar[str] = "Use RELAX() for discrete sites; for others Pathwise(), or Reinforce(LeaveOneOut())"

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        declared = {"control": Network(3 * site.opened.feature_count(site.named["loc"]), self.hidden, self.network)}
        return Keeps(networks=declared) | super().keeps(site, given)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        loc, scale = (ops.stop_gradient(site.named[k]) for k in ("loc", "scale"))
        z = ops.stop_gradient(draw.value)
        unit = site.unit(ops, costs.value)
        whole = site.opened
        known = [whole.features(ops, loc), whole.features(ops, scale)]

        def network(z: Array) -> Array:  # [K, *plates]
            x = ops.concat([whole.features(ops, z), *known], axis=-1)
            return unit * site.to_plates(ops, predict(site.name, kept.networks["control"], x))

        c = network(z)
        slope = ops.vjp(network, z, ops.ones_like(c))
        cost = ops.stop_gradient(costs.value)
        level = self.level(ops, site, cost - c, kept)
        signal = site.spread(ops, cost - level.value - c)
        # ∂ log q / ∂μ = −ψ'(ε) / s, ∂ log q / ∂s = −(1 + ε ψ'(ε)) / s with ψ the log density at μ = 0, s = 1
        epsilon = (z - loc) / scale
        psi = standard_score(ops, site.family, epsilon)
        of_loc = -signal * psi / scale + slope
        of_scale = -signal * (1 + epsilon * psi) / scale + slope * epsilon
        surrogate = ops.stop_gradient(of_loc) * site.named["loc"] + ops.stop_gradient(of_scale) * site.named["scale"]
        in_scales = scale / site.spread(ops, unit)
        variance = ops.sum((of_loc * in_scales) ** 2) + ops.sum((of_scale * in_scales) ** 2)
        auxiliary = variance if level.auxiliary is None else variance + ops.sum(level.auxiliary)
        return Local(surrogate, auxiliary, level.state)
