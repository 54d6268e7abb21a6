"""The pathwise gradient without the score part of -log q."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.estimator import Estimator
from .without_score import WithoutScore


@dataclass(frozen=True, eq=False, repr=False)
class StickingTheLanding(WithoutScore):
    """Reparameterisation without the score part of −log q.

    Approximates  ∇_λ E_{z ~ q_λ}[log p(x, z) − log q_λ(z)]
    With          ∂_z [log p(x, z) − log q_λ(z)] · ∂_λ g(ε, λ),   λ inside log q_λ held fixed
    Requires      as Pathwise, and one more run of the guide. One evaluation of the model. Unbiased for the ELBO.
    For           guides that can reach the posterior
    Not for       early training, where it can be noisier than Pathwise()

    The dropped part, ∇_λ log q_λ(z) at fixed z, has mean zero but not variance zero. At the exact posterior the
    estimator's variance is zero. Prefer it when the guide can come close to the posterior; early in training it can
    be noisier than Pathwise. Every parameter of the guide is held fixed inside log q, also those through which this
    site moves the parameters of later sites. Under a bound of several particles the dropped part has another mean, and
    comes back as a weight of the path: it is DoublyReparameterized() there. Refused at a support that moves with the
    parameters, where dropping the score part is biased. ``estimator`` draws instead of the library, such as
    ImplicitPathwise() at a mixture.

    >>> StickingTheLanding()
    StickingTheLanding()

    Reference: Roeder, Wu & Duvenaud (2017), "Sticking the Landing", arXiv:1703.09194.
    """

    estimator: Estimator | None = None
