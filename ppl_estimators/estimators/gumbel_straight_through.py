"""Gumbel straight-through: hard forward, relaxed backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core import relaxation
from ..core.estimator import Array, Draw, Ops, Site
from .relaxed_value import Temperature, Tempered, hard, with_slope


@dataclass(frozen=True, eq=False, repr=False)
class GumbelStraightThrough(Tempered):
    """Biased: the model sees the hard draw, the gradient is that of the Gumbel-softmax value behind it.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          f'(b) ∂_a y,   b = H(z), y = σ_λ(z),   z = a + logit u, or log p − log(−log u) for one-hot sites
    Requires      Bernoulli or OneHotCategorical sites; a model differentiable in the value. One evaluation. Biased
                  for every λ, even for linear f; the variance grows as λ falls.
    Not advised   RaoGumbel() has the same mean and less variance

    Prefer it to GumbelSoftmax() where the model must see values that can occur. Not recommended beside what is as
    cheap: RaoGumbel() has the same mean and less variance, ReinMax() less bias. ``temperature`` (λ) may be a function
    of the number of steps taken.

    >>> GumbelStraightThrough(1.0)
    GumbelStraightThrough(1.0)

    Reference: Jang, Gu & Poole (2017), "Categorical Reparameterization with Gumbel-Softmax", arXiv:1611.01144.
    """

    temperature: Temperature = 0.5

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        z = relaxation.unconditional(ops, site.family, site.logits, noise["u"])
        soft = relaxation.soften(ops, site.family, z, self.at(noise))
        return Draw(with_slope(ops, hard(ops, site, noise), soft))
