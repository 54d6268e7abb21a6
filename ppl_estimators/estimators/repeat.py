"""One estimator with several draws at a site."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.estimator import Estimator, Site
from .several import Repeated


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(Repeated):
    """Several independent draws at this site only, for any score-function estimator.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          1/n Σ_j g(z_j),   z_j drawn independently given what is upstream; downstream shares its noise
    Requires      what ``estimator`` requires. n times its evaluations. Unbiased if it is.
    For           draws at one noisy site instead of particles
    Not for       sites whose downstream is most of the program: particles

    The repeats are to the estimator what particles are: ``Repeat(4, Reinforce(LeaveOneOut()))`` is leave-one-out with
    four draws of this site and one particle. Cheaper than particles if only the part of the program downstream of the
    site is slow to evaluate again, and it spends the draws where the noise is.

    >>> from ppl_estimators import DisARM
    >>> Repeat(2, DisARM())
    Repeat(2, DisARM())

    Reference: Titsias & Lázaro-Gredilla (2015), "Local Expectation Gradients for Black Box Variational Inference",
    arXiv:1503.01494.
    """

    n: int
    estimator: Estimator

    def check(self, site: Site, particles: int) -> None:
        self.check_parts(site, particles * self.n)
