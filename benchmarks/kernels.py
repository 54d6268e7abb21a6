"""NumPyro: kernels of one update of the network in `numpyro_speed.py`, against the same estimators hand-written.

Counted are the fusions and calls of the optimised program for the processor: what a GPU would launch, as far as it can
be told without one. Nothing is timed.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from _harness import Report, arguments, verdict
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from numpyro_speed import BATCH, HIDDEN, PIXELS, Update, by_hand, by_svi, cost, disarm, log_bernoulli, reinforce

from ppl_estimators import DisARM, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO

PARTICLES = 4
Array = jax.Array


def leave_one_out(p: dict[str, Array], key: Array, x: Array) -> Array:
    a = x @ p["encoder"] + p["encoder bias"]
    one = jax.lax.stop_gradient(jax.nn.sigmoid(a))
    z = jax.random.bernoulli(key, one, (PARTICLES, *a.shape)).astype(float)
    f = cost(p, x, z, a)
    held = jax.lax.stop_gradient(f)
    signal = (held - jnp.mean(held, axis=0)) * PARTICLES / (PARTICLES - 1)
    surrogate = jnp.sum(signal * log_bernoulli(z, a))
    return -(jnp.sum(f) + surrogate - jax.lax.stop_gradient(surrogate)) / PARTICLES


def kernels(state: Any, update: Update) -> int:
    program = jax.jit(update).lower(state).compile().as_text()
    return len(re.findall(r" (?:fusion|call|custom-call)\(", program))


def main() -> None:
    arguments(__doc__)
    warnings.simplefilter("ignore")
    x = (jax.random.uniform(jax.random.key(2), (BATCH, PIXELS)) < 0.3).astype(float)
    report = Report("kernels", f"NumPyro: kernels of one update, {PIXELS}-{HIDDEN}-{PIXELS} network, batch {BATCH}")
    shared = EstimatorELBO({"z": Reinforce(LeaveOneOut())}, num_particles=PARTICLES)
    rows = []
    for name, loss, hand in (
        ("Reinforce()", EstimatorELBO({"z": Reinforce()}), reinforce),
        ("DisARM()", EstimatorELBO({"z": DisARM()}), disarm),
        (f"Reinforce(LeaveOneOut()), {PARTICLES} particles", shared, leave_one_out),
    ):
        ours, theirs = kernels(*by_svi(loss, x)), kernels(*by_hand(hand, x))
        rows.append((name, f"{ours}", f"{theirs}", f"{ours / theirs:.2f}", verdict(ours / theirs, 1.1)))
    for loss in (TraceGraph_ELBO(), Trace_ELBO()):
        rows.append((type(loss).__name__, f"{kernels(*by_svi(loss, x))}", "", "", ""))
    report.table("Fusions and calls", ("loss", "kernels", "by hand", "ratio", "target"), rows)
    report.write()


if __name__ == "__main__":
    main()
