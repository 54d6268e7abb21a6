"""RSVI: reparameterisation of a rejection sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.ops import Array, Ops
from .corrected_gamma import CorrectedGamma


@dataclass(frozen=True, eq=False, repr=False)
class RejectionPathwise(CorrectedGamma):
    """Reparameterise the accepted proposal of Marsaglia and Tsang's gamma sampler (RSVI).

    Approximates  ∇_α E_{z ~ Gamma(α, β)}[f(z)]
    With          f'(z) ∂_α z + f(z) ∂_α log π(ε; α + B),   z = h(ε, α + B) Π_{i<B} u_i^{1/(α+i)} / β,
                  h(ε, a) = (a − 1/3) (1 + ε / √(9a − 3))³,   log π(ε; a) = log q(h; a) + log |∂_ε h|
    Requires      Gamma, Beta or Dirichlet sites; f differentiable in z. One evaluation. Unbiased for every B.
    Not advised   for comparison; Pathwise() is less noisy

    ε is found from an accepted draw by inverting h, so any gamma sampler will do. ``boost`` (B, 1 or more) raises the
    shape: the higher, the closer ε is to a standard normal, and the less there is to correct. A Beta and a Dirichlet
    are drawn as gammas over their sum. Not recommended where the library has implicit gradients, and both have them
    for these families: Pathwise() has less variance, because nothing multiplies f. Here for comparison.

    >>> RejectionPathwise(boost=5)
    RejectionPathwise(5)

    Reference: Naesseth, Ruiz, Linderman & Blei (2017), "Reparameterization Gradients through Acceptance-Rejection
    Sampling Algorithms", arXiv:1610.05683.
    """

    boost: int = 1

    def __post_init__(self) -> None:
        if self.boost < 1:
            raise ValueError(
                f"RejectionPathwise(boost=...) needs 1 or more, got {self.boost!r}: the sampler needs shapes above 1."
            )

    def standardise(self, ops: Ops, log_g: Array, concentration: Array) -> Array:
        cube_root = ops.exp((log_g - ops.log(concentration - 1 / 3)) / 3)
        return ops.sqrt(9 * concentration - 3) * (cube_root - 1)

    def transform(self, ops: Ops, epsilon: Array, concentration: Array) -> tuple[Array, Array]:
        root = ops.sqrt(9 * concentration - 3)
        log_g = ops.log(concentration - 1 / 3) + 3 * ops.log1p(epsilon / root)
        return log_g, math.log(3) - ops.log(root + epsilon)
