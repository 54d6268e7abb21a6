"""Importance sampling from an overdispersed proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import site_error
from ..core.estimator import Array, Costs, Draw, Estimator, Keeps, Kept, Local, Measure, Moves, Noise, Ops, Site
from ..core.families import BERNOULLI, CATEGORICAL, DISCRETE, GAMMA, NORMAL, ONEHOT, POISSON, log_prob, threshold
from ..core.particles import times
from .reinforce import Reinforce


@dataclass(frozen=True, eq=False, repr=False)
class ImportanceSampled(Estimator):
    """Score function with a second draw from an overdispersed proposal, both weighted by the balance heuristic.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          Σ_{z ∈ {z_q, z_r}} q(z) / (q(z) + r(z)) (f(z) − b) ∇_λ log q_λ(z),   z_q ~ q, z_r ~ r
                  r of the family of q, its natural parameter divided by τ:  Normal σ²τ;  Bernoulli and Categorical
                  logits/τ;  Poisson λ^(1/τ);  Gamma shape (α + τ − 1)/τ and rate β/τ
    Requires      one of these sites; nothing of f. Two evaluations. Unbiased, for every τ.
    For           single elements, or plates of them, with wide tails
    Not for       many dependent elements: the weights lose their edge

    The score is largest in the tails, where q seldom draws: a wider proposal sees them. The weights are at most 2, so
    they cannot explode (the paper mixes proposals for the same reason), but they lose their edge with the number of
    dependent elements: use it for single elements, or plates of them. ``estimator`` brings the baseline b, which
    must not compare particles; ``proposal`` is τ ≥ 1.

    >>> ImportanceSampled(Reinforce(), proposal=3.0)
    ImportanceSampled(Reinforce(), 3.0)

    Reference: Ruiz, Titsias & Blei (2016), "Overdispersed Black-Box Variational Inference", arXiv:1603.01140.
    """

    estimator: Reinforce
    proposal: float = 2.0

    families: ClassVar[tuple[str, ...] | None] = (*DISCRETE, POISSON, NORMAL, GAMMA)
    measures: ClassVar[frozenset[Measure]] = frozenset({Measure.LOG_Q})

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Reinforce):
            raise TypeError(f"ImportanceSampled(estimator) takes Reinforce(...), got {self.estimator!r}.")
        if not self.proposal >= 1:
            raise ValueError(f"ImportanceSampled(proposal=...) needs 1 or more, got {self.proposal!r}.")

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        self.estimator.check(site, particles)
        baseline = self.estimator.baseline
        if baseline is not None and baseline.from_particles:
            raise site_error(
                site.name,
                f"{baseline!r} takes draws from the proposal for draws from the site, which is biased",
                "Use MovingAverage() or Learned() inside ImportanceSampled.",
            )
        if Measure.SCORE_NORM in self.estimator.measures:
            raise site_error(
                site.name,
                f"ImportanceSampled has no score norm of the proposal's draw for {baseline!r}",
                "Use MovingAverage() or Learned() inside ImportanceSampled.",
            )

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.estimator.given(args, kwargs)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.estimator.keeps(site, given)

    def alternatives(self, site: Site) -> Moves:
        return Moves(1, self.weights)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = (*site.batch_shape, *site.event_shape)
        if site.family in DISCRETE:
            wide = Noise("uniform", tuple(site.logits.shape))
        elif site.family == NORMAL:
            wide = Noise("normal", shape)
        elif site.family == POISSON:
            wide = Noise("poisson", shape, self._wider(site)["rate"])
        else:
            wide = Noise("log gamma", shape, self._wider(site)["concentration"])
        return {"value": Noise("value"), "wide": wide}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        z, wide, r = noise["value"], noise["wide"], self._wider(site)
        if site.family in DISCRETE:
            other = threshold(ops, site.family, r["logits"], wide)
        elif site.family == NORMAL:
            other = r["loc"] + r["scale"] * wide
        elif site.family == GAMMA:
            other = ops.exp(wide) / r["rate"]
        else:
            other = wide
        return Draw(z, {"other": ops.astype(other, z.dtype)})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return draw.extra["other"]

    def scored(self, draw: Draw) -> dict[str, Array]:
        return {"log_q of other": draw.extra["other"]}

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        """q / (q + r) of either draw: together they see every value as often as q does."""
        ratios = [self._log_ratio(ops, site, x) for x in (draw.value, draw.extra["other"])]
        return ops.sigmoid(ops.stack(ratios, axis=0))

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        log_q = ops.concat([site.log_q, draw.extra["log_q of other"]], axis=0)
        both = times(ops, site, 2, costs.value, log_q)
        values = ops.concat([draw.value, draw.extra["other"]], axis=0)
        signal = ops.concat([costs.value, costs.alternatives[0]], axis=0)
        rest, auxiliary, state = self.estimator.subtract(ops, both, signal, kept)
        weight = ops.sigmoid(self._log_ratio(ops, both, values))  # q / (q + r)
        auxiliary = None if auxiliary is None else ops.sum(auxiliary) / 2
        return Local(ops.stop_gradient(weight) * rest * both.log_q, auxiliary, state)

    def _wider(self, site: Site) -> dict[str, Array]:
        """The parameters of r."""
        tau = self.proposal
        if site.family in DISCRETE:
            return {"logits": site.logits / tau}
        if site.family == NORMAL:
            return {"loc": site.named["loc"], "scale": site.named["scale"] * math.sqrt(tau)}
        if site.family == POISSON:
            return {"rate": site.named["rate"] ** (1 / tau)}
        return {"concentration": (site.named["concentration"] + tau - 1) / tau, "rate": site.named["rate"] / tau}

    def _log_ratio(self, ops: Ops, site: Site, x: Array) -> Array:
        """log q − log r at ``x``, summed over all that is drawn together: ``[*lead, *plates]``."""
        q, r = ({"logits": site.logits} if site.family in DISCRETE else dict(site.named)), self._wider(site)
        return site.sum_lanes(ops, _log_density(ops, site.family, q, x) - _log_density(ops, site.family, r, x))


def _log_density(ops: Ops, family: str, named: Mapping[str, Array], x: Array) -> Array:
    """Elementwise, up to what does not depend on the parameters."""
    if family in (BERNOULLI, CATEGORICAL, ONEHOT):
        return log_prob(ops, family, named["logits"], x)
    if family == NORMAL:
        return -0.5 * ((x - named["loc"]) / named["scale"]) ** 2 - ops.log(named["scale"])
    rate = named["rate"]
    if family == POISSON:
        return x * ops.log(rate) - rate
    a = named["concentration"]
    return a * ops.log(rate) - ops.lgamma(a) + (a - 1) * ops.log(x) - rate * x
