"""What is maximised: the ELBO, or a multi-sample bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .errors import EstimatorError, site_error
from .estimator import Control, Estimator, Value
from .ops import Array, Ops
from .site import Plate, Site, Term, sum_to
from .spec import Spec


class Objective(Spec):
    """``collect`` runs once per particle, ``combine`` once over all of them (axis 0)."""

    #: can sites be evaluated at counterfactual values?
    counterfactual: ClassVar[bool] = True
    #: does -log q of a score site keep its own gradient?
    keeps_score: ClassVar[bool] = False

    def check(self, site: Site, estimator: Estimator, particles: int) -> None:
        """Raise `EstimatorError` where objective and estimator do not go together."""

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        raise NotImplementedError

    def scale(self, terms: Sequence[Term]) -> float:
        """What multiplies the objective: the N/B of subsampled plates, where it cannot stay inside the terms."""
        return 1.0

    def combine(self, ops: Ops, collected: Array, scale: float) -> tuple[Array, Array | None]:
        """The objective (a scalar whose gradient is the explicit part), and, unless every site keeps its own
        downstream cost, the signal ``[K, ...]`` that replaces it."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class EvidenceLowerBound(Objective):
    """E_q[log p(x, z) − log q(z)], averaged over particles. The default.

    >>> EvidenceLowerBound()
    EvidenceLowerBound()
    """

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        return total(ops, terms)

    def combine(self, ops: Ops, collected: Array, scale: float) -> tuple[Array, Array | None]:
        return ops.mean(collected), None


class MultiSample(Objective):
    """A bound of K particles, (1 − α)⁻¹ log (1/K) Σ_k w_k^{1−α}, w_k = p(x, z_k) / q(z_k), with α = ``alpha``."""

    alpha: float

    counterfactual: ClassVar[bool] = False
    keeps_score: ClassVar[bool] = True

    def check(self, site: Site, estimator: Estimator, particles: int) -> None:
        name = type(self).__name__
        if particles < 2:
            raise site_error(
                site.name, f"{name} is a bound of several particles, got num_particles={particles}", "Pass 2 or more."
            )
        in_full = estimator.unbiased and estimator.value in (Value.LIBRARY, Value.OWN)  # of any cost, -log q included
        if in_full or estimator.control is Control.OTHERS:  # whose cost a signal may replace
            return
        raise site_error(
            site.name,
            f"{estimator!r} estimates the gradient of the ELBO, not of {name}",
            "Use Pathwise() for reparameterisable sites and Reinforce(LeaveOneOut()) for the others.",
        )

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        """log w per element of the plates that hold every term, ``[*plates]``, without their N/B."""
        common = _common(terms)
        ndim = max((-p.dim for p in common), default=0)
        log_w = sum_to(ops, terms[0].value, common, ndim)
        for term in terms[1:]:
            log_w = log_w + sum_to(ops, term.value, common, ndim)
        return log_w / self.scale(terms)

    def scale(self, terms: Sequence[Term]) -> float:
        common = _common(terms)
        for plate in frozenset().union(*(t.plates for t in terms)) - common:
            if plate.scale != 1:
                raise EstimatorError(
                    f"plate '{plate.name}': {type(self).__name__} needs a subsampled plate to hold every site, and "
                    "this one does not. Move the other sites inside, or use the ELBO."
                )
        return math.prod(p.scale for p in common)

    def combine(self, ops: Ops, collected: Array, scale: float) -> tuple[Array, Array | None]:
        k, order = collected.shape[0], 1 - self.alpha
        scaled = order * collected
        log_total = ops.logsumexp(scaled, axis=0)
        bound = (log_total - math.log(k)) / order
        weight = ops.stop_gradient(ops.exp(scaled - log_total))
        # of a particle without weight (a draw that the model has no probability for) nothing counts
        explicit = ops.sum(weight * ops.where(weight > 0, collected, ops.zeros_like(collected)))
        value = ops.sum(bound)
        others = (_of_the_others(ops, ops.stop_gradient(scaled)) - math.log(k - 1)) / order
        signal = k * scale * ops.stop_gradient(bound - others)  # the assembly averages over particles
        return scale * (ops.stop_gradient(value - explicit) + explicit), signal


@dataclass(frozen=True, eq=False, repr=False)
class Renyi(MultiSample):
    """The Rényi bound of finite K: (1 − α)⁻¹ log (1/K) Σ_k w_k^{1−α}, w_k = p(x, z_k) / q(z_k).

    Score sites get the exact gradient of the finite-K bound, Σ_k (L − L_{−k}) ∇ log q(z_k) with L_{−k} the bound of
    the other particles (the arithmetic form of VIMCO), beside Σ_k w̃_k ∇ log w_k. Sites are Pathwise() or
    Reinforce(LeaveOneOut()); needs at least two particles. Plates that hold every site get a bound per element.

    >>> Renyi(0.5)
    Renyi(0.5)

    Reference: Li & Turner (2016), arXiv:1602.02311; Mnih & Rezende (2016), "VIMCO", arXiv:1602.06725.
    """

    alpha: float

    def __post_init__(self) -> None:
        if self.alpha == 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"Renyi(alpha) needs a finite alpha other than 1, got {self.alpha!r}; 1 is the ELBO, the default."
            )


@dataclass(frozen=True, eq=False, repr=False)
class ImportanceWeighted(MultiSample):
    """The importance-weighted bound log (1/K) Σ_k w_k of the ``num_particles`` particles (IWAE, VIMCO).

    >>> ImportanceWeighted()
    ImportanceWeighted()

    Reference: Burda, Grosse & Salakhutdinov (2016), arXiv:1509.00519; Mnih & Rezende (2016), arXiv:1602.06725.
    """

    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.alpha != 0:
            raise ValueError("ImportanceWeighted has alpha = 0; use Renyi(alpha) for another.")


def _common(terms: Sequence[Term]) -> frozenset[Plate]:
    return frozenset.intersection(*(t.plates for t in terms))


def _of_the_others(ops: Ops, x: Array) -> Array:
    """log Σ_{j ≠ k} exp x_j for ``x [K, ...]``: of those before k and those after it. x_k is never subtracted, it may
    be all there is."""
    nothing = ops.full_like(x[:1], -math.inf)

    def before(x: Array) -> Array:
        return ops.concat([nothing, ops.cumulative_logsumexp(x)[:-1]], axis=0)

    return ops.logaddexp(before(x), ops.flip(before(ops.flip(x, axis=0)), axis=0))


def total(ops: Ops, terms: Sequence[Term]) -> Array:
    """Every term summed over all its elements."""
    return ops.sum(ops.stack([ops.sum(t.value) if t.value.ndim else t.value for t in terms]))
