"""REBAR: the relaxed model as a control variate of the score function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..core.estimator import Costs, Draw, Kept, Local, Ops, Relaxations, Site
from ..core.families import BERNOULLI, ONEHOT
from .relaxed_control import RelaxedControl, assemble, of_model


@dataclass(frozen=True, eq=False, repr=False)
class REBAR(RelaxedControl):
    """The cost at a relaxed value as control variate, its scale and temperature learned.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − c(z̃)) ∇_a log q_a(b) + ∇_a c(z) − ∇_a c(z̃),   c = η f(σ_λ(·)),
                  z = g(u, a) with b = H(z), and z̃ = g̃(v, b, a) distributed as z given b
    Requires      Bernoulli or OneHotCategorical sites; a model that accepts relaxed values and is differentiable in
                  them. Three evaluations, two of them differentiated. Unbiased for every η and λ.
    For           smooth models; measure first
    Not for       costs at relaxed values that say little of those at 0 and 1

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
    instead: ClassVar[str] = "Use OneHotCategorical here, RELAX(), or Reinforce(LeaveOneOut())"

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(2)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        return assemble(ops, site, draw, costs.value, of_model(ops, site, draw, costs, kept))
