"""The pathwise gradient without the score part of -log q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.densities import check_density, check_ends
from ..core.estimator import Value
from ..core.site import Site
from .library_draw import LibraryDraw


@dataclass(frozen=True, eq=False, repr=False)
class StickingTheLanding(LibraryDraw):
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
    parameters, where dropping the score part is biased.

    >>> StickingTheLanding()
    StickingTheLanding()

    Reference: Roeder, Wu & Duvenaud (2017), "Sticking the Landing", arXiv:1703.09194.
    """

    value: ClassVar[Value] = Value.STICKING

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        check_ends(site)
        check_density(site)
