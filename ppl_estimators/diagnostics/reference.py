"""What the bias of an estimator is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import EstimatorError
from ..core.families import DISCRETE
from ..estimators.baselines.leave_one_out import LeaveOneOut
from ..estimators.reinforce import Reinforce
from ..testing.exact import exact_gradient
from .candidates import Candidate, Program
from .library import bar
from .measured import Measured
from .moments import Moments

#: unbiased whatever the model, with two particles or more
UNBIASED = Reinforce(LeaveOneOut())
#: draws of the reference, for one of each candidate's
LONGER = 10


class Reference(NamedTuple):
    """In words, the gradient by name, its standard errors (None: exact)."""

    what: str
    gradient: Mapping[str, Any] | None
    error: Mapping[str, Any] | None = None

    @property
    def norm(self) -> float | None:
        if self.gradient is None:
            return None
        return float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in self.gradient.values())))


def reference_for(
    program: Program, plan: Any, reference: Any, max_states: int, num_draws: int, show: bool | None
) -> Reference:
    """See `compare`. Quadrature of a continuous site differentiates the model in it, so by itself it is not trusted:
    where the model jumps it would share the bias of a pathwise gradient. Score functions would not."""
    p = program
    if isinstance(reference, Mapping):
        return Reference("given", {n: np.asarray(v) for n, v in reference.items()})
    if reference == "none":
        return Reference("none", None)
    if reference not in ("auto", "exact", "long"):
        raise EstimatorError(
            f'compare(reference=...) takes "auto", "exact", "long", "none" or a gradient, got {reference!r}.'
        )
    discrete = all(site.family in DISCRETE for site in plan.sites.values())
    if reference == "exact" or (reference == "auto" and discrete):
        try:
            exact = exact_gradient(
                p.model, p.guide, *p.args, params=p.params, max_states=max_states, backend=p.library, **p.kwargs
            )
            return Reference(f"exact, {exact.states:,} states", exact.gradient)
        except EstimatorError:
            if reference == "exact":
                raise
    elbo = p.library.adapter.EstimatorELBO(UNBIASED, num_particles=4)
    long = Measured(program, Candidate("score functions", elbo, p.guide), num_draws)
    with bar("reference", LONGER * num_draws, show) as advance:
        long.draw(LONGER * num_draws, advance, offset=num_draws)  # none that a candidate sees
    m = long.moments
    errors = {n: np.sqrt(m.variance(n) / m.count) for n in m.mean}
    return Reference(f"{m.count:,} draws of score functions with four particles", m.mean, errors)


def judge(m: Moments, reference: Reference) -> tuple[float, float, bool]:
    """‖mean − reference‖, the same if there were no bias, and whether the first is too large for that.

    With d_j ~ N(0, s_j²), Σ d_j² has mean Σ s_j² and variance 2 Σ s_j⁴ (entries taken as independent; five of its
    standard deviations and the 25 of a single entry are allowed).
    """
    away, noise, known = [], [], reference.gradient or {}
    for name in m.mean:
        if name not in known:
            raise EstimatorError(f"reference: no gradient of '{name}'. It has {', '.join(known) or 'none'}.")
        away.append(np.ravel(m.mean[name] - known[name]))
        error = 0.0 if reference.error is None else np.asarray(reference.error[name])
        noise.append(np.ravel(m.variance(name) / m.count + error**2))
    d, s = np.concatenate(away), np.concatenate(noise)
    rounding = 1e-10 * ((reference.norm or 0.0) ** 2 + 1e-6)  # single precision
    limit = float(s.sum()) + 5 * float(np.sqrt(2 * (s**2).sum())) + 17 * float(s.max()) + rounding
    square = float((d**2).sum())
    return float(np.sqrt(square)), float(np.sqrt(s.sum())), square > limit
