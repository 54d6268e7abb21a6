"""Estimators under the importance-weighted bound: variance on 200 latent bits, and the price of K particles.

    python benchmarks/bounds.py

Variance: the total over the guide's 200 logits of one gradient of the bound of K particles; the program is a sigmoid
layer with random weights over 100 observed bits. "no baseline" is plain REINFORCE, K L ∇ log q. A pair of DisARM costs
two evaluations of a particle. Time: CPU seconds of a loss with its gradient, and of the loss alone, with pathwise sites
over those of the library's `RenyiELBO`, the two in turns.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as tdist
import torch
from _harness import Report, arguments, ratio, take_turns, verdict

from ppl_estimators import VIMCO, DisARM, ImportanceWeighted, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

LATENT, OBSERVED = 200, 100


class NoBaseline(ImportanceWeighted):
    """Costs K L: without the bound of the others."""

    def costs(self, ops, log_w, others, scale):
        k = others.shape[0]
        return k * scale * (ops.logaddexp(log_w, others) - np.log(k))


def variances(report: Report, draws: int) -> None:
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(0, 0.3, (LATENT, OBSERVED)))
    x = jnp.asarray(rng.integers(0, 2, OBSERVED).astype(float))

    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(LATENT)).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=(z - 0.5) @ weights).to_event(1), obs=x)

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(LATENT))).to_event(1))

    a = 0.5 * weights @ (x - 0.5)
    rows = {
        "no baseline": (Reinforce(), NoBaseline()),
        "`Reinforce(LeaveOneOut())`": (Reinforce(LeaveOneOut()), ImportanceWeighted()),
        "`Reinforce(VIMCO())`": (Reinforce(VIMCO()), ImportanceWeighted()),
        "`DisARM()`": (DisARM(), ImportanceWeighted()),
    }
    ks = (2, 5, 10, 20)
    table = []
    for name, (estimator, objective) in rows.items():
        found = []
        for k in ks:
            elbo = JaxELBO({"z": estimator}, num_particles=k, objective=objective)

            def gradient(key, elbo=elbo):
                return jax.grad(lambda a: elbo.loss(key, {"a": a}, model, guide))(a)

            keys = jax.random.split(jax.random.key(k), draws)
            gradients = jax.jit(lambda keys, g=gradient: jax.lax.map(g, keys, batch_size=50))(keys)
            found.append(float(jnp.var(gradients, axis=0).sum()))
        table.append((name, *(f"{v:,.0f}" for v in found)))
    report.table(f"Variance, {LATENT} bits", ("", *(f"K = {k}" for k in ks)), table)


def times(report: Report, rounds: int) -> None:
    x = np.random.default_rng(1).normal(size=50).astype(np.float32)

    def jax_model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(jnp.tanh(z).sum(-1), 1.0), obs=x)

    def jax_guide(x):
        m = numpyro.param("m", 0.1 * jnp.ones((50, 20)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(m, 0.7).to_event(1))

    def torch_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", tdist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("x", tdist.Normal(torch.tanh(z).sum(-1), 1.0), obs=x)

    def torch_guide(x):
        m = pyro.param("m", 0.1 * torch.ones(50, 20))
        with pyro.plate("data", len(x)):
            pyro.sample("z", tdist.Normal(m, 0.7).to_event(1))

    def jax_steps(elbo):
        params, given = {"m": 0.1 * jnp.ones((50, 20))}, jnp.asarray(x)

        def loss(params, key):
            return elbo.loss(key, params, jax_model, jax_guide, given)

        key = jax.random.key(0)
        both = jax.jit(jax.value_and_grad(loss)), jax.jit(loss)
        return [lambda f=f: jax.block_until_ready(f(params, key)) for f in both]

    def torch_steps(elbo):
        given = torch.tensor(x)
        return [lambda f=f: f(torch_model, torch_guide, given) for f in (elbo.loss_and_grads, elbo.loss)]

    table = []
    for k in (5, 50, 500, 5000):
        common = {"vectorize_particles": True, "max_plate_nesting": 1, "num_particles": k}
        both = {
            "Pyro": (TorchELBO(objective=ImportanceWeighted(), **common), pyro.infer.RenyiELBO(alpha=0, **common)),
            "NumPyro": (
                JaxELBO(objective=ImportanceWeighted(), num_particles=k),
                numpyro.infer.RenyiELBO(alpha=0, num_particles=k),
            ),
        }
        row, few = [f"{k:,}"], rounds if k < 1000 else rounds // 5
        for library, make in (("Pyro", torch_steps), ("NumPyro", jax_steps)):
            for what, ours, theirs in zip(("gradient", "value"), *map(make, both[library]), strict=True):
                seconds = take_turns(
                    f"{library}, {what}, {k} particles", {"ours": ours, "theirs": theirs}, few, clock=time.process_time
                )
                shown, value = ratio(seconds, "ours", "theirs")
                row.append(f"{shown}, {verdict(value, 1.1)}")
        table.append(tuple(row))
    columns = ("particles", "Pyro, gradient", "Pyro, value", "NumPyro, gradient", "NumPyro, value")
    report.table("Pathwise sites: CPU time over that of RenyiELBO", columns, table)


def main() -> None:
    chosen = arguments(__doc__ or "", rounds=100, draws=1000)
    torch.set_num_threads(1)
    report = Report("bounds", "The importance-weighted bound: the price of K particles, and variance on 200 bits")
    times(report, chosen.rounds)
    variances(report, chosen.draws)
    report.write()


if __name__ == "__main__":
    main()
