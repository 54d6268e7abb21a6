"""The reparameterisation gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import site_error
from ..core.estimator import Estimator
from ..core.site import Site


@dataclass(frozen=True, eq=False, repr=False)
class Pathwise(Estimator):
    """Reparameterisation: differentiate through the draw itself.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          ∇_λ f(g(ε, λ)),   z = g(ε, λ) the reparameterised draw
    Requires      a reparameterisable distribution, f differentiable in z. One evaluation. Unbiased.

    The default for every site that can be reparameterised. Not for a model with jumps in z (a threshold, a
    simulator): the jumps have no derivative, and the gradient would be silently wrong. Use
    ``Reinforce(LeaveOneOut())`` there.

    >>> Pathwise()
    Pathwise()

    Reference: Kingma & Welling (2014), "Auto-Encoding Variational Bayes", arXiv:1312.6114; Rezende, Mohamed &
    Wierstra (2014), arXiv:1401.4082.
    """

    pathwise: ClassVar[bool] = True
    library_draw: ClassVar[bool] = True
    instead: ClassVar[str] = "Use DisARM() for Bernoulli sites, or Reinforce(LeaveOneOut()) for any"

    def check(self, site: Site, particles: int) -> None:
        if not site.reparameterised:
            raise site_error(
                site.name,
                f"{type(self).__name__} needs a reparameterisable distribution, got {site.distribution}",
                self.instead + ".",
            )
