"""From downstream costs to one scalar whose value is −ELBO and whose gradient is the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .estimator import Estimator
from .keep import Kept
from .ops import Array, Ops
from .site import Costs, Draw, Local, Site


@dataclass(frozen=True)
class Evaluated:
    """One site after its particles have run; every array carries the particle axis first."""

    site: Site
    draw: Draw
    costs: Costs


def assemble(
    ops: Ops,
    objective: Array,
    signal: Array | None,
    estimators: Mapping[str, Estimator],
    evaluated: Mapping[str, Evaluated],
    kept: Mapping[str, Kept],
    particles: int,
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """The loss, and the new state of every site that keeps some. A ``signal [K, ...]`` of the objective replaces the
    downstream cost of every score function; it holds its own control.

    loss = −objective − Σ_i (s_i − stop(s_i)) + Σ_i (aux_i − stop(aux_i)),   s_i, aux_i averaged over particles
    """
    riders = []
    states: dict[str, dict[str, Array]] = {}
    for name, e in evaluated.items():
        if signal is None or estimators[name].value.moves:
            local = estimators[name].local(ops, e.site, e.draw, e.costs, kept.get(name, Kept()))
        else:
            k, *plates = signal.shape
            missing = e.costs.value.ndim - signal.ndim
            local = Local(ops.reshape(signal, (k, *(1,) * missing, *plates)) * e.site.log_q)
        riders.append(-ops.sum(local.surrogate))
        if local.auxiliary is not None:
            riders.append(ops.sum(local.auxiliary))
        if local.state:
            states[name] = dict(local.state)
    if not riders:
        return -objective, states
    rider = ops.sum(ops.stack(riders)) / particles
    zero = rider - ops.stop_gradient(rider)  # not a number if the rider is infinite; the loss then is, and says enough
    return -objective + ops.where(ops.isfinite(rider), zero, ops.zeros_like(zero)), states
