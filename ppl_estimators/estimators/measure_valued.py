"""Measure-valued derivatives: a derivative of a law is a difference of two laws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import BERNOULLI, DISCRETE, EXPONENTIAL, GAMMA, NORMAL, POISSON, category, probabilities


@dataclass(frozen=True, eq=False, repr=False)
class MeasureValued(Estimator):
    """Weak derivatives, coupled: for each parameter of each element the difference of two costs.

    Approximates  ∂_θ E_{z ~ q_θ}[f(z)]
    With          c (f(z⁺) − f(z⁻)),   z⁺ and z⁻ drawn from the two parts of ∂_θ q_θ, coupled:
                  Bernoulli p    c = 1,          1 and 0
                  Categorical φₖ c = pₖ,         k and z
                  Poisson λ      c = 1,          z + 1 and z
                  Exponential λ  c = 1/λ,        z and z + e,         e ~ Exponential(λ)
                  Gamma rate β   c = α/β,        z and z + e,         e ~ Exponential(β)
                  Normal μ       c = 1/(σ√2π),   μ + σw and μ − σw,   w ~ Rayleigh(1)
                  Normal σ       c = 1/σ,        μ + σm and z = μ + σum,   m ~ double-sided Maxwell, u uniform
    Requires      one of these sites; nothing of f. 1 + A·D evaluations for D dependent elements: A = 1, for C
                  categories C − 1, for a Normal 3. Unbiased.
    For           few parameters, a cost without a useful slope
    Not for       many elements, each of which costs evaluations

    For few parameters and a cost that has no useful derivative: often less noisy than pathwise where f has kinks. The
    concentration of a Gamma has no coupled pair; its gradient is the plain score function's. For Bernoulli sites it is
    Enumerate(), for Categorical sites noisier than that at the same cost.

    >>> MeasureValued()
    MeasureValued()

    Reference: Heidergott & Vázquez-Abad (2000), "Measure-valued differentiation for stochastic processes"
    [heidergott2000measure]; Mohamed,
    Rosca, Figurnov & Mnih (2020), "Monte Carlo Gradient Estimation in Machine Learning", arXiv:1906.10652.
    """

    families: ClassVar[tuple[str, ...] | None] = (*DISCRETE, POISSON, EXPONENTIAL, GAMMA, NORMAL)

    @staticmethod
    def _per_lane(site: Site) -> int:
        return site.categories - 1 if site.family in DISCRETE else 3 if site.family == NORMAL else 1

    def alternatives(self, site: Site) -> Moves:
        return Moves(site.lanes * self._per_lane(site))

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = (*site.batch_shape, *site.event_shape)
        if site.family == NORMAL:
            uniforms = {k: Noise("uniform", shape) for k in ("u", "sign", "w")}
            return {**uniforms, "m": Noise("normal", (*shape, 3))}
        value = {"value": Noise("value")}
        return value | ({"e": Noise("uniform", shape)} if site.family in (EXPONENTIAL, GAMMA) else {})

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        if site.family != NORMAL:
            return Draw(noise["value"], {"e": -ops.log(noise["e"]) / site.named["rate"]} if "e" in noise else {})
        loc, scale = site.named["loc"], site.named["scale"]
        maxwell = ops.sum(noise["m"] ** 2, axis=-1) ** 0.5
        maxwell = ops.where(noise["sign"] < 0.5, -maxwell, maxwell)
        rayleigh = (-2 * ops.log(noise["w"])) ** 0.5
        others = {"0": loc + scale * rayleigh, "1": loc - scale * rayleigh, "2": loc + scale * maxwell}
        return Draw(loc + scale * noise["u"] * maxwell, others)

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        if site.family in DISCRETE:
            return lanes.shifted(ops, site, draw.value, index)
        x, count = draw.value, self._per_lane(site)
        here = lanes.numbers(ops, site, x) == index // count
        which = ops.indices(1, x)[0] + index % count  # on the device of the values
        if site.family == POISSON:
            return ops.where(here, x + 1, x)
        if site.family == NORMAL:
            picked = ops.stack([ops.where(which == i, draw.extra[str(i)], 0 * x) for i in range(3)])
            return ops.where(here, ops.sum(picked, axis=0), x)
        return ops.where(here, x + draw.extra["e"], x)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        f = site.spread(ops, costs.value)
        other = ops.stop_gradient(lanes.by_lane(ops, site, costs.alternatives))  # [K, *batch, *event, values]
        if site.family in DISCRETE:
            return Local(self._discrete(ops, site, draw, f, other))
        f = ops.stop_gradient(f)
        constant = {k: ops.stop_gradient(x) for k, x in site.named.items()}
        if site.family == NORMAL:
            scale = constant["scale"]
            of_loc = (other[..., 0] - other[..., 1]) / (scale * math.sqrt(2 * math.pi))
            of_scale = (other[..., 2] - f) / scale
            return Local(of_loc * site.named["loc"] + of_scale * site.named["scale"])
        if site.family == POISSON:
            return Local((other[..., 0] - f) * site.named["rate"])
        shape = constant.get("concentration", 1)
        surrogate = (f - other[..., 0]) * shape / constant["rate"] * site.named["rate"]
        if site.family == GAMMA:
            a = site.named["concentration"]
            score = ops.log(constant["rate"] * draw.value) - ops.digamma(constant["concentration"])
            surrogate = surrogate + f * ops.stop_gradient(score) * a
        return Local(surrogate)

    @staticmethod
    def _discrete(ops: Ops, site: Site, draw: Draw, f: Array, other: Array) -> Array:
        p = probabilities(ops, site.family, site.logits)
        if site.family == BERNOULLI:
            gradient = p * (1 - p) * (1 - 2 * draw.value) * (other[..., 0] - f)
        else:  # p_k (f(k) − f(z)); the shift from z to k is (k − z) mod C
            index = category(ops, site.family, draw.value)
            change = ops.concat([ops.zeros_like(other[..., :1]), other - f[..., None]], axis=-1)
            shift = (ops.indices(site.categories, index) - index[..., None]) % site.categories
            gradient = p * ops.take_last(ops.broadcast_to(change, p.shape), shift)
        return ops.stop_gradient(gradient) * site.logits
