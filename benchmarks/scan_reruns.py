"""What other values at the steps of a scan cost, and what it would save to begin each re-run at its step (NumPyro).

A bit at each of T steps of a guide and a model that remember, recurrent networks of so many units, under `DisARM()`. By
hand: the same estimate in JAX, its re-runs of the whole scan as ours; and beginning where the first value of a chunk
moves, with the carry of the particle's own run: steps before that are a branch not taken, in one compiled body. CPU
times.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report, arguments, take_turns
from numpyro.contrib.control_flow import scan

from ppl_estimators import DisARM, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO

SHAPES = {"guide": (-1, -1), "data": (16, -1), "bit": (-1,), "model": (-1, -1), "before": (-1,), "place": (-1, 16)}


def start(units):
    rng = np.random.default_rng(0)
    shapes = {n: tuple(units if k < 0 else k for k in s) for n, s in SHAPES.items()}
    return {n: jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for n, s in shapes.items()}


def of_guide(p, h, z, x):
    return jnp.tanh(h @ p["guide"] + z * p["bit"] + x @ p["data"])


def of_model(p, h, z):
    return jnp.tanh(h @ p["model"] + z * p["before"])


def program(data, units):
    def model(p):
        def step(carry, x):
            h = of_model(p, *carry)
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=h @ p["before"]))
            numpyro.sample("x", dist.Normal((h + z) @ p["place"], 1.0).to_event(1), obs=x)
            return (h, z), None

        scan(step, (jnp.zeros(units), 0.0), data)

    def guide(p):
        def step(carry, x):
            h = of_guide(p, *carry, x)
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=h @ p["bit"]))
            return (h, z), None

        scan(step, (jnp.zeros(units), 0.0), data)

    return model, guide


def log_p(z, logits):
    return z * logits - jax.nn.softplus(logits)


def costs(p, h, z, x):
    return log_p(z, h @ p["before"]) - 0.5 * jnp.sum((x - (h + z[..., None]) @ p["place"]) ** 2, -1)


def by_hand(data, units, chunk, whole, params, key):
    """A loss whose gradient is the estimate; the pair of each step is evaluated ``chunk`` steps at a time."""
    steps, fixed, stop = len(data), jax.lax.stop_gradient(params), jax.lax.stop_gradient
    u, numbers, nothing = jax.random.uniform(key, (steps,)), jnp.arange(steps), (jnp.zeros(units), jnp.float32(0))

    def guide(carry, i):
        h = of_guide(params, *carry, data[i])
        logits = h @ params["bit"]
        z = stop(1.0 * (u[i] < jax.nn.sigmoid(logits)))
        return (h, z), (logits, z, carry)

    _, (logits, z, above) = jax.lax.scan(guide, nothing, numbers)
    _, (h, carried) = jax.lax.scan(lambda c, v: ((of_model(params, *c), v), (of_model(params, *c), c)), nothing, z)
    of_p, of_q, other = costs(params, h, z, data), log_p(z, logits), 1.0 * (1 - u < jax.nn.sigmoid(stop(logits)))
    above, carried = stop((above, carried))

    def elsewhere(first):
        lanes = first + jnp.arange(chunk)

        def from_there(step, unmoved, carries, xs):
            begin = jax.tree.map(lambda c: jnp.broadcast_to(c[0 if whole else first], (chunk, *c.shape[1:])), carries)
            if whole:
                return jax.lax.scan(step, begin, xs)[1]
            skip = lambda c, x: jax.lax.cond(x[0] < first, lambda c, x: (c, unmoved), step, c, x)  # noqa: E731
            return jax.lax.scan(skip, begin, xs)[1]

        def guide(carry, x):
            h = of_guide(fixed, carry[0], carry[1][:, None], data[x[0]])
            logits = h @ fixed["bit"]
            again = 1.0 * (u[x[0]] < jax.nn.sigmoid(logits))
            value = jnp.where(x[0] < lanes, stop(z)[x[0]], jnp.where(x[0] == lanes, other[x[0]], again))
            return (h, value), (logits, value)

        def model(carry, x):
            h = of_model(fixed, carry[0], carry[1][:, None])
            return (h, x[1]), h

        logits, value = from_there(guide, (jnp.zeros(chunk), jnp.zeros(chunk)), above, (numbers,))
        h = from_there(model, jnp.zeros((chunk, units)), carried, (numbers, value))
        each = costs(fixed, h, value, data[:, None]) - log_p(value, logits)
        return jnp.sum(jnp.where(numbers[:, None] >= lanes, each, 0.0), 0)

    begins = np.minimum(np.arange(0, steps, chunk), steps - chunk)
    found = jax.lax.map(elsewhere, jnp.asarray(begins)).ravel()
    rows = {t: i for i, t in enumerate((begins[:, None] + np.arange(chunk)).ravel())}
    here = jnp.cumsum(stop(of_p - of_q)[::-1])[::-1]
    moved = jnp.where(z != other, 1.0 - 2.0 * other, 0.0) * jax.nn.sigmoid(jnp.abs(stop(logits)))
    local = jnp.sum(0.5 * (here - found[np.array([rows[t] for t in range(steps)])]) * moved * logits)
    return -(jnp.sum(of_p - stop(of_q)) + local - stop(local))


def main():
    options = arguments(__doc__, rounds=15)
    report, rows, compiling, key = (
        Report("scan_reruns", "Other values at the steps of a scan"),
        [],
        [],
        jax.random.key(0),
    )
    for units in (4, 64):
        for steps in (10, 50, 200):
            params, data = start(units), jnp.asarray(np.random.default_rng(1).normal(size=(steps, 16)), jnp.float32)
            twin = program(data, units)
            loo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)
            losses = {"loo": lambda p, k: loo.loss(k, {}, *twin, p)}  # noqa: B023
            for most in dict.fromkeys((min(16, steps), steps)):
                chunk = -(-steps // -(-steps // most))
                elbo = EstimatorELBO(DisARM(), max_parallel=most)
                losses[f"ours {most}"] = lambda p, k, elbo=elbo: elbo.loss(k, {}, *twin, p)  # noqa: B023
                for name, whole in (("whole", True), ("rest", False)):
                    losses[f"{name} {most}"] = partial(by_hand, data, units, chunk, whole)
            contest, spent = {}, {}
            for name, loss in losses.items():
                jax.clear_caches()
                begun = time.process_time()
                run = jax.jit(jax.grad(loss)).lower(params, key).compile()
                spent[name] = time.process_time() - begun
                contest[name] = lambda run=run: jax.block_until_ready(run(params, key))  # noqa: B023
            for name, step in contest.items():  # the same estimate
                if "whole" in name:
                    other = contest[name.replace("whole", "rest")]()
                    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), step(), other)
            times = take_turns(f"T = {steps}", contest, options.rounds, repeats=5, clock=time.process_time)
            ms = {n: f"{1e3 * statistics.median(t):.2f}" for n, t in times.items()}
            for most in dict.fromkeys((min(16, steps), steps)):
                names = [f"{n} {most}" for n in ("ours", "whole", "rest")]
                rows.append((str(units), str(steps), str(most), *(ms[n] for n in names), ms["loo"]))
                compiling.append((str(units), str(steps), str(most), *(f"{spent[n]:.1f}" for n in names)))
    columns = ("units", "T", "max_parallel", "ours", "by hand, whole scans", "by hand, from its chunk on")
    report.table("A gradient, ms", (*columns, "leave-one-out, 2 particles"), rows)
    report.table("Tracing and compiling it, s", columns, compiling)
    report.write()


if __name__ == "__main__":
    main()
