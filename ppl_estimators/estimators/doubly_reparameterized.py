"""The pathwise gradient of a bound of several particles without the score part of -log q."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.estimator import Estimator
from .without_score import WithoutScore


@dataclass(frozen=True, eq=False, repr=False)
class DoublyReparameterized(WithoutScore):
    """Reparameterisation of a bound of several particles, the score part of −log q reparameterised once more.

    Approximates  ∇_λ E[(1 − α)⁻¹ log 1/K Σ_k w_k^{1−α}],   w_k = p(x, z_k) / q_λ(z_k)
    With          Σ_k (α w̃_k + (1 − α) w̃_k²) ∂_z log w_k · ∂_λ g(ε_k, λ),   w̃_k = w_k^{1−α} / Σ_j w_j^{1−α}
    Requires      as Pathwise, one more run of the guide, and under a bound one of the model. Unbiased.
    For           bounds of many particles, whose pathwise gradient drowns in noise
    Not for       sites beside or above Pathwise() ones in a chain, or above score functions

    Under a bound the score part Σ_k w̃_k ∇_λ log q_λ(z_k) has no mean of zero, and its size against the rest grows with
    K. Written as a path it becomes a part of the weights above: α = 0 is the importance-weighted bound. For the ELBO
    this is StickingTheLanding(), which under a bound is the same as this.

    ``estimator`` draws instead of the library: ImplicitPathwise(), say, at a mixture; or GumbelSoftmax() and its kin,
    whose gradient is no more than nearly that of the bound, but which vanishes with growing K as that of the bound
    does. Without this it does not: the score is that of the discrete law, and has a mean at relaxed values.

    >>> DoublyReparameterized()
    DoublyReparameterized()
    >>> from ppl_estimators import GumbelSoftmax
    >>> DoublyReparameterized(GumbelSoftmax(0.3))
    DoublyReparameterized(GumbelSoftmax(0.3))

    Reference: Tucker, Lawson, Gu & Maddison (2019), "Doubly Reparameterized Gradient Estimators for Monte Carlo
    Objectives", arXiv:1810.04152.
    """

    estimator: Estimator | None = None
