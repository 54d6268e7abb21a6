"""Sums over discrete values: step time against `TraceEnum_ELBO`, compile time too in NumPyro, and steps of a chain.

A step is the loss and its gradient. In Pyro the parameters are read anew each time, as `SVI.step` does; in NumPyro it
is compiled. NumPyro's `TraceEnum_ELBO` does not sum along a scan (its loss is not −log p(x)): there the chain is held
against what NumPyro's samplers use, `numpyro.contrib.funsor`'s `log_density`. Times are CPU times of one process, the
contestants in turns.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import torch
from _harness import Report, Times, arguments, milliseconds, ratio, take_turns, verdict
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor.infer_util import log_density
from numpyro.infer import TraceEnum_ELBO as JaxStock
from pyro.infer import TraceEnum_ELBO as TorchStock

from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

RNG = np.random.default_rng(0)
MARK = {"enumerate": "parallel"}
DATA, SEQUENCES = RNG.normal(size=2000).astype(np.float32), RNG.normal(size=(1000, 10)).astype(np.float32)
VOTES = RNG.integers(0, 4, size=(10, 300))
STATES = 16
Program = tuple[Callable[[], None], Callable[[], None], int]


class Torch:
    sample, plate, dist = staticmethod(pyro.sample), staticmethod(pyro.plate), tdist
    array, arange = staticmethod(torch.as_tensor), staticmethod(torch.arange)

    @staticmethod
    def param(name: str, *shape: int) -> Any:
        return pyro.param(name, lambda: torch.as_tensor(_start(name, shape)))


class Density:
    """−log p(x) as NumPyro's samplers have it."""

    def loss(self, key: Any, params: Any, model: Any, guide: Any) -> Any:
        return -log_density(enum(config_enumerate(model), first_available_dim=-2), (), {}, params)[0]


class Jax:
    sample, plate, dist = staticmethod(numpyro.sample), staticmethod(numpyro.plate), jdist
    array, arange = staticmethod(jnp.asarray), staticmethod(jnp.arange)

    @staticmethod
    def param(name: str, *shape: int) -> Any:
        return numpyro.param(name, jnp.asarray(_start(name, shape)))


def _start(name: str, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng([ord(c) for c in name]).normal(size=shape).astype(np.float32)


def mixture(lib: Any) -> Program:
    def model() -> None:
        with lib.plate("components", 8):
            place = lib.sample("place", lib.dist.Normal(0.0, 3.0))
        with lib.plate("data", len(DATA)):
            z = lib.sample("z", lib.dist.Categorical(logits=lib.param("weights", 8)), infer=dict(MARK))
            lib.sample("x", lib.dist.Normal(place[z], 1.0), obs=lib.array(DATA))

    def guide() -> None:
        with lib.plate("components", 8):
            lib.sample("place", lib.dist.Delta(lib.param("place_", 8)))

    return model, guide, 1


def annotators(lib: Any) -> Program:
    def model() -> None:
        table, who = lib.param("table", 10, 4, 4), lib.arange(10)[:, None]
        with lib.plate("items", 300, dim=-1):
            c = lib.sample("c", lib.dist.Categorical(logits=lib.param("classes", 4)), infer=dict(MARK))
            with lib.plate("annotators", 10, dim=-2):
                spam = lib.sample("spam", lib.dist.Bernoulli(logits=lib.param("spam_", 10)[:, None]), infer=dict(MARK))
                logits = table[who, c] * (1 - spam)[..., None]
                lib.sample("y", lib.dist.Categorical(logits=logits), obs=lib.array(VOTES))

    return model, lambda: None, 2


def chain(lib: Any, steps: int = 100, count: int = 10) -> Program:
    def model() -> None:
        table, place = lib.param("table", STATES, STATES), lib.param("place", STATES)
        sequences = lib.plate("sequences", count) if lib is Torch else None

        def step(z: Any, x: Any, name: str = "") -> Any:
            with sequences or lib.plate("sequences", count):
                z = lib.sample(f"z{name}", lib.dist.Categorical(logits=table[z]), infer=dict(MARK))
                lib.sample(f"x{name}", lib.dist.Normal(place[z], 1.0), obs=x)
            return z

        if lib is Torch:
            z: Any = 0
            for t in pyro.markov(range(steps)):
                z = step(z, lib.array(SEQUENCES[t, :count]), f" {t}")
        else:
            scan(lambda z, x: (step(z, x), None), jnp.zeros(count, int), jnp.asarray(SEQUENCES[:steps, :count]))

    return model, lambda: None, 1


def labels(lib: Any) -> Program:
    """Labels enumerated in the guide, above codes that are drawn."""
    pixels = lib.array(RNG.normal(size=(100, 64)).astype(np.float32))

    def model() -> None:
        w, v = lib.param("w", 16, 64), lib.param("v", 10, 64)
        with lib.plate("batch", 100):
            y = lib.sample("y", lib.dist.Categorical(logits=lib.array(np.zeros(10, np.float32))))
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(16, np.float32)), 1.0).to_event(1))
            lib.sample("x", lib.dist.Normal(z @ w + v[y], 1.0).to_event(1), obs=pixels)

    def guide() -> None:
        m, n = lib.param("m", 64, 16), lib.param("n", 10, 16)
        with lib.plate("batch", 100):
            y = lib.sample("y", lib.dist.Categorical(logits=pixels @ lib.param("label", 64, 10)), infer=dict(MARK))
            lib.sample("z", lib.dist.Normal(pixels @ m + n[y], 1.0).to_event(1))

    return model, guide, 1


