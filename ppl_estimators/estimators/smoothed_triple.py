"""Smoothed stochastic triples: the cost's slope in place of its difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.counts import in_natural_units
from ..core.estimator import Array, Draw, Estimator, Ops, Site, Value
from ..core.families import BERNOULLI, BINOMIAL, GEOMETRIC, POISSON


@dataclass(frozen=True, eq=False, repr=False)
class SmoothedTriple(Estimator):
    """Biased: the mean size of a perturbation times the slope of the cost. Exact where the cost is linear.

    Approximates  ∇_a E_{x ~ q_a}[f(x)],   a the logit or the log rate
    With          f'(x) · E[w (y − x)], mean of both directions:
                  Bernoulli ½ (x (1 − p) + (1 − x) p),   Binomial ½ ((n − x) p + x (1 − p)),
                  Geometric −½ (x + (x + 1)(1 − p)),     Poisson ½ (λ + x)
    Requires      one of these sites; a model that is differentiable in the site's value. One evaluation and its
                  slope. Biased, to second order in the steps: for Bernoulli sites it is ReinMax().
    For           large counts, smooth costs
    Not for       small counts: StochasticTriple() has no bias

    No noise from a choice of element, unlike `StochasticTriple`, which is unbiased. Take it for smooth costs of large
    counts, where a step of one is small.

    >>> SmoothedTriple()
    SmoothedTriple()

    Reference: Arya, Schauer, Schäfer & Rackauckas (2022), "Automatic Differentiation of Programs with Discrete
    Randomness", arXiv:2210.08572.
    """

    unbiased: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, POISSON, GEOMETRIC, BINOMIAL)
    value: ClassVar[Value] = Value.HARD

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        """The drawn value, with the mean size of its perturbation for a slope."""
        x = ops.like(noise["value"], site.logits if site.family == BERNOULLI else next(iter(site.named.values())))
        path = in_natural_units(ops, site, _size(ops, site, x))
        return Draw(x + (path - ops.stop_gradient(path)))  # exactly x: a library checks that counts are whole


def _size(ops: Ops, site: Site, x: Array) -> Array:
    """E[w (y − x)], the mean of both directions."""
    if site.family == BERNOULLI:
        p, q = ops.sigmoid(site.logits), ops.sigmoid(-site.logits)
        return 0.5 * (x * q + (1 - x) * p)
    if site.family == POISSON:
        return 0.5 * (site.named["rate"] + x)
    p = site.named["probs"]
    if site.family == GEOMETRIC:
        return -0.5 * (x + (x + 1) * (1 - p))
    return 0.5 * ((site.named["total_count"] - x) * p + x * (1 - p))
