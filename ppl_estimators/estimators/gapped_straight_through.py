"""Gapped straight-through: a deterministic perturbation in place of Gumbel noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core import relaxation
from ..core.estimator import Array, Draw, Ops, Site
from ..core.families import BERNOULLI, finite
from .relaxed_value import Temperature, Tempered, hard, with_slope


@dataclass(frozen=True, eq=False, repr=False)
class GappedStraightThrough(Tempered):
    """Biased: the slope of a softmax whose logits are moved, without noise, until the drawn value leads by a gap.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          f'(b) ∂_a softmax((a + m) / λ),   m held fixed,
                  m = (max a − a) b − relu(a − max a + g) (1 − b);   a Bernoulli site has the two logits (a, 0)
    Requires      Bernoulli or OneHotCategorical sites; a model differentiable in the value. One evaluation. Biased.
    For           where you would tune a temperature anyway
    Not for       when the optimum itself matters

    Given the draw the slope has no noise left, so the variance is below that of GumbelStraightThrough() at the same
    λ. Prefer it where you would tune a straight-through estimator's temperature anyway; ReinMax() has nothing to
    tune. Not recommended where bias matters. ``gap`` (g) is how far the drawn category must lead; ``temperature``
    (λ) may be a function of the number of steps taken.

    >>> GappedStraightThrough(gap=1.5)
    GappedStraightThrough(1.5)

    Reference: Fan, Chi, Rudnicky & Ramadge (2022), "Training Discrete Deep Generative Models via Gapped
    Straight-Through Estimator", arXiv:2206.07235.
    """

    gap: float = 1.0
    temperature: Temperature = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gap >= 0:
            raise ValueError(f"GappedStraightThrough(gap=...) needs a number of 0 or more, got {self.gap!r}.")

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b = hard(ops, site, noise)
        if site.family == BERNOULLI:
            # Of (a + m_1) - m_0 the formula leaves max(a, 0) + relu(g - max(a, 0)) = max(a, g) for b = 1 (g >= 0).
            a, sign = site.logits, 2 * b - 1
            gapped = sign * _at_least(ops, sign * a, self.gap)
        else:
            a = finite(ops, ops.log_softmax(site.logits))
            lead = ops.max(a, axis=-1, keepdims=True)
            others = a - _at_least(ops, a - lead + self.gap, 0.0)
            gapped = ops.where(b > 0, lead + ops.zeros_like(a), others)
        soft = relaxation.soften(ops, site.family, a + ops.stop_gradient(gapped - a), self.at(noise))
        return Draw(with_slope(ops, b, soft))


def _at_least(ops: Ops, x: Array, floor: float) -> Array:
    return ops.where(x > floor, x, ops.like(floor, x))
