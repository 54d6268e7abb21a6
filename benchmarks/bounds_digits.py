"""Estimators under the importance-weighted bound: 200 latent bits of scanned digits, and the bound on held-out ones.

    python benchmarks/bounds_digits.py

Scikit-learn's 1,797 digits of 8 x 8 pixels, binarised: 1,400 to train on, 397 held out. A sigmoid belief network, 200
bits under one linear layer, and a linear guide; batches of 50, Adam at 0.001, three seeds. "no baseline" is plain
REINFORCE, K L ∇ log q, the running average beside it a kinder one. A pair of DisARM costs two evaluations of a
particle, so it has half the steps. Held out: nats of an image by the bound of 1,000 particles, mean and range of the
seeds. Variance: of one gradient of the bound of 5 particles, summed over the guide's parameters, for one batch at the
start and at where leave-one-out has led.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report, arguments
from numpyro.infer import SVI
from numpyro.optim import Adam
from rich.progress import track
from sklearn.datasets import load_digits

from ppl_estimators import (
    VIMCO,
    DisARM,
    EstimatorWarning,
    ImportanceWeighted,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
)
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

LATENT, PIXELS, TRAIN, BATCH = 200, 64, 1400, 50


class NoBaseline(ImportanceWeighted):
    """Costs K L: without the bound of the others."""

    def costs(self, ops, log_w, others, scale):
        k = others.shape[0]
        return k * scale * (ops.logaddexp(log_w, others) - np.log(k))


BOUND = ImportanceWeighted()


@dataclass(frozen=True)
class Contestant:
    name: str
    estimator: Any
    objective: ImportanceWeighted = BOUND
    cost: int = 1  # evaluations of a particle


CONTESTANTS = (
    Contestant("no baseline", Reinforce(), NoBaseline()),
    Contestant("no baseline but a running average", Reinforce(MovingAverage()), NoBaseline()),
    Contestant("`Reinforce(LeaveOneOut())`", Reinforce(LeaveOneOut())),
    Contestant("`Reinforce(VIMCO())`", Reinforce(VIMCO())),
    Contestant("`DisARM()`", DisARM(), cost=2),
)
LEAVE_ONE_OUT, DISARM = CONTESTANTS[2], CONTESTANTS[4]


def digits() -> tuple[Any, Any]:
    images = (load_digits().data > 7.5).astype(np.float32)
    images = images[np.random.default_rng(0).permutation(len(images))]
    return jnp.asarray(images[:TRAIN]), jnp.asarray(images[TRAIN:])


def layer(name: str, n: int, m: int) -> tuple[Any, Any]:
    weights = numpyro.param(f"{name} weights", lambda key: jax.random.normal(key, (n, m)) / jnp.sqrt(n))
    return weights, numpyro.param(f"{name} bias", jnp.zeros(m))


def model(x: Any) -> None:
    weights, bias = layer("decoder", LATENT, PIXELS)
    prior = numpyro.param("prior", jnp.zeros(LATENT))
    with numpyro.plate("images", TRAIN, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=(2 * z - 1) @ weights + bias).to_event(1), obs=x)


def guide(x: Any) -> None:
    weights, bias = layer("encoder", PIXELS, LATENT)
    with numpyro.plate("images", TRAIN, subsample_size=len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=(2 * x - 1) @ weights + bias).to_event(1))


def fit(contestant: Contestant, particles: int, data: Any, steps: int, seeds: int) -> list[Any]:
    """Trained parameters of each seed."""
    elbo = EstimatorELBO(num_particles=particles, objective=contestant.objective)
    svi = SVI(model, with_estimators(guide, {"z": contestant.estimator}), Adam(1e-3), elbo)

    def run(key: Any) -> Any:
        def update(state: Any, key: Any) -> Any:
            batch = data[jax.random.randint(key, (BATCH,), 0, len(data))]
            return svi.update(state, batch)[0], None

        first, more = jax.random.split(key)
        state = svi.init(first, data[:BATCH])
        return svi.get_params(jax.lax.scan(update, state, jax.random.split(more, steps))[0])

    keys = jax.random.split(jax.random.key(0), seeds)
    compiled = jax.jit(run)
    return [compiled(key) for key in keys]


def held_out(params: Any, test: Any) -> float:
    found = EstimatorELBO().evaluate(jax.random.key(9), params, model, guide, test, num_particles=1000)
    return float(found.each.mean())


def shown(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def variance(contestant: Contestant, particles: int, at: Any, batch: Any, draws: int) -> float:
    """Of the mean over the batch, as the variance of one gradient, summed over the guide's parameters."""
    elbo = EstimatorELBO(num_particles=particles, objective=contestant.objective)
    hooked = with_estimators(guide, {"z": contestant.estimator})
    names = [n for n in at if n.startswith("encoder")]

    def gradient(key: Any) -> Any:
        def loss(ours: Any) -> Any:
            return elbo.loss(key, {**at, **ours}, model, hooked, batch) / TRAIN

        return jax.grad(loss)({n: at[n] for n in names})

    keys = jax.random.split(jax.random.key(7), draws)
    found = jax.jit(lambda keys: jax.lax.map(gradient, keys, batch_size=20))(keys)
    return sum(float(jnp.var(g, axis=0).sum()) for g in found.values())


def main() -> None:
    chosen = arguments(__doc__ or "", steps=8000, seeds=3, draws=400)
    warnings.simplefilter("ignore", EstimatorWarning)  # of the score function without a baseline
    train, test = digits()
    report = Report("bounds_digits", "The importance-weighted bound on digits, 200 bits")
    half = chosen.steps // 2
    runs = [(c, 5, chosen.steps // c.cost) for c in CONTESTANTS]
    runs += [(c, 10, half // c.cost) for c in (LEAVE_ONE_OUT, DISARM)]
    fitted = {}
    for c, k, steps in track(runs, "training", transient=True):
        fitted[c.name, k] = fit(c, k, train, steps, chosen.seeds)
    start = fit(LEAVE_ONE_OUT, 5, train, 1, 1)[0]

    table = []
    for c, k, steps in runs:
        found = [held_out(params, test) for params in fitted[c.name, k]]
        table.append((c.name, f"{k}", f"{steps:,}", f"{steps * k * c.cost:,}", shown(found)))
    untrained = held_out(start, test)
    columns = ("estimator", "K", "steps", "evaluations", "held-out bound, nats")
    report.table(f"Held out, after one budget of evaluations ({chosen.seeds} seeds)", columns, table)
    report.remark(f"Untrained: {untrained:.2f} nats.")

    end, batch = fitted[LEAVE_ONE_OUT.name, 5][0], train[:BATCH]
    measured = [c for c in CONTESTANTS if c.estimator != Reinforce(MovingAverage())]
    at = [[variance(c, 5, where, batch, chosen.draws) for where in (start, end)] for c in measured]
    table = [(c.name, *(f"{v:.3g}" for v in row)) for c, row in zip(measured, at, strict=True)]
    report.table("Variance of one gradient, K = 5", ("estimator", "at the start", "after training"), table)
    report.write()


if __name__ == "__main__":
    main()
