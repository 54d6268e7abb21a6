"""RELAX: a learned network as control variate of the score function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.estimator import Costs, Draw, Kept, Ops, Site
from ..core.families import DISCRETE
from .baselines.base import Baseline
from .baselines.moving_average import MovingAverage
from .relaxed_control import RelaxedNetwork, Variate, of_network


@dataclass(frozen=True, eq=False, repr=False)
class RELAX(RelaxedNetwork):
    """A network of the relaxed value as control variate, trained on the variance of the gradient.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − b₀ − c(z̃)) ∇_a log q_a(b) + ∇_a c(z) − ∇_a c(z̃),   c = r_ρ(σ_λ(·)),
                  z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b
    Requires      Bernoulli or (one-hot or integer) Categorical sites; nothing of f. One evaluation and two of the
                  network. Unbiased for every ρ and λ.
    For           a black box that you can afford to run once
    Not for       two evaluations are affordable: LeaveOneOut() usually wins

    r_ρ sees the relaxed value and the site's own probabilities; it starts at 0. ``baseline`` (b₀) takes the level of
    f − c off its hands, which a network would need hundreds of steps to reach; None for the paper's form.
    ``network`` is None for one tanh layer of ``hidden`` units, else a `torch.nn.Module` (Pyro) or a flax, nnx or
    equinox module (NumPyro) from ``[..., F]`` to ``[..., 1]``. The cost is divided by the site's scale for the network.
    Worth its tuning for a black-box cost when one evaluation is all you can afford; otherwise LeaveOneOut() with two
    particles usually wins. `RELAXWithModel` adds the cost at relaxed values, as REBAR has it.

    >>> RELAX(hidden=16)
    RELAX(hidden=16)

    Reference: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018), "Backpropagation through the Void", arXiv:1711.00123.
    """

    temperature: float = 0.5
    network: Any = field(default=None, kw_only=True)
    hidden: int = field(default=32, kw_only=True)
    baseline: Baseline | None = field(default=MovingAverage(), kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = DISCRETE
    instead: ClassVar[str] = "Use Pathwise() if the distribution is reparameterisable, or Reinforce(LeaveOneOut())"
    positive: ClassVar[tuple[str, ...]] = ("temperature",)

    def variate(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Variate:
        return of_network(ops, site, draw, costs, kept)
