"""Smoothed stochastic triples: the cost's slope in place of its difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Estimator
from ..core.families import BERNOULLI, BINOMIAL, GEOMETRIC, POISSON
from ..core.keep import Kept
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .stochastic_triple import in_natural_units


@dataclass(frozen=True, eq=False, repr=False)
class SmoothedTriple(Estimator):
    """Biased: the mean size of a perturbation times the slope of the cost. Exact where the cost is linear.

    Approximates  ∇_a E_{x ~ q_a}[f(x)],   a the logit or the log rate
    With          f'(x) · E[w (y − x)], mean of both directions:
                  Bernoulli ½ (x (1 − p) + (1 − x) p),   Binomial ½ ((n − x) p + x (1 − p)),
                  Geometric −½ (x + (x + 1)(1 − p)),     Poisson ½ (λ + x)
    Requires      one of these sites; a model that is differentiable in the site's value. One evaluation and its
                  slope. Biased, to second order in the steps: for Bernoulli sites it is ReinMax().

    No noise from a choice of element, unlike `StochasticTriple`, which is unbiased. Take it for smooth costs of large
    counts, where a step of one is small.

    >>> SmoothedTriple()
    SmoothedTriple()

    Reference: Arya, Schauer, Schäfer & Rackauckas (2022), "Automatic Differentiation of Programs with Discrete
    Randomness", arXiv:2210.08572.
    """

    unbiased: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, POISSON, GEOMETRIC, BINOMIAL)
    downstream: ClassVar[str] = "drawn"

    def relaxations(self, site: Site) -> int:
        return 1

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return ops.like(draw.value, site.logits if site.family == BERNOULLI else next(iter(site.named.values())))

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        x = draw.value
        if site.family == BERNOULLI:
            p, q = ops.sigmoid(site.logits), ops.sigmoid(-site.logits)
            size = 0.5 * (x * q + (1 - x) * p)
        elif site.family == POISSON:
            size = 0.5 * (site.named["rate"] + x)
        else:
            p = site.named["probs"]
            n = site.named.get("total_count")
            size = -0.5 * (x + (x + 1) * (1 - p)) if n is None else 0.5 * ((n - x) * p + x * (1 - p))
        return Local(in_natural_units(ops, site, ops.stop_gradient(size * costs.relaxed_slope[0])))
