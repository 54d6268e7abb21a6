"""From downstream costs to one scalar whose value is −ELBO and whose gradient is the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .estimator import Estimator
from .keep import Kept
from .objectives import Locally
from .ops import Array, Ops
from .site import Costs, Draw, Site


@dataclass
class Evaluated:
    """One site after its particles have run; every array carries the particle axis first."""

    site: Site
    draw: Draw
    costs: Costs


def assemble(
    ops: Ops,
    objective: Array,
    local: Locally,
    estimators: Mapping[str, Estimator],
    evaluated: Mapping[str, Evaluated],
    kept: Mapping[str, Kept],
    particles: int,
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """The loss, and the new state of every site that keeps some; ``local`` is the objective's.

    loss = −objective − Σ_i (s_i − stop(s_i)) + Σ_i (aux_i − stop(aux_i)),   s_i, aux_i averaged over particles
    """
    surrogates, auxiliaries = [], []
    states: dict[str, dict[str, Array]] = {}
    for name, e in evaluated.items():
        found = local(estimators[name], e.site, e.draw, e.costs, kept.get(name) or Kept())
        surrogates.append(found.surrogate)
        if found.auxiliary is not None:
            auxiliaries.append(found.auxiliary)
        if found.state:
            states[name] = dict(found.state)
    if not surrogates:
        return -objective, states
    rider = -ops.total(surrogates)
    if auxiliaries:
        rider = rider + ops.total(auxiliaries)
    return ops.riding(-objective, rider / particles), states
