"""Sum over the counts around the mode, and sample the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.counts import in_natural_units
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Ops, Site
from ..core.families import COUNTS, GEOMETRIC, POISSON, possible


@dataclass(frozen=True, eq=False, repr=False)
class SumAroundMode(Estimator):
    """Sum over k counts around the mode, and score the drawn one where it lies outside.

    Approximates  ∇_θ E_{x ~ q_θ}[f(x)]
    With          Σ_{c ∈ W} q(c) (f(c) − B) ∇_θ log q(c) + 1[x ∉ W] (f(x) − B) ∇_θ log q(x),
                  W = {m, ..., m + k − 1} around the mode,   B = Σ_{c ∈ W} q(c) f(c) / Σ_{c ∈ W} q(c)
    Requires      Poisson, Geometric or Binomial sites; nothing of f. 1 + D k evaluations for D dependent elements.
                  Unbiased; exact for a single element if W is the whole support.
    For           a count with few likely values
    Not for       many elements, a spread-out law: StochasticTriple()

    ``k``: how many counts are summed. The window moves with the parameters and the mass outside is sampled, so a
    countable support is truncated without a bias. Prefer it for a single count with few likely values, such as a small
    rate; the window should hold most of the mass, about four standard deviations. For many elements
    ``StochasticTriple()`` takes two evaluations. Dependent elements are moved one at a time, as in Enumerate().

    >>> SumAroundMode(8)
    SumAroundMode(8)

    Reference: Liu, Regier, Tripuraneni, Jordan & McAuliffe (2019), "Rao-Blackwellized Stochastic Gradients for
    Discrete Distributions", arXiv:1810.04777. The baseline B is ours: it costs nothing and sees nothing of x.
    """

    k: int

    families: ClassVar[tuple[str, ...] | None] = tuple(COUNTS)

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"SumAroundMode(k) sums k counts: k must be an integer, 1 or more, got {self.k!r}.")

    def alternatives(self, site: Site) -> Moves:
        return Moves(site.lanes * self.k, self.weights)

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        x = noise["value"]
        start = ops.broadcast_to(ops.stop_gradient(self._start(ops, site)), x.shape)
        return Draw(x, {"start": ops.like(start, x)})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Lane ``index // k`` takes number ``index % k`` of its window, or stays where that is beyond the support."""
        here = lanes.numbers(ops, site, draw.value) == index // self.k
        moved = draw.extra["start"] + index % self.k
        if site.family not in (POISSON, GEOMETRIC):
            here = here & (moved <= site.named["total_count"])
        return ops.where(here, moved, draw.value)

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        q, _, outside = self._masses(ops, site, draw)
        return lanes.weights(ops, site, outside, q)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        q, counts, outside = self._masses(ops, site, draw)
        f = possible(ops, q, lanes.by_lane(ops, site, costs.alternatives))  # [K, *batch, *event, k]
        baseline = ops.sum(q * f, axis=-1) / ops.sum(q, axis=-1)
        inside = ops.sum(q * (f - baseline[..., None]) * _score(ops, site, counts, trailing=True), axis=-1)
        beyond = outside * (site.spread(ops, costs.value) - baseline) * _score(ops, site, draw.value)
        return Local(in_natural_units(ops, site, inside + beyond))

    def _start(self, ops: Ops, site: Site) -> Array:
        """The first count of the window."""
        if site.family == GEOMETRIC:
            return ops.zeros_like(site.named["probs"])
        if site.family == POISSON:
            start = ops.floor(site.named["rate"]) - (self.k - 1) // 2
        else:
            n = site.named["total_count"]
            start = ops.floor((n + 1) * site.named["probs"]) - (self.k - 1) // 2
            start = ops.where(start > n - self.k + 1, n - self.k + 1, start)
        return ops.where(start > 0, start, ops.zeros_like(start))

    def _masses(self, ops: Ops, site: Site, draw: Draw) -> tuple[Array, Array, Array]:
        """q of the window's counts, these counts ``[..., k]``, and 1[x ∉ W], constants of differentiation."""
        like = site.named["rate" if site.family == POISSON else "probs"]
        start, x = ops.like(draw.extra["start"], like), ops.like(draw.value, like)
        counts = start[..., None] + ops.like(ops.indices(self.k, like), like)
        outside = ops.like((x < start) | (x >= start + self.k), like)
        return ops.stop_gradient(_mass(ops, site, counts)), counts, outside


def _mass(ops: Ops, site: Site, c: Array) -> Array:
    """q(c), ``[..., k]``; 0 beyond the support."""
    if site.family == POISSON:
        rate = site.named["rate"][..., None]
        safe = ops.where(rate > 0, rate, ops.ones_like(rate))
        mass = ops.exp(c * ops.log(safe) - rate - ops.lgamma(c + 1))
        return ops.where(rate > 0, mass, ops.like(c == 0, rate))
    p = site.named["probs"][..., None]
    n = ops.ones_like(p) if site.family == GEOMETRIC else ops.like(site.named["total_count"], p)[..., None]
    info = ops.finfo(p.dtype)
    inner = ops.clip(p, float(info.tiny), 1 - float(info.eps) / 2)
    log_p, log_q = ops.log(inner), ops.log1p(-inner)
    if site.family == GEOMETRIC:
        return ops.exp(c * log_q + log_p)
    left = ops.where(c <= n, n - c, ops.zeros_like(c))
    log_choose = ops.lgamma(n + 1) - ops.lgamma(c + 1) - ops.lgamma(left + 1)
    return ops.where(c <= n, ops.exp(log_choose + c * log_p + left * log_q), ops.zeros_like(c))


def _score(ops: Ops, site: Site, c: Array, trailing: bool = False) -> Array:
    """d log q(c) / d natural parameter (log rate, logit)."""

    def named(key: str) -> Array:
        return site.named[key][..., None] if trailing else site.named[key]

    if site.family == POISSON:
        return c - named("rate")
    if site.family == GEOMETRIC:
        return 1 - named("probs") * (c + 1)
    return c - named("total_count") * named("probs")
