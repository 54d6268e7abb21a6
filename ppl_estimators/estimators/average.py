"""The mean of several estimators of one site."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.estimator import Costs, Draw, Estimator, Kept, Local, Ops, Site
from .several import Mixture


@dataclass(frozen=True, eq=False, repr=False)
class Average(Mixture):
    """The mean of the local gradients of several estimators, each with a draw of its own.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          1/n Σ_j g_j,   g_j the estimate of estimator j
    Requires      what its parts require, none of them pathwise. The evaluations of all parts. Unbiased if they are.
    For           several estimators of like noise

    The draws are independent given what is upstream; what is downstream shares its noise. To average one estimator
    with itself use `Repeat`; for weights that lower the variance use `Combine`.

    >>> from ppl_estimators import DisARM, Reinforce
    >>> Average((DisARM(), Reinforce()))
    Average((DisARM(), Reinforce()))

    Reference: Owen (2013), "Monte Carlo theory, methods and examples", chapter 8 [owen2013monte].
    """

    estimators: tuple[Estimator, ...]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        locals_ = self.part_locals(ops, site, draw, costs, kept)
        surrogate = sum(ops.sum(local.surrogate) for local in locals_) / len(self.parts)
        return Local(surrogate, *self.trained(ops, locals_))
