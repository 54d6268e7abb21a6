"""Stochastic triples: a perturbation of the drawn value, and how probable a small change of the parameter makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.counts import in_natural_units
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import BERNOULLI, BINOMIAL, CATEGORICAL, DISCRETE, GEOMETRIC, ONEHOT, POISSON


@dataclass(frozen=True, eq=False, repr=False)
class StochasticTriple(Estimator):
    """A finite perturbation of one element, chosen with probability proportional to its weight (smoothing exact).

    Approximates  ∇_θ E_{x ~ q_θ}[f(x)]
    With          W/|w_i| · w_i (f(x with y_i for x_i) − f(x)) for one element i, chosen with probability |w_i|/W,
                  W = Σ_i |w_i|;   the law of the element gives y and w:
                  Bernoulli (two-sided)  y = 1 − x, w = ½/(1 − p) at x = 0, −½/p at x = 1
                  Binomial               y = x + 1, w = (n − x)/(1 − p)
                  Geometric              y = x − 1, w = x/(p (1 − p))
                  Poisson                y = x + 1, w = 1
                  Categorical            y = x ± 1 by inversion of the cumulative probabilities
    Requires      one of these sites; nothing of f. Two evaluations, however many elements the site has. Unbiased.
    For           counts: Poisson, binomial, geometric
    Not for       few elements and evaluations to spare: SumAroundMode()

    For counts, where nothing antithetic exists: the change by one is small, so the two costs are close. Elements are
    chosen in units of their natural parameter. With many elements the variance grows with their number: `MeasureValued`
    evaluates every element instead.

    >>> StochasticTriple()
    StochasticTriple()

    Reference: Arya, Schauer, Schäfer & Rackauckas (2022), "Automatic Differentiation of Programs with Discrete
    Randomness", arXiv:2210.08572.
    """

    families: ClassVar[tuple[str, ...] | None] = (*DISCRETE, POISSON, GEOMETRIC, BINOMIAL)

    def alternatives(self, site: Site) -> Moves:
        return Moves(1)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = (*site.batch_shape, *site.event_shape)
        shape = shape[:-1] if site.family == ONEHOT else shape
        declared = {"value": Noise("value"), "which": Noise("uniform", shape)}
        return declared | ({"side": Noise("uniform", shape)} if site.family in (CATEGORICAL, ONEHOT) else {})

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        """Every element's y, the total weight, and which element moves: the first of exponential clocks with rates
        |w_i|."""
        x = noise["value"]
        y, weight = _perturbed(ops, site, x, noise.get("side"))
        moves = weight > 0
        clock = -ops.log(noise["which"]) / ops.where(moves, weight, ops.ones_like(weight))
        clock = ops.where(moves, clock, ops.full_like(clock, math.inf))
        first = ops.min(site.features(ops, clock), axis=-1)  # [*lead, *plates]
        chosen = ops.like(moves & (clock == site.spread(ops, first)), weight)
        return Draw(x, {"y": y, "chosen": chosen, "total": site.sum_lanes(ops, weight)})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        chosen = draw.extra["chosen"] > 0
        return ops.where(chosen[..., None] if site.family == ONEHOT else chosen, draw.extra["y"], draw.value)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        difference = site.spread(ops, (costs.alternatives[0] - costs.value) * draw.extra["total"])
        signal = ops.stop_gradient(difference * draw.extra["chosen"])
        if site.family not in (CATEGORICAL, ONEHOT):
            sign = 1 - 2 * draw.value if site.family == BERNOULLI else 1
            return Local(in_natural_units(ops, site, signal * sign))
        both = draw.value, draw.extra["y"]
        z, y = (v if site.family == ONEHOT else ops.one_hot(v, site.categories, site.logits) for v in both)
        below, above = _sides(ops, z)
        up = ops.sum(above * y, axis=-1, keepdims=True)
        side = ops.softmax(site.logits) * ops.where(up > 0, above, below)  # p_k, on the side that it moved to
        mass = ops.sum(side, axis=-1, keepdims=True)
        share = ops.stop_gradient(side / ops.where(mass > 0, mass, ops.ones_like(mass)))
        return Local(signal[..., None] * share * site.logits)


def _perturbed(ops: Ops, site: Site, x: Array, side: Array | None) -> tuple[Array, Array]:
    """y and |w| of every element, ``[*batch, *event]``, the weight in units of the natural parameter (logit, log
    rate)."""
    if site.family == BERNOULLI:
        return 1 - x, 0.5 * ops.where(x > 0, ops.sigmoid(-site.logits), ops.sigmoid(site.logits))
    if site.family == POISSON:
        return x + 1, site.named["rate"]
    if site.family == BINOMIAL:
        return x + 1, (site.named["total_count"] - x) * site.named["probs"]
    if site.family == GEOMETRIC:
        return x - 1, ops.like(x, site.named["probs"])
    z = x if site.family == ONEHOT else ops.one_hot(x, site.categories, site.logits)
    p = ops.softmax(site.logits)
    here = ops.sum(p * z, axis=-1)
    sides = _sides(ops, z)
    below, above = (ops.sum(p * s, axis=-1) for s in sides)
    # P_v (1 − P_v) / p_v to the right, (1 − P_{v−1}) P_{v−1} / p_v to the left
    right, left = (below + here) * above / here, (above + here) * below / here
    goes_up = side * (right + left) < right
    lower, upper = (s * ops.like(p > 0, p) for s in sides)  # a category of probability zero is stepped over
    c = site.categories
    up, down = ops.argmax(upper, axis=-1), c - 1 - ops.argmax(ops.flip(lower, axis=-1), axis=-1)
    index = ops.where(goes_up, up, down)
    return ops.one_hot(index, c, x) if site.family == ONEHOT else ops.like(index, x), right + left


def _sides(ops: Ops, z: Array) -> tuple[Array, Array]:
    """Categories below and above that of the one-hot ``z``, as zeros and ones."""
    upto = ops.cumulative_sum(z, axis=-1)
    return 1 - upto, upto - z