def of_pyro(elbo: Any, program: Program) -> Callable[[], object]:
    model, guide, _ = program

    def step() -> object:
        return elbo.loss_and_grads(model, guide)

    return step


def of_numpyro(elbo: Any, program: Program) -> tuple[Callable[[Any], Any], Any]:
    model, guide, _ = program
    traces = [numpyro.handlers.trace(numpyro.handlers.seed(f, rng_seed=0)).get_trace() for f in (guide, model)]
    params = {n: m["value"] for trace in traces for n, m in trace.items() if m["type"] == "param"}
    return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)), params


def compiled(gradient: Callable[[Any], Any], params: Any) -> Callable[[], Any]:
    step = jax.jit(gradient)
    return lambda: jax.block_until_ready(step(params))


def ten_times(step: Callable[[], object]) -> Callable[[], object]:
    return lambda: [step() for _ in range(10)]


def compile_times(steps: dict[str, tuple[Callable[[Any], Any], Any]], rounds: int) -> Times:
    times: Times = {name: [] for name in steps}
    for i in range(rounds):
        for name, (gradient, params) in list(steps.items())[:: 1 if i % 2 else -1]:
            jax.clear_caches()
            start = time.process_time()
            jax.jit(lambda p: gradient(p)).lower(params).compile()  # noqa: B023
            times[name].append(time.process_time() - start)
    return times


def row(name: str, times: Times, target: float) -> tuple[str, ...]:
    printed, value = ratio(times, "ours", "stock")
    return name, milliseconds(times, "ours"), milliseconds(times, "stock"), printed, verdict(value, target)


def main() -> None:
    options = arguments(__doc__, rounds=30, compile_rounds=3)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report("enumeration", "Sums over discrete values against TraceEnum_ELBO")
    columns = ("", "ms", "TraceEnum_ELBO", "ratio", "")
    rows = []
    for program in (mixture, annotators, chain, labels):
        pyro.clear_param_store()
        made = program(Torch)
        steps = {"ours": of_pyro(TorchELBO(max_plate_nesting=made[2]), made),
                 "stock": of_pyro(TorchStock(max_plate_nesting=made[2]), made)}  # fmt: skip
        rounds = options.rounds if program is not chain else options.rounds // 3
        rows.append(row(program.__name__, take_turns(program.__name__, steps, rounds, clock=time.process_time), 1.3))
    report.table("Pyro: a step", columns, rows)
    rows, slow = [], []
    for program in (mixture, annotators, chain):
        made = program(Jax)
        stock = Density() if program is chain else JaxStock(max_plate_nesting=made[2])
        both = {"ours": of_numpyro(JaxELBO(), made), "stock": of_numpyro(stock, made)}
        slow.append(row(program.__name__, compile_times(both, options.compile_rounds), 1.3))
        steps = {n: compiled(*x) for n, x in both.items()}
        ours, theirs = (float(step()[0]) for step in steps.values())
        assert abs(ours / theirs - 1) < 1e-4, (program.__name__, ours, theirs)
        times = take_turns(program.__name__, steps, options.rounds, repeats=3, clock=time.process_time)
        rows.append(row(program.__name__, times, 1.1))
    columns = ("", "ms", "NumPyro's own", "ratio", "")
    report.table("NumPyro: a compiled step", columns, rows)
    report.table("NumPyro: tracing and compiling it", columns, slow)
    rows = []
    contests = {
        "NumPyro": lambda t: compiled(*of_numpyro(JaxELBO(), chain(Jax, t, 1))),
        "Pyro": lambda t: of_pyro(TorchELBO(max_plate_nesting=1, verify=False), chain(Torch, t, 1)),
        "Pyro's TraceEnum_ELBO": lambda t: of_pyro(TorchStock(max_plate_nesting=1), chain(Torch, t, 1)),
    }
    frozen = " after gc.freeze()"
    for name in (*contests, f"Pyro{frozen}", f"Pyro's TraceEnum_ELBO{frozen}"):
        made = contests[name.removesuffix(frozen)]
        steps = {"1000": made(1000), "100": ten_times(made(100))}
        if name.endswith(frozen):
            gc.freeze()
        times = take_turns(name, steps, 10, clock=time.process_time)
        gc.unfreeze()
        printed, value = ratio(times, "1000", "100")
        said = verdict(value, 1.1) if "TraceEnum" not in name else ""
        rows.append((name, milliseconds(times, "1000"), milliseconds(times, "100"), printed, said))
    title = f"A chain of {STATES} states: 1,000 steps against 10 times 100"
    report.table(title, ("", "ms, 1,000 steps", "ms, 10 times 100", "ratio", ""), rows)
    report.remark(
        "Equal work on both sides. A full pass of Python's garbage collector comes once for so many objects that live "
        "for a while, and looks at the libraries too, unless they are frozen."
    )
    report.write()


if __name__ == "__main__":
    main()
