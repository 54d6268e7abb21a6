"""Several estimators of one site, weighted by what the past says of their variances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.errors import site_error
from ..core.estimator import Array, Costs, Draw, Estimator, Local, Ops, Site
from ..core.families import DISCRETE, log_prob
from ..core.keep import Initial, Keeps, Kept, guarded
from .several import Mixture

_MOMENTS = "moments"


@dataclass(frozen=True, eq=False, repr=False)
class Combine(Mixture):
    """Estimators of one site with weights, fitted to past steps, that minimise the variance.

    Approximates  ∇_a E_{z ~ q_a}[f(z)]
    With          Σ_j w_j g_j,   w = M⁻¹1 / 1ᵀM⁻¹1,   M_jk a running mean of g_j·g_k over past steps
    Requires      Bernoulli, Categorical or OneHotCategorical sites; what its parts require. The evaluations of all
                  parts. Unbiased if they are: the weights add up to one, and know only the past.
    For           parts whose errors differ
    Not for       a good part beside a noisy one: take the good one

    g_j is the estimate in the site's logits. Because all parts have the same mean, the weights that minimise the
    second moment minimise the variance. Weights may be negative. The first step takes the plain mean; ``decay`` is the
    weight of the past. Worth it only if the parts' errors differ: a good part beside a noisy one costs the evaluations
    of both and gains little.

    >>> from ppl_estimators import DisARM, Reinforce
    >>> Combine((DisARM(), Reinforce()), decay=0.95)
    Combine((DisARM(), Reinforce()), decay=0.95)

    Reference: Geffner & Domke (2018), "Using Large Ensembles of Control Variates for Variational Inference",
    arXiv:1810.12482.
    """

    estimators: tuple[Estimator, ...]
    decay: float = field(default=0.99, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"Combine(decay=...) needs 0 <= decay < 1, got {self.decay!r}.")

    def check(self, site: Site, particles: int) -> None:
        super().check(site, particles)
        if site.family not in DISCRETE:
            raise site_error(
                site.name,
                f"Combine weighs gradients in the logits of a discrete site, got {site.distribution}",
                "Use Average(...), or Reinforce(LeaveOneOut()) with num_particles=2 or more.",
            )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        moments = Initial((len(self.parts), len(self.parts)))
        return super().keeps(site, given) | Keeps(state={_MOMENTS: moments})

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        auxiliary, state = self.trained(ops, self.part_locals(ops, site, draw, costs, kept))
        gradients = [self._gradient(ops, site, draw, costs, kept, j) for j in range(len(self.parts))]
        old = kept.state[_MOMENTS]
        weights = _weights(ops, old)
        gradient = sum(ops.like(weights[j], g) * g for j, g in enumerate(gradients))
        now = ops.stack([ops.stack([ops.sum(x * y) for y in gradients]) for x in gradients])
        # Past and present decay alike, so the scale of the moments, which the weights don't see, needs no correction.
        new = guarded(ops, {_MOMENTS: old}, {_MOMENTS: self.decay * old + (1 - self.decay) * ops.like(now, old)})
        return Local(ops.stop_gradient(gradient) * site.logits, auxiliary, {**state, **new})

    def _gradient(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept, j: int) -> Array:
        """Part j's estimate in the site's logits, and in their shape."""
        part, mine = self.parts[j], self.part_draw(draw, j)
        cost, own = self.part_costs(site, costs)[j], self.part_kept(kept, j)

        def surrogate(a: Array) -> Array:
            def log_q(value: Array) -> Array:
                return site.sum_event(ops, log_prob(ops, site.family, a, value))

            at = site.filled(logits=a, named={"logits": a}, log_q=log_q(mine.value))
            scores = {label: log_q(v) for label, v in part.scored(mine).items()}
            return ops.sum(part.local(ops, at, Draw(mine.value, {**mine.extra, **scores}), cost, own).surrogate)

        a = ops.stop_gradient(site.logits)
        return ops.stop_gradient(ops.vjp(surrogate, a, ops.ones_like(ops.sum(a))))


def _weights(ops: Ops, moments: Array) -> Array:
    """M⁻¹1 / 1ᵀM⁻¹1; before any past, and where M says nothing, equal weights."""
    n = moments.shape[0]
    scale = ops.sum(ops.linalg.diagonal(moments)) / n
    eye = ops.like([[float(i == j) for j in range(n)] for i in range(n)], moments)
    known = scale > 0
    relative = moments / ops.where(known, scale, ops.ones_like(scale))
    solved = ops.solve(relative + 1e-4 * eye, ops.ones_like(moments[:, :1]))[:, 0]
    return ops.where(known, solved / ops.sum(solved), ops.ones_like(solved) / n)
