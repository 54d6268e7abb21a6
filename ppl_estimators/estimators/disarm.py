"""Antithetic augment-REINFORCE, Rao-Blackwellised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Kept, Local, Noise, Ops, Site
from ..core.families import BERNOULLI, threshold


@dataclass(frozen=True, eq=False, repr=False)
class DisARM(Estimator):
    """Antithetic augment-REINFORCE for Bernoulli sites (DisARM, also U2G).

    Approximates  ∇_a E_{b ~ Bernoulli(σ(a))}[f(b)]
    With          ½ (f(b) − f(b̃)) (−1)^{b̃} 1[b ≠ b̃] σ(|a|),   b = 1[u > σ(−a)], b̃ = 1[1 − u > σ(−a)]
    Requires      Bernoulli sites; nothing of f. Two evaluations. Unbiased.
    For           one particle, many bits; the default there
    Not for       several particles: LeaveOneOut() is cheaper

    Sites that do not depend on each other in the guide are flipped together: a mean-field guide costs one extra
    evaluation however many sites it has, a hierarchy costs its depth. For one element never noisier than
    leave-one-out with two particles. The default for many bits when there is one particle (a single one is
    Enumerate() at the same price); with several, LeaveOneOut() is cheaper.

    >>> DisARM()
    DisARM()

    Reference: Dong, Mnih & Tucker (2020), "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables",
    arXiv:2006.10680; Yin, Ho, Yan, Qian & Zhou (2020), "Probabilistic Best Subset Selection by Gradient-Based
    Optimization", arXiv:2006.06448.
    """

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI,)

    def alternatives(self, site: Site) -> Draws:
        return Draws(1)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", (*site.batch_shape, *site.event_shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b = threshold(ops, BERNOULLI, site.logits, noise["u"])
        b_tilde = threshold(ops, BERNOULLI, site.logits, 1 - noise["u"])
        return Draw(b, {"b_tilde": b_tilde})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return draw.extra["b_tilde"]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a, b, b_tilde = site.logits, draw.value, draw.extra["b_tilde"]
        difference = site.spread(ops, costs.value - costs.alternatives[0])
        sign = ops.where(b != b_tilde, 1 - 2 * b_tilde, ops.zeros_like(b))
        gradient = 0.5 * difference * sign * ops.sigmoid(ops.abs(a))
        return Local(ops.stop_gradient(gradient) * a)
