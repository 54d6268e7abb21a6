"""One estimator with two mirrored draws at a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import site_error
from ..core.estimator import Array, Draw, Draws, Estimator, Noise, Ops, Site
from ..core.families import DISCRETE, threshold
from .several import Repeated, joined


@dataclass(frozen=True, eq=False, repr=False)
class Antithetic(Repeated):
    """A pair of draws from mirrored noise, u and 1 − u, for an estimator that sees one draw.

    Approximates  ∇_a E_{z ~ q_a}[f(z)]
    With          ½ g(z(u)) + ½ g(z(1 − u)),   z(u) ~ q_a for uniform u
    Requires      Bernoulli, Categorical or OneHotCategorical sites; what ``estimator`` requires, which must not compare
                  draws (their independence is gone). Twice its evaluations. Unbiased if it is.
    For           estimates that are monotone in the noise
    Not for       Bernoulli sites: DisARM()

    The pair is less noisy than two independent draws where the estimate is monotone in the noise, and noisier where
    it is symmetric in it. For Bernoulli sites DisARM() needs no baseline; with a good one the pair can be quieter.

    >>> from ppl_estimators import MovingAverage, Reinforce
    >>> Antithetic(Reinforce(MovingAverage()))
    Antithetic(Reinforce(MovingAverage()))

    Reference: Wu, Goodman & Ermon (2019), "Differentiable Antithetic Sampling for Variance Reduction in Stochastic
    Variational Inference", arXiv:1810.02555.
    """

    estimator: Estimator

    n: ClassVar[int] = 2  # type: ignore[misc]

    @property
    def families(self) -> tuple[str, ...]:  # type: ignore[override]
        known = super().families
        return DISCRETE if known is None else tuple(f for f in DISCRETE if f in known)

    def check(self, site: Site, particles: int) -> None:
        if self.compares:
            raise site_error(
                site.name,
                f"{self.estimator!r} takes the mirrored draw for an independent one, which is biased",
                f"Use MovingAverage() inside Antithetic, or Repeat(2, {self.estimator!r}).",
            )
        Estimator.check(self, site, particles)
        if self.estimator.alternatives(site) == Draws(1):
            raise site_error(
                site.name,
                f"{self.estimator!r} compares draws that are mirrored already: the second estimate would be the first",
                f"Use {self.estimator!r} alone, or Repeat(2, {self.estimator!r}).",
            )
        self.check_parts(site, particles)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        shape = tuple(site.logits.shape)
        declared = self.estimator.noise(site)
        return {k: Noise("uniform", shape) if n.law == "value" else n for k, n in declared.items()}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        laws = {k: n.law for k, n in self.estimator.noise(site).items()}

        def one(mirrored: bool) -> Draw:
            seen = {}
            for k, x in noise.items():
                x = x if not mirrored else -x if laws[k] == "normal" else _mirrored(ops, x)
                seen[k] = threshold(ops, site.family, site.logits, x) if laws[k] == "value" else x
            return self.estimator.draw(ops, site, seen)

        return joined([one(False), one(True)])


def _mirrored(ops: Ops, u: Array) -> Array:
    """1 − u, strictly inside (0, 1): rounding would make it 1 for the smallest u."""
    return ops.clip(1 - u, 0.0, 1 - float(ops.finfo(u.dtype).eps) / 2)
