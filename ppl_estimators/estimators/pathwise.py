"""The reparameterisation gradient."""

from __future__ import annotations

from dataclasses import dataclass

from .library_draw import LibraryDraw


@dataclass(frozen=True, eq=False, repr=False)
class Pathwise(LibraryDraw):
    """Reparameterisation: differentiate through the draw itself.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          ∇_λ f(g(ε, λ)),   z = g(ε, λ) the reparameterised draw
    Requires      a reparameterisable distribution, f differentiable in z. One evaluation. Unbiased.
    For           the default for continuous sites
    Not for       models with jumps in z: Reinforce(LeaveOneOut())

    The default for every site that can be reparameterised. Not for a model with jumps in z (a threshold, a
    simulator): the jumps have no derivative, and the gradient would be silently wrong. Use
    ``Reinforce(LeaveOneOut())`` there.

    >>> Pathwise()
    Pathwise()

    Reference: Kingma & Welling (2014), "Auto-Encoding Variational Bayes", arXiv:1312.6114; Rezende, Mohamed &
    Wierstra (2014), arXiv:1401.4082.
    """
