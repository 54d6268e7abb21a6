"""RELAX with the model's own cost in the control variate: REBAR and a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.estimator import Costs, Draw, Kept, Ops, Relaxations, Site
from ..core.families import BERNOULLI, ONEHOT
from .baselines.base import Baseline
from .baselines.moving_average import MovingAverage
from .relaxed_control import RelaxedNetwork, Variate, of_model, of_network


@dataclass(frozen=True, eq=False, repr=False)
class RELAXWithModel(RelaxedNetwork):
    """The cost at a relaxed value as control variate, and a network for what it leaves over.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − b₀ − c(z̃)) ∇_a log q_a(b) + ∇_a c(z) − ∇_a c(z̃),   c = η f(σ_λ(·)) + r_ρ(σ_λ(·)),
                  z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b
    Requires      Bernoulli or OneHotCategorical sites; a model that accepts relaxed values and is differentiable in
                  them. Three evaluations, two of them differentiated, and two of the network. Unbiased for every ρ, η
                  and λ.
    For           smooth models
    Not for       costs at relaxed values that say little of those at 0 and 1

    With r = 0 it is `REBAR`, with η = 0 it is `RELAX`: ``temperature`` (λ) and ``scale`` (η) are as in the one,
    ``network``, ``hidden`` and ``baseline`` as in the other, of whose level the model's cost leaves little.

    >>> RELAXWithModel(scale=0.5)
    RELAXWithModel(scale=0.5)

    Reference: Grathwohl, Choi, Wu, Roeder & Duvenaud (2018), "Backpropagation through the Void", arXiv:1711.00123.
    """

    temperature: float = 0.5
    scale: float = field(default=1.0, kw_only=True)
    network: Any = field(default=None, kw_only=True)
    hidden: int = field(default=32, kw_only=True)
    baseline: Baseline | None = field(default=MovingAverage(), kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, ONEHOT)
    instead: ClassVar[str] = "Use OneHotCategorical here, RELAX(), or Reinforce(LeaveOneOut())"

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(2)

    def variate(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Variate:
        return of_network(ops, site, draw, costs, kept) + of_model(ops, site, draw, costs, kept)
