"""RELAX: a learned network as control variate of the score function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.errors import site_error
from ..core.estimator import Relaxations
from ..core.families import CATEGORICAL, DISCRETE, probabilities
from ..core.keep import Keeps, Kept, Network, predict
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .baselines.base import Baseline, WithLevel
from .baselines.moving_average import MovingAverage
from .relaxed_control import RelaxedControl, assemble, log_initial, soft_values


@dataclass(frozen=True, eq=False, repr=False)
class RELAX(RelaxedControl, WithLevel):
    """A network of the relaxed value as control variate, trained on the variance of the gradient.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − b₀ − c(z̃)) ∇_a log q_a(b) + ∇_a c(z) − ∇_a c(z̃),   c = r_ρ(σ_λ(·)) [+ η f(σ_λ(·))],
                  z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b
    Requires      Bernoulli or (one-hot or integer) Categorical sites. Nothing of f without the model term: one
                  evaluation and two of the network. With ``model_term=True`` what REBAR requires: three evaluations.
                  Unbiased for every ρ, η and λ.

    r_ρ sees the relaxed value and the site's own probabilities; it starts at 0. ``baseline`` (b₀) takes the level of
    f − c off its hands, which a network would need hundreds of steps to reach; None for the paper's form.
    ``network`` is None for one tanh layer of ``hidden`` units, else a `torch.nn.Module` (Pyro) or a flax, nnx or
    equinox module (NumPyro) from ``[..., F]`` to ``[..., 1]``. The cost is divided by the site's scale for the network.
    Worth its tuning for a black-box cost when one evaluation is all you can afford; otherwise LeaveOneOut() with two
    particles usually wins.

    >>> RELAX(model_term=True)
    RELAX(model_term=True)

    Reference: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018), "Backpropagation through the Void", arXiv:1711.00123.
    """

    temperature: float = 0.5
    scale: float = field(default=1.0, kw_only=True)
    network: Any = field(default=None, kw_only=True)
    hidden: int = field(default=32, kw_only=True)
    model_term: bool = field(default=False, kw_only=True)
    baseline: Baseline | None = field(default=MovingAverage(), kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = DISCRETE
    instead: ClassVar[str] = "Use Pathwise() if the distribution is reparameterisable, or Reinforce(LeaveOneOut())"

    def __post_init__(self) -> None:
        RelaxedControl.__post_init__(self)
        WithLevel.__post_init__(self)

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        if self.model_term and site.family == CATEGORICAL:
            raise site_error(
                site.name,
                f"RELAX with the model term needs a relaxable site, got an integer {site.distribution}",
                "Use OneHotCategorical, or RELAX() without the model term.",
            )

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(2 if self.model_term else 0)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        trained = {"log_temperature": log_initial(self.temperature)}
        trained |= {"log_scale": log_initial(self.scale)} if self.model_term else {}
        control = Network(2 * site.opened.feature_count(site.logits), self.hidden, self.network)
        return Keeps(trained, {"control": control}) | super().keeps(site, given)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a = ops.stop_gradient(site.logits)
        whole = site.opened
        p = whole.features(ops, probabilities(ops, site.family, a))
        unit = site.unit(ops, costs.value)

        def network(soft: Array) -> Array:  # [K, *plates]
            x = ops.concat([2 * whole.features(ops, soft) - 1, 2 * p - 1], axis=-1)
            return unit * site.to_plates(ops, predict(site.name, kept.networks["control"], x))

        soft_z, soft_z_tilde = soft_values(ops, site, draw, kept)
        c_tilde = network(soft_z_tilde(a))
        one = ops.ones_like(c_tilde)
        slope_z = ops.vjp(lambda a: network(soft_z(a)), a, one)
        slope_z_tilde = ops.vjp(lambda a: network(soft_z_tilde(a)), a, one)
        if self.model_term:
            eta = ops.exp(kept.parameters["log_scale"])
            c_tilde = c_tilde + eta * costs.relaxed[1]
            slope_z = slope_z + eta * ops.vjp(soft_z, a, costs.relaxed_slope[0])
            slope_z_tilde = slope_z_tilde + eta * ops.vjp(soft_z_tilde, a, costs.relaxed_slope[1])
        level = self.level(ops, site, costs.value - c_tilde, kept)  # with the model term there is little left
        local = assemble(ops, site, draw, Costs(costs.value - level.value), c_tilde, slope_z, slope_z_tilde)
        auxiliary = ops.sum(local.auxiliary)
        if level.auxiliary is not None:
            auxiliary = auxiliary + ops.sum(level.auxiliary)
        return Local(local.surrogate, auxiliary, level.state)
