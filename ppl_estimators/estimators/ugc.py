"""DisARM with its variance clipped near 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import BERNOULLI, possible, threshold


@dataclass(frozen=True, eq=False, repr=False)
class UGC(Estimator):
    """Unbiased gradient variance clipping: bitflip-1 for elements near 0 or 1, DisARM for the others.

    Approximates  ∇_a E_{b ~ Bernoulli(σ(a))}[f(b)]
    With          for i in S:  |S| 1[i chosen from S] p_i q_i (f(b_{i:=1}) − f(b_{i:=0})),
                  else:        ½ (f(b) − f(b̃)) (−1)^{b̃_i} 1[b_i ≠ b̃_i] σ(|a_i|),
                  S = {i : min(p_i, q_i) < 1 / (2D)},   p = σ(a), q = 1 − p
    Requires      Bernoulli sites; nothing of f. Three evaluations for any number D of dependent elements. Unbiased.
    For           some elements nearly decided, others not
    Not for       broad posteriors: DisARM() needs one evaluation less

    If no change of f exceeds δ in size, the second moment of bitflip-1 is at most D p² q² δ² and that of DisARM at
    most ½ max(p, q)² min(p, q) δ²: they cross at min(p, q) = 1 / (2D). The choice looks at the logits only, so it
    biases nothing. Prefer it to DisARM() where elements are nearly decided; with broad posteriors, or with many
    elements, S is empty and the third evaluation is wasted. Chains of sites share no evaluations.

    The paper draws the flipped element from all D; here it is drawn from S, which lowers the variance.

    >>> UGC()
    UGC()

    Reference: Kunes, Yin, Land, Haviv, Pe'er & Tavaré (2022), "Gradient Estimation for Binary Latent Variables via
    Gradient Variance Clipping", arXiv:2208.06124.
    """

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI,)

    def alternatives(self, site: Site) -> Moves:
        return Moves(2)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = (*site.batch_shape, *site.event_shape)
        return {"u": Noise("uniform", shape), "v": Noise("uniform", shape)}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b = threshold(ops, BERNOULLI, site.logits, noise["u"])
        b_tilde = threshold(ops, BERNOULLI, site.logits, 1 - noise["u"])
        return Draw(b, {"b_tilde": b_tilde, "v": noise["v"]})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Number 0 is b̃, number 1 is b with one element of S flipped."""
        flipped = ops.where(self._chosen(ops, site, draw), 1 - draw.value, draw.value)
        return ops.stack([draw.extra["b_tilde"], flipped], axis=-1)[..., index]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a, b, b_tilde = site.logits, draw.value, draw.extra["b_tilde"]
        zero = ops.zeros_like(a)
        sign = 1 - 2 * b  # (−1)^{b̃} where b ≠ b̃ is −sign
        pair = site.spread(ops, costs.value - costs.alternatives[0])
        disarm = -0.5 * pair * ops.where(b != b_tilde, sign, zero) * ops.sigmoid(ops.abs(a))
        flip = site.spread(ops, costs.alternatives[1] - costs.value)
        small = self._small(ops, site)
        size = site.spread(ops, ops.sum(site.features(ops, ops.like(small, a)), axis=-1))  # |S|
        weight = ops.sigmoid(a) * ops.sigmoid(-a)
        bitflip = size * sign * possible(ops, weight, weight * flip)
        bitflip = ops.where(self._chosen(ops, site, draw), bitflip, zero)
        return Local(ops.stop_gradient(ops.where(small, bitflip, disarm)) * a)

    @staticmethod
    def _small(ops: Ops, site: Site) -> Array:
        """The set S, in the shape of the value."""
        return ops.sigmoid(-ops.abs(site.logits)) < 0.5 / site.lanes

    def _chosen(self, ops: Ops, site: Site, draw: Draw) -> Array:
        """Is an element the one to flip? Outside S only where S is empty: then no gradient asks."""
        v = ops.where(self._small(ops, site), draw.extra["v"], -ops.ones_like(draw.extra["v"]))
        lane = ops.argmax(site.features(ops, v), axis=-1)  # [*lead, *plates]
        return lanes.numbers(ops, site, lane) == site.spread(ops, lane)
