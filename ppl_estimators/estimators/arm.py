"""Augment-REINFORCE-merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Kept, Local, Noise, Ops, Site
from ..core.families import BERNOULLI, threshold


@dataclass(frozen=True, eq=False, repr=False)
class ARM(Estimator):
    """Augment-REINFORCE-merge for Bernoulli sites.

    Approximates  ∇_a E_{b ~ Bernoulli(σ(a))}[f(b)]
    With          (f(b) − f(b̃)) (u − ½),   b = 1[u > σ(−a)], b̃ = 1[1 − u > σ(−a)]
    Requires      Bernoulli sites; nothing of f. Two evaluations. Unbiased.
    Not advised   for comparison; DisARM() is never noisier

    Not recommended: DisARM() evaluates the same two values and averages over what of u they do not show, so its
    variance is never higher. ARM is here to compare with.

    >>> ARM()
    ARM()

    Reference: Yin & Zhou (2019), "ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks",
    arXiv:1807.11143.
    """

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI,)

    def alternatives(self, site: Site) -> Draws:
        return Draws(1)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", (*site.batch_shape, *site.event_shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b = threshold(ops, BERNOULLI, site.logits, noise["u"])
        b_tilde = threshold(ops, BERNOULLI, site.logits, 1 - noise["u"])
        return Draw(b, {"u": noise["u"], "b_tilde": b_tilde})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return draw.extra["b_tilde"]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        difference = site.spread(ops, costs.value - costs.alternatives[0])
        gradient = difference * (draw.extra["u"] - 0.5)
        return Local(ops.stop_gradient(gradient) * site.logits)
