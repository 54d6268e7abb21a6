"""Memory of `Enumerate()` at one site of 200 dependent Bernoullis that feeds a network: 200 evaluations a step.

`max_parallel` says how many run side by side. Pyro: peak resident memory of a gradient in a fresh process, above that
of a gradient with `Reinforce()`. NumPyro: the temporary memory that XLA plans for the compiled gradient, above that
with `Reinforce()`.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from _harness import Report, arguments
from rich.progress import track

LATENTS, HIDDEN, PIXELS, BATCH = 200, 1024, 784, 128
MIB = 2**20
#: what the model computes per evaluation: hidden layer before and after tanh, logits, log probability
ACTIVATIONS = 4 * BATCH * (2 * HIDDEN + 2 * PIXELS) / MIB


def pyro_peak(max_parallel: int | None) -> float:
    """MiB; None for Pyro's default, one evaluation after another."""
    import pyro
    import pyro.distributions as dist
    import torch

    from ppl_estimators import Enumerate, Reinforce
    from ppl_estimators.pyro import EstimatorELBO

    warnings.simplefilter("ignore")
    decoder = torch.nn.Sequential(torch.nn.Linear(LATENTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, PIXELS))
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()

    def model() -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("batch", BATCH):
            z = pyro.sample("z", dist.Bernoulli(torch.full((LATENTS,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide() -> None:
        a = pyro.param("a", torch.zeros(BATCH, LATENTS))
        with pyro.plate("batch", BATCH):
            pyro.sample("z", dist.Bernoulli(logits=a).to_event(1))

    def peak_after(loss: EstimatorELBO) -> float:
        loss.loss_and_grads(model, guide)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB

    for _ in range(2):
        reference = peak_after(EstimatorELBO({"z": Reinforce()}))
    options: dict[str, Any] = {}
    if max_parallel is not None:
        options = {"max_parallel": max_parallel, "vectorize_particles": True, "max_plate_nesting": 1}
    return peak_after(EstimatorELBO({"z": Enumerate()}, **options)) - reference


def numpyro_plan(max_parallel: int | None) -> float:
    """MiB; None for `Reinforce()`."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from ppl_estimators import Enumerate, Reinforce
    from ppl_estimators.numpyro import EstimatorELBO

    warnings.simplefilter("ignore")
    x = (jax.random.uniform(jax.random.key(0), (BATCH, PIXELS)) < 0.3).astype(float)
    params = {
        "w": 0.05 * jax.random.normal(jax.random.key(1), (LATENTS, HIDDEN)),
        "v": 0.05 * jax.random.normal(jax.random.key(2), (HIDDEN, PIXELS)),
        "a": jnp.zeros((BATCH, LATENTS)),
    }

    def model() -> None:
        w, v = numpyro.param("w", params["w"]), numpyro.param("v", params["v"])
        with numpyro.plate("batch", BATCH):
            z = numpyro.sample("z", dist.Bernoulli(jnp.full(LATENTS, 0.5)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=jnp.tanh(z @ w) @ v).to_event(1), obs=x)

    def guide() -> None:
        a = numpyro.param("a", params["a"])
        with numpyro.plate("batch", BATCH):
            numpyro.sample("z", dist.Bernoulli(logits=a).to_event(1))

    if max_parallel is None:
        loss = EstimatorELBO({"z": Reinforce()})
    else:
        loss = EstimatorELBO({"z": Enumerate()}, max_parallel=max_parallel)
    gradient = jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(3), p, model, guide)))
    return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes / MIB


def main() -> None:
    arguments(__doc__)
    report = Report("memory", f"Enumerate() at a site of {LATENTS} dependent Bernoullis: memory of a gradient")
    settings = (1, 4, 16, 64, 200)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        jobs = [
            *(processes.submit(pyro_peak, n) for n in (None, *settings)),
            *(processes.submit(numpyro_plan, n) for n in (None, *settings)),
        ]
        found = [job.result() for job in track(jobs, "processes", transient=True)]
    one_by_one, *pyro = found[: len(jobs) // 2]
    reference, *numpyro = found[len(jobs) // 2 :]
    rows = [("vectorize_particles=False, Pyro's default", f"{one_by_one:.0f}", "")]
    for n, torch_peak, xla in zip(settings, pyro, numpyro, strict=True):
        note = ", the default" if n == 16 else ""
        rows.append((f"max_parallel={n}{note}", f"{torch_peak:.0f}", f"{xla - reference:.0f}"))
    report.table("MiB above a gradient with Reinforce()", ("", "Pyro", "NumPyro"), rows)
    report.remark(
        f"One evaluation of the model computes {ACTIVATIONS:.1f} MiB of activations (batch {BATCH}, "
        f"{LATENTS}-{HIDDEN}-{PIXELS} network), {LATENTS} of them {LATENTS * ACTIVATIONS:.0f} MiB. The gradient with "
        f"Reinforce() itself plans {reference:.0f} MiB in NumPyro."
    )
    report.write()


if __name__ == "__main__":
    main()
