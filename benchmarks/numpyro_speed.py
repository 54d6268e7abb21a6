"""NumPyro: a 784-200-784 sigmoid belief network, against the same estimators hand-written in plain JAX.

Step time is an update (loss, gradient and Adam) on a batch of 50: many in one compiled loop, as `SVI.run` does it, and
one jitted update called from Python. Compile time is tracing and compiling one update, caches emptied before each,
against NumPyro's own `TraceGraph_ELBO`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _harness import Report, Times, arguments, milliseconds, ratio, take_turns, verdict
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.optim import Adam
from rich.progress import track

from ppl_estimators import DisARM, Reinforce
from ppl_estimators.numpyro import EstimatorELBO

PIXELS, HIDDEN, BATCH = 784, 200, 50
LOOP = 20
Array = jax.Array


# ---- the network, as a NumPyro program -------------------------------------------------------------------------------


def weights() -> dict[str, Array]:
    w, v = jax.random.split(jax.random.key(0))
    return {
        "prior": jnp.zeros(HIDDEN),
        "decoder": 0.05 * jax.random.normal(w, (HIDDEN, PIXELS)),
        "decoder bias": jnp.zeros(PIXELS),
        "encoder": 0.05 * jax.random.normal(v, (PIXELS, HIDDEN)),
        "encoder bias": jnp.zeros(HIDDEN),
    }


def model(x: Array) -> None:
    p = {n: numpyro.param(n, v) for n, v in weights().items() if not n.startswith("encoder")}
    with numpyro.plate("batch", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=p["prior"]).to_event(1))
        logits = z @ p["decoder"] + p["decoder bias"]
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def guide(x: Array) -> None:
    p = {n: numpyro.param(n, v) for n, v in weights().items() if n.startswith("encoder")}
    with numpyro.plate("batch", len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=x @ p["encoder"] + p["encoder bias"]).to_event(1))


# ---- the same by hand ------------------------------------------------------------------------------------------------


def log_bernoulli(value: Array, logits: Array) -> Array:
    return jnp.sum(value * logits - jax.nn.softplus(logits), axis=-1)


def cost(p: dict[str, Array], x: Array, z: Array, a: Array) -> Array:
    """log p(x, z) - log q(z), for each image."""
    log_p = log_bernoulli(x, z @ p["decoder"] + p["decoder bias"]) + log_bernoulli(z, p["prior"])
    return log_p - jax.lax.stop_gradient(log_bernoulli(z, a))


def reinforce(p: dict[str, Array], key: Array, x: Array) -> Array:
    a = x @ p["encoder"] + p["encoder bias"]
    z = jax.random.bernoulli(key, jax.lax.stop_gradient(jax.nn.sigmoid(a))).astype(float)
    f = cost(p, x, z, a)
    surrogate = jnp.sum(jax.lax.stop_gradient(f) * log_bernoulli(z, a))
    return -(jnp.sum(f) + surrogate - jax.lax.stop_gradient(surrogate))


def disarm(p: dict[str, Array], key: Array, x: Array) -> Array:
    a = x @ p["encoder"] + p["encoder bias"]
    u = jax.random.uniform(key, a.shape)
    one = jax.lax.stop_gradient(jax.nn.sigmoid(-a))
    z, z_tilde = (u > one).astype(float), (1 - u > one).astype(float)
    f = cost(p, x, z, a)
    difference = f - cost(p, x, z_tilde, a)
    sign = jnp.where(z != z_tilde, 1 - 2 * z_tilde, 0.0)
    gradient = 0.5 * difference[:, None] * sign * jax.nn.sigmoid(jnp.abs(a))
    surrogate = jnp.sum(jax.lax.stop_gradient(gradient) * a)
    return -(jnp.sum(f) + surrogate - jax.lax.stop_gradient(surrogate))


# ---- the two measurements --------------------------------------------------------------------------------------------


Update = Callable[[Any], tuple[Any, Array]]


def by_hand(loss: Callable[..., Array], x: Array) -> tuple[Any, Update]:
    """The first state, and state to new state and loss."""
    optimiser = Adam(1e-3)

    def update(state: Any) -> tuple[Any, Array]:
        optimiser_state, key = state
        key, mine = jax.random.split(key)
        (value, _), optimiser_state = optimiser.eval_and_update(lambda p: (loss(p, mine, x), None), optimiser_state)
        return (optimiser_state, key), value

    return (optimiser.init(weights()), jax.random.key(1)), update


def by_svi(loss: Any, x: Array) -> tuple[Any, Update]:
    svi = SVI(model, guide, Adam(1e-3), loss)
    return svi.init(jax.random.key(1), x), lambda state: svi.update(state, x)


def called(state: Any, update: Update) -> Callable[[], object]:
    """One jitted update."""
    jitted = jax.jit(update)

    def step() -> None:
        nonlocal state
        state, value = jitted(state)
        value.block_until_ready()

    return step


def looped(state: Any, update: Update) -> Callable[[], object]:
    """`LOOP` updates in one compiled loop."""
    return called(state, lambda s: jax.lax.scan(lambda s, _: update(s), s, None, length=LOOP))


def compile_times(losses: dict[str, Any], x: Array, rounds: int) -> tuple[Times, Times]:
    """Seconds of tracing, and of tracing and compiling together."""
    tracing: Times = {n: [] for n in losses}
    total: Times = {n: [] for n in losses}
    for i in track(range(1 + rounds), "compile", transient=True):
        for name, loss in losses.items():
            svi = SVI(model, guide, Adam(1e-3), loss)
            state = svi.init(jax.random.key(1), x)
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(svi.update).lower(state, x)
            traced = time.perf_counter()
            lowered.compile()
            if i:  # the first round warms up
                tracing[name].append(traced - start)
                total[name].append(time.perf_counter() - start)
    return tracing, total


def main() -> None:
    options = arguments(__doc__, rounds=100, compile_rounds=7)
    warnings.simplefilter("ignore")
    x = (jax.random.uniform(jax.random.key(2), (BATCH, PIXELS)) < 0.3).astype(float)
    report = Report("numpyro_speed", f"NumPyro: {PIXELS}-{HIDDEN}-{PIXELS} sigmoid belief network, batch {BATCH}")

    losses = {
        "Reinforce()": EstimatorELBO({"z": Reinforce()}),
        "DisARM()": EstimatorELBO({"z": DisARM()}),
        "TraceGraph_ELBO": TraceGraph_ELBO(),
        "Trace_ELBO": Trace_ELBO(),
    }
    contestants = {n: by_svi(loss, x) for n, loss in losses.items()}
    contestants |= {"Reinforce() by hand": by_hand(reinforce, x), "DisARM() by hand": by_hand(disarm, x)}
    for title, run, rounds, per in (
        ("Step time in a compiled loop", looped, options.rounds // 3, LOOP),
        ("Step time of one jitted update, called from Python", called, options.rounds, 1),
    ):
        times = take_turns(title, {n: run(*c) for n, c in contestants.items()}, rounds, repeats=3)
        times = {n: [t / per for t in ts] for n, ts in times.items()}
        rows = []
        for name in ("Reinforce()", "DisARM()"):
            shown, value = ratio(times, name, f"{name} by hand")
            ours, hand = milliseconds(times, name), milliseconds(times, f"{name} by hand")
            rows.append((name, ours, hand, shown, verdict(value, 1.1)))
        for name in ("TraceGraph_ELBO", "Trace_ELBO"):
            rows.append((name, milliseconds(times, name), "", "", ""))
        report.table(title, ("loss", "ms", "by hand, ms", "ratio (quartiles)", "target"), rows)

    tracing, total = compile_times(losses, x, options.compile_rounds)
    rows = []
    for name in losses:
        shown, value = ratio(total, name, "TraceGraph_ELBO")
        ours = name in ("Reinforce()", "DisARM()")
        rows.append(
            (name, milliseconds(tracing, name), milliseconds(total, name), shown, verdict(value, 1.5) if ours else "")
        )
    report.table("Compile time", ("loss", "tracing, ms", "total, ms", "ratio to TraceGraph_ELBO", "target"), rows)
    report.write()


if __name__ == "__main__":
    main()
