"""The straight-through estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.estimator import Array, Draw, Ops, Site
from ..core.families import probabilities
from .relaxed_value import RelaxedValue, hard, with_slope


@dataclass(frozen=True, eq=False, repr=False)
class StraightThrough(RelaxedValue):
    """Biased: pretends that the draw moves as its mean does.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          f'(b) ∂_a p,   p = σ(a), or softmax(a) for one-hot sites
    Requires      Bernoulli or OneHotCategorical sites; a model differentiable in the value. One evaluation. Biased
                  unless f is linear in each value.
    Not advised   ReinMax() costs the same and is exact for quadratic costs

    A first-order rule: each difference f(1) − f(0) is replaced by a slope at the drawn end. Not recommended:
    ReinMax() costs the same and is exact for quadratic f. Unbiased at two evaluations: DisARM().

    >>> StraightThrough()
    StraightThrough()

    Reference: Bengio, Léonard & Courville (2013), "Estimating or Propagating Gradients Through Stochastic Neurons",
    arXiv:1308.3432.
    """

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        mean = probabilities(ops, site.family, site.logits)
        return Draw(with_slope(ops, hard(ops, site, noise), mean))
