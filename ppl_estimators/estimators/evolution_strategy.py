"""Evolution strategies: the score function at a draw and at its mirror image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Draws, Kept, Local, Ops, Site
from ..core.families import CAUCHY, LAPLACE, LOGISTIC, NORMAL, standard_score
from .baselines.base import Baseline, WithBaseline
from .baselines.moving_average import MovingAverage


@dataclass(frozen=True, eq=False, repr=False)
class EvolutionStrategy(WithBaseline):
    """Score function at a draw and at its mirror image about the location (mirrored sampling).

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)],   λ = (μ, s), z = μ + s ε, ε symmetric about 0 with log density ψ
    With          −½ (f(z) − f(z̄)) ψ'(ε) / s  for μ,   −(½ (f(z) + f(z̄)) − b) (1 + ε ψ'(ε)) / s  for s,   z̄ = μ − s ε
    Requires      Normal, Laplace, Logistic or Cauchy sites; nothing of f. Two evaluations. Unbiased.
    For           one particle, a black box that is roughly linear about the location
    Not for       models with a useful slope: Pathwise()

    What is symmetric about the location cancels from the first part, what is antisymmetric from the second, whose level
    ``baseline`` (b) takes; None for the papers' form. All sites are mirrored together, in one further evaluation.

    >>> EvolutionStrategy()
    EvolutionStrategy()

    Reference: Salimans, Ho, Chen, Sidor & Sutskever (2017), "Evolution Strategies as a Scalable Alternative to
    Reinforcement Learning", arXiv:1703.03864; Brockhoff, Auger, Hansen, Arnold & Hohm (2010), "Mirrored Sampling and
    Sequential Selection for Evolution Strategies" [brockhoff2010mirrored].
    """

    baseline: Baseline | None = field(default=MovingAverage(), kw_only=True)

    families: ClassVar[tuple[str, ...] | None] = (NORMAL, LAPLACE, LOGISTIC, CAUCHY)
    instead: ClassVar[str] = (
        "Use Antithetic(...) for discrete sites; for others Pathwise(), or Reinforce(LeaveOneOut())"
    )

    def alternatives(self, site: Site) -> Draws:
        return Draws(1)

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return 2 * site.named["loc"] - draw.value

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        loc, scale = site.named["loc"], site.named["scale"]
        epsilon = (draw.value - loc) / scale
        psi = standard_score(ops, site.family, epsilon)
        difference = site.spread(ops, costs.value - costs.alternatives[0]) / 2
        mean, auxiliary, state = self.subtract(ops, site, (costs.value + costs.alternatives[0]) / 2, kept)
        of_loc = -difference * psi / scale
        of_scale = -site.spread(ops, mean) * (1 + epsilon * psi) / scale
        return Local(ops.stop_gradient(of_loc) * loc + ops.stop_gradient(of_scale) * scale, auxiliary, state)
