"""Pyro: step time and gradient variance against the stock ELBOs.

A chain of 50 Bernoulli latents, one observation each, and a 784-200-784 sigmoid belief network with a batch of 50. A
step is `SVI.step`: loss, gradient and Adam. `TraceGraph_ELBO` runs without baselines, so that it is the same estimator
as `Reinforce()`; under one seed both make the same draws, and their gradients are compared draw by draw.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import Report, arguments, milliseconds, ratio, take_turns, verdict
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.optim import Adam
from rich.progress import track

from ppl_estimators import DisARM, EstimatorWarning, Reinforce
from ppl_estimators.pyro import EstimatorELBO

SITES = 50
PIXELS, HIDDEN, BATCH = 784, 200, 50
Program = Callable[..., None]


# ---- a chain: z_t depends on z_{t-1}, in guide and model -------------------------------------------------------------


def chain_model(x: torch.Tensor) -> None:
    z = x.new_zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=2 * z - 1))
        pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])


def chain_guide(x: torch.Tensor) -> None:
    a = pyro.param("a", lambda: torch.linspace(-1, 1, len(x), device=x.device))
    b = pyro.param("b", lambda: torch.linspace(1, 0, len(x), device=x.device))
    z = x.new_zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=a[t] + b[t] * z))


# ---- a sigmoid belief network ----------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prior = torch.nn.Parameter(torch.zeros(HIDDEN))
        self.decoder = torch.nn.Linear(HIDDEN, PIXELS)
        self.encoder = torch.nn.Linear(PIXELS, HIDDEN)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("network", self)
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        with pyro.plate("batch", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


# ---- measurements ----------------------------------------------------------------------------------------------------


def steps(model: Program, guide: Program, x: torch.Tensor, losses: dict[str, Any]) -> dict[str, Callable[[], object]]:
    svis = {n: SVI(model, guide, Adam({"lr": 1e-5}), loss) for n, loss in losses.items()}
    return {n: lambda svi=svi: svi.step(x) for n, svi in svis.items()}


def gradient(loss: Any, seed: int, x: torch.Tensor) -> torch.Tensor:
    pyro.set_rng_seed(seed)
    loss.loss_and_grads(chain_model, chain_guide, x)
    found = []
    for _, p in pyro.get_param_store().named_parameters():
        found.append(p.grad.clone())
        p.grad = None
    return torch.cat(found)


def variances(losses: dict[str, Any], draws: int, x: torch.Tensor) -> tuple[dict[str, float], float, float, float]:
    """Total variance of the gradient per loss; the ratio of the first to the second with its standard error, from
    tenths of the draws; and the largest difference of two gradients under one seed."""
    samples = {n: [] for n in losses}
    for seed in track(range(draws), "gradient variance", transient=True):
        for name, loss in losses.items():
            samples[name].append(gradient(loss, seed, x))
    stacked = {n: torch.stack(s).double() for n, s in samples.items()}
    ours, theirs = stacked.values()
    total = {n: float(s.var(0).sum()) for n, s in stacked.items()}
    parts = [float(a.var(0).sum() / b.var(0).sum()) for a, b in zip(ours.chunk(10), theirs.chunk(10), strict=True)]
    value = total[next(iter(total))] / total[list(total)[1]]
    return total, value, statistics.stdev(parts) / len(parts) ** 0.5, float((ours - theirs).abs().max())


def main() -> None:
    options = arguments(__doc__, rounds=100, graph_rounds=20, draws=150, threads=1)
    torch.set_num_threads(options.threads)  # more would measure who else wants the cores
    warnings.simplefilter("ignore", EstimatorWarning)
    logging.getLogger().setLevel(logging.WARNING)
    pyro.set_rng_seed(0)
    report = Report("pyro_speed", "Pyro: step time against the stock ELBOs")

    x = torch.randn(SITES)
    losses = {"Reinforce()": EstimatorELBO(default=Reinforce()), "Trace_ELBO": Trace_ELBO()}
    chain = steps(chain_model, chain_guide, x, losses | {"TraceGraph_ELBO": TraceGraph_ELBO()})
    graph = take_turns("chain, all", chain, options.graph_rounds)
    del chain["TraceGraph_ELBO"]
    times = take_turns("chain", chain, options.rounds, repeats=3)
    rows = []
    for other, measured, target in (("Trace_ELBO", times, 1.5), ("TraceGraph_ELBO", graph, 0.25)):
        shown, value = ratio(measured, "Reinforce()", other)
        rows.append(
            (other, milliseconds(measured, "Reinforce()"), milliseconds(measured, other), shown, verdict(value, target))
        )
    columns = ("against", "ours, ms", "theirs, ms", "ratio (quartiles)", "target")
    report.table(f"Reinforce() on a chain of {SITES} Bernoulli latents, step time", columns, rows)

    pyro.clear_param_store()
    same = {"Reinforce()": EstimatorELBO(default=Reinforce()), "TraceGraph_ELBO": TraceGraph_ELBO()}
    total, value, error, difference = variances(same, options.draws, x)
    report.table(
        f"Variance of the gradient on that chain, {options.draws} draws",
        ("loss", "total variance", "ratio ± standard error", "largest difference under one seed", "target"),
        [
            (
                "Reinforce()",
                f"{total['Reinforce()']:.1f}",
                f"{value:.4f} ± {error:.4f}",
                f"{difference:.1e}",
                f"within 5%: {'met' if abs(value - 1) <= 0.05 else 'MISSED'}",
            ),
            ("TraceGraph_ELBO", f"{total['TraceGraph_ELBO']:.1f}", "", "", ""),
        ],
    )

    pyro.clear_param_store()
    network, images = Network(), (torch.rand(BATCH, PIXELS) < 0.3).float()
    losses = {
        "Reinforce()": EstimatorELBO({"z": Reinforce()}),
        "DisARM()": EstimatorELBO({"z": DisARM()}),
        "Trace_ELBO": Trace_ELBO(),
    }
    times = take_turns("network", steps(network.model, network.guide, images, losses), options.rounds, repeats=3)
    rows = []
    for name, target in (("Reinforce()", 1.1), ("DisARM()", 1.6)):
        shown, value = ratio(times, name, "Trace_ELBO")
        rows.append((name, milliseconds(times, name), milliseconds(times, "Trace_ELBO"), shown, verdict(value, target)))
    columns = ("estimator", "ours, ms", "Trace_ELBO, ms", "ratio (quartiles)", "target")
    report.table(f"{PIXELS}-{HIDDEN}-{PIXELS} sigmoid belief network, batch {BATCH}, step time", columns, rows)
    report.write()


if __name__ == "__main__":
    main()
