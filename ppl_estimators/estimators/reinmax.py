"""ReinMax: second-order straight-through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.estimator import Array, Draw, Ops, Site
from ..core.families import BERNOULLI, finite
from .relaxed_value import Temperature, Tempered, hard, with_slope


@dataclass(frozen=True, eq=False, repr=False)
class ReinMax(Tempered):
    """Biased: a straight-through rule of second order, exact for quadratic f.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          2 J(π) f'(b) − ½ J(p) f'(b),   π = ½ (softmax(a / λ) + b), J(π) v = π ⊙ v − π (π · v);
                  at a Bernoulli site with λ = 1 this is ½ f'(b) (b q + (1 − b) p),   p = σ(a), q = 1 − p
    Requires      Bernoulli or OneHotCategorical sites; a model differentiable in the value. One evaluation. Biased
                  unless f is at most quadratic in each value and λ = 1.
    For           one evaluation, nothing to tune; biased, the best of those
    Not for       when the optimum itself matters

    The trapezoidal rule where StraightThrough() is the rectangle: each difference f(1) − f(0) becomes the mean slope
    of its two ends. The best of the biased estimators with nothing to tune. The bias can still be large for a deep
    model late in training, and where slopes at 0 and 1 say little of the difference it is noisier than
    Reinforce(LeaveOneOut()), which has no bias. ``temperature`` (λ), 1 or more, may be a function of the number of
    steps taken.

    >>> ReinMax()
    ReinMax()

    Reference: Liu, Dong, Liu, Yu & Gao (2023), "Bridging Discrete and Backpropagation: Straight-Through and Beyond",
    arXiv:2304.08612.
    """

    temperature: Temperature = 1.0

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b, temperature = hard(ops, site, noise), self.at(noise)
        if site.family == BERNOULLI:
            a = site.logits
            up = 0.5 * (ops.sigmoid(a / temperature) + b)
            down = 0.5 * (ops.sigmoid(-a / temperature) + 1 - b)  # 1 - up, without cancellation
            slope = 2 * up * down - 0.5 * ops.sigmoid(a) * ops.sigmoid(-a)
            return Draw(with_slope(ops, b, ops.stop_gradient(slope) * a))
        a = finite(ops, ops.log_softmax(site.logits))
        centre = ops.stop_gradient(0.5 * (ops.softmax(a / temperature) + b))
        p = ops.stop_gradient(ops.softmax(a))
        return Draw(with_slope(ops, b, 2 * _jacobian(ops, centre, a) - 0.5 * _jacobian(ops, p, a)))


def _jacobian(ops: Ops, p: Array, x: Array) -> Array:
    """J(p) x; as a function of x its derivative is J(p), which is symmetric."""
    return p * (x - ops.sum(p * x, axis=-1, keepdims=True))
