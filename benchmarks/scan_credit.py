"""What it is worth to credit a step of a scan with what it can move, and what single values cost there (NumPyro).

A chain of T noisy observed bits. The guide of each step knows its datum; it is mean-field, or reads the bit before (or
after, in a reversed scan). Variance: the sum over the guide's parameters, at the start.
"""

from __future__ import annotations

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _harness import Report, arguments
from numpyro.contrib.control_flow import scan

from ppl_estimators import DisARM, Enumerate, LeaveOneOut, Reinforce
from ppl_estimators.core.credit import Graph
from ppl_estimators.numpyro import EstimatorELBO

DRAWS = {10: 4000, 100: 400}


def program(count, remembers, backward):
    data = jnp.sin(jnp.arange(count) * 0.7) + 0.5

    def model():
        def step(old, y):
            z = numpyro.sample("z", dist.Bernoulli(logits=2.0 * old - 1.0))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=y)
            return 1.0 * z, None

        scan(step, 0.0, data)

    def guide():
        a, b = numpyro.param("a", jnp.zeros(count)), numpyro.param("b", jnp.asarray(0.5))

        def step(old, x):
            logit, y = x
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=logit + 0.5 * y + b * old))
            return z if remembers else old, None

        scan(step, 0.0 if remembers else 0.5, (a, data), reverse=backward)

    return model, guide, {"a": jnp.zeros(count), "b": jnp.asarray(0.5)}


def measured(elbo, count, remembers, backward, whole=False):
    """Variance of the gradient, and milliseconds for one of many side by side."""
    model, guide, params = program(count, remembers, backward)
    keys = jax.random.split(jax.random.key(0), DRAWS[count])

    @jax.jit
    def gradients(keys):
        return jax.lax.map(lambda k: jax.grad(lambda p: elbo.loss(k, p, model, guide))(params), keys, batch_size=50)

    with mock.patch.object(Graph, "window", (lambda self, site, term: None) if whole else Graph.window):
        run = gradients.lower(keys).compile()
    found = jax.block_until_ready(run(keys))
    start = time.process_time()
    jax.block_until_ready(run(keys))
    spent = (time.process_time() - start) / len(keys)
    return sum(float(x.var(0).sum()) for x in jax.tree.leaves(found)), 1e3 * spent


def main():
    arguments(__doc__)
    report, rows = Report("scan_credit", "A step of a scan, credited with what it moves"), []
    kinds = {"mean-field": (False, False), "forward": (True, False), "reversed": (True, True)}
    for name, kind in kinds.items():
        for count in DRAWS:
            loo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)
            contests = [
                ("leave-one-out, 2 particles", "whole scan", loo, True),
                ("leave-one-out, 2 particles", "by step", loo, False),
                ("DisARM()", "by step", EstimatorELBO(DisARM()), False),
                ("Enumerate()", "by step", EstimatorELBO(Enumerate()), False),
            ]
            for estimator, credit, elbo, whole in contests:
                variance, ms = measured(elbo, count, *kind, whole)
                rows.append((name, estimator, str(count), credit, f"{variance:.3g}", f"{ms:.2g}"))
    columns = ("guide", "estimator", "T", "credit", "variance", "ms")
    report.table("Variance of the gradient, and CPU time", columns, rows)
    report.write()


if __name__ == "__main__":
    main()
