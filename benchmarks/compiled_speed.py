"""Pyro: compiled steps against steps written by hand in torch, the stock ELBOs and JitTrace_ELBO.

A step is `SVI.step`: loss, gradient and Adam. By hand is the same estimator in a few lines of torch, autograd and the
same optimiser, Pyro's. Times are those of the processor, of one thread.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _harness import Report, arguments, milliseconds, ratio, take_turns, verdict
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.util import zero_grads
from pyro.optim import Adam
from pyro_speed import BATCH, PIXELS, SITES, Network, chain_guide, chain_model
from torch.nn.functional import binary_cross_entropy_with_logits

from ppl_estimators import DisARM, EstimatorWarning, Reinforce
from ppl_estimators.pyro import EstimatorELBO

Step = Callable[[], object]
RATE = {"lr": 1e-5}


def svi(model: Any, guide: Any, loss: Any, *args: Any) -> Step:
    trained = SVI(model, guide, Adam(RATE), loss)
    return lambda: trained.step(*args)


# ---- the network by hand -------------------------------------------------------------------------------------------


def log_p(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return -binary_cross_entropy_with_logits(logits.expand_as(x), x, reduction="none").sum(-1)


def joint(net: Network, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return log_p(z, net.prior) + log_p(x, net.decoder(z))


def reinforce(net: Network, x: torch.Tensor) -> torch.Tensor:
    logits = net.encoder(x)
    z = torch.bernoulli(torch.sigmoid(logits.detach()))
    log_q, cost = log_p(z, logits), joint(net, z, x)
    signal = (cost - log_q).detach()
    return -(cost - log_q.detach() + signal * (log_q - log_q.detach())).sum()


def disarm(net: Network, x: torch.Tensor) -> torch.Tensor:
    logits = net.encoder(x)
    fixed, u = logits.detach(), torch.rand_like(logits)
    p = torch.sigmoid(fixed)
    z, other = (u > 1 - p).float(), (u < p).float()
    cost = joint(net, z, x) - log_p(z, fixed)
    with torch.no_grad():
        difference = cost - (joint(net, other, x) - log_p(other, fixed))
        sign = torch.where(other == 1, -1.0, 1.0) * (z != other)
        weight = 0.5 * difference[:, None] * sign * torch.sigmoid(fixed.abs())
    rider = (weight * logits).sum()
    return -(cost.sum() + rider - rider.detach())


def by_hand(loss: Callable[[Network, torch.Tensor], torch.Tensor], x: torch.Tensor) -> Step:
    net, optim = Network(), Adam(RATE)
    parameters = set(net.parameters())

    def step() -> float:
        value = loss(net, x)
        value.backward()
        optim(parameters)
        zero_grads(parameters)
        return value.item()

    return step


class Named(Network):
    """Networks side by side in one store."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def model(self, x: torch.Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("batch", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def network(loss: Any, name: str, x: torch.Tensor) -> Step:
    net = Named(name)
    return svi(net.model, net.guide, loss, x)


# ---- small models --------------------------------------------------------------------------------------------------


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b, sigma), obs=y)


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(y: torch.Tensor) -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def against_jit(model: Any, *args: Any) -> dict[str, Step]:
    """Each with a guide, and a prefix of names, of its own."""
    losses = {"compile=True": EstimatorELBO(compile=True), "JitTrace_ELBO": JitTrace_ELBO(ignore_jit_warnings=True)}
    steps = {}
    for name, loss in losses.items():
        guide = AutoNormal(model)
        guide._pyro_name = name.partition("=")[0]
        steps[name] = svi(model, guide, loss, *args)
    return steps


# ---- measurements ----------------------------------------------------------------------------------------------------


def first(step: Step, count: int = 15) -> float:
    """Seconds until the notes run."""
    start = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - start


