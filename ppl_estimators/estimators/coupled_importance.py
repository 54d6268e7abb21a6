"""Antithetic categorical draws, weighted back to independent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import splits
from ..core.estimator import Costs, Draw, Kept, Local, Ops, Site
from ..core.families import score
from .split_draw import SplitDraw


@dataclass(frozen=True, eq=False, repr=False)
class CoupledImportance(SplitDraw):
    """Antithetic stick-breaking draws with importance weights (DisARM-IW).

    Approximates  ∇_φ E_{z ~ softmax(φ)}[f(z)]
    With          ½ r (f(z) − f(z̃)) ∇_φ (log q(z) − log q(z̃)),
                  r = Π_{i<n} (1 − s_i)² / (1 − 2 s_i) · σ(|a_n|), n the first stick where z and z̃ part, s = σ(a)
    Requires      Categorical or OneHotCategorical sites; nothing of f. Two evaluations. Unbiased.
    For           two evaluations, categories of like probability
    Not for       one category much likelier than the rest: DisARMTree()

    r is the probability of the pair (z, z̃) as independent draws over its probability as coupled ones. That covers
    every pair only if s_i < ½ on all sticks but the last, so categories are tried from the unlikeliest on; another
    order is biased, and cannot be chosen. Over six categories of like probability it was a little less noisy than
    DisARMStickBreaking(), and otherwise on a par; see there when to prefer either.

    >>> CoupledImportance()
    CoupledImportance()

    Reference: Dong, Mnih & Tucker (2021), "Coupled Gradient Estimators for Discrete Latent Variables",
    arXiv:2106.08056.
    """

    order: ClassVar[str] = "ascending"  # type: ignore[misc]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        b, b_tilde = draw.extra["b"], draw.extra["b_tilde"]
        sticks = self.divide(site.categories)
        a = splits.split_logits(ops, sticks, ops.take_last(site.logits, draw.extra["order"]))
        m, m_tilde = splits.visited(ops, site, sticks, draw)
        both, zero = m * m_tilde, ops.zeros_like(a)
        # Sticks before n. The last one has no stick behind it, and there s may be ½. On the others s is at most ⅓, and
        # (1 − s)² / (1 − 2s) = 1 + s² / (1 − 2s) is within [1, 4/3]: no logarithms, whose difference is all there is.
        last = ops.indices(site.categories - 1, a) == site.categories - 2
        passed = (both > 0) & (b == 0) & (b_tilde == 0) & ~last
        s = ops.where(passed, ops.sigmoid(a), zero)
        r = ops.prod(1 + s**2 / (1 - 2 * s), axis=-1)
        parting = ops.sum(ops.where(b != b_tilde, both * ops.sigmoid(ops.abs(a)), zero), axis=-1)  # 0 where z = z̃
        weight = 0.5 * site.spread(ops, costs.value - costs.alternatives[0]) * r * parting
        pair = [score(ops, site.family, site.logits, v) for v in (draw.value, self.alternative(ops, site, draw, 0))]
        return Local(ops.stop_gradient(weight[..., None] * (pair[0] - pair[1])) * site.logits)