def main() -> None:
    options = arguments(__doc__, rounds=60, inductor=1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EstimatorWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", torch.jit.TracerWarning)
    logging.getLogger().setLevel(logging.WARNING)
    pyro.set_rng_seed(0)
    report = Report("compiled_speed", "Pyro: compiled steps.")
    rounds = options.rounds

    def rows(times: Any, pairs: list[tuple[str, str, float]]) -> list[tuple[str, ...]]:
        found = []
        for ours, theirs, target in pairs:
            shown, value = ratio(times, ours, theirs)
            ours_ms, theirs_ms = milliseconds(times, ours), milliseconds(times, theirs)
            found.append((ours, theirs, ours_ms, theirs_ms, shown, verdict(value, target)))
        return found

    columns = ("ours", "against", "ours, ms", "theirs, ms", "ratio (quartiles)", "target")
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()
    specs = {"Reinforce()": Reinforce(), "DisARM()": DisARM()}
    steps = {"Reinforce() by hand": by_hand(reinforce, x), "DisARM() by hand": by_hand(disarm, x)}
    steps["Trace_ELBO"] = network(Trace_ELBO(), "stock", x)
    first(steps["Trace_ELBO"])  # imports
    begun = {}
    kinds = {" uncompiled": False, "": True} | ({", inductor": "inductor"} if options.inductor else {})
    for name, (e, compile) in {n + k: (e, c) for n, e in specs.items() for k, c in kinds.items()}.items():
        steps[name] = network(EstimatorELBO({"z": e}, compile=compile), f"network {name}", x)
        begun[name] = first(steps[name])
    times = take_turns("network", steps, rounds, repeats=2, clock=time.process_time)
    compiled = [n + k for n in specs for k in kinds if k != " uncompiled"]
    pairs = [(n, f"{n.partition(',')[0]} by hand", 1.15) for n in compiled] + [(n, "Trace_ELBO", 0.7) for n in compiled]
    report.table(f"{PIXELS}-200-{PIXELS} sigmoid belief network, batch {BATCH}", columns, rows(times, pairs))
    saved = []
    for n in specs:
        gain = min(times[f"{n} uncompiled"]) - min(times[n])
        count = 15 + (begun[n] - begun[f"{n} uncompiled"]) / gain
        saved.append((n, f"{begun[n]:.2f}", f"{begun[f'{n} uncompiled']:.2f}", f"{count:.0f}", verdict(count, 500)))
    heads = ("estimator", "first 15 steps, s", "uncompiled, s", "pays after steps", "target")
    report.table("What noting costs", heads, saved)

    pyro.clear_param_store()
    y = torch.randn(SITES)
    losses = {"compile=True": EstimatorELBO(default=Reinforce(), compile=True), "Trace_ELBO": Trace_ELBO()}
    if options.inductor:
        losses['compile="inductor"'] = EstimatorELBO(default=Reinforce(), compile="inductor")
    chain = {n: svi(chain_model, chain_guide, loss, y) for n, loss in losses.items()}
    chain["TraceGraph_ELBO"] = svi(chain_model, chain_guide, TraceGraph_ELBO(), y)
    graph = take_turns("chain, all", chain, 5, warmup=4, clock=time.process_time)
    del chain["TraceGraph_ELBO"]
    times = take_turns("chain", chain, rounds, repeats=2, clock=time.process_time)
    pairs = [("compile=True", "Trace_ELBO", 0.6)]
    pairs += [('compile="inductor"', "Trace_ELBO", 0.2)] if options.inductor else []
    table = rows(times, pairs) + rows(graph, [("compile=True", "TraceGraph_ELBO", 0.05)])
    report.table(f"Reinforce() on a chain of {SITES} Bernoulli latents", columns, table)

    table = []
    covariates = torch.randn(100, 3)
    programs = {"regression": (regression, covariates, torch.randn(100)), "eight schools": (schools, EFFECTS)}
    for name, (model, *args) in programs.items():
        pyro.clear_param_store()
        times = take_turns(name, against_jit(model, *args), 3 * rounds, warmup=15, repeats=2, clock=time.process_time)
        row, *_ = rows(times, [("compile=True", "JitTrace_ELBO", 1.0)])
        table.append((name, *row[2:]))
    report.table("AutoNormal guide, against JitTrace_ELBO", ("model", *columns[2:]), table)
    report.write()


if __name__ == "__main__":
    main()
