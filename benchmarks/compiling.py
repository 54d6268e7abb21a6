"""NumPyro: what the choice of estimators costs to compile, on chains, a tree and one site of a hundred values.

CPU seconds of tracing and compiling one update, caches emptied before each, and operations of the traced program, which
no other load of the machine changes; against NumPyro's own ELBO of the same program. Then one `svi.update` called from
Python, without `jax.jit`, and a jitted one, CPU time as well.
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
from _harness import Report, arguments, ratio, take_turns, verdict
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.optim import Adam

from ppl_estimators import DisARM, Enumerate
from ppl_estimators.numpyro import EstimatorELBO

Program = tuple[Callable[[], Any], Callable[[], Any]]


def tree(count: int, branches: int) -> Program:
    """Bits, each given its parent, and each seen; a chain has one branch."""

    def draw(logits: Any, observe: bool) -> None:
        z: list[Any] = []
        for i in range(count):
            parent = z[(i - 1) // branches] if i else 0.0
            z.append(numpyro.sample(f"z{i}", dist.Bernoulli(logits=logits[i] + parent)))
            if observe:
                numpyro.sample(f"x{i}", dist.Normal(z[i], 1.0), obs=0.4)

    def guide() -> None:
        draw(numpyro.param("a", jnp.linspace(-1.0, 1.0, count)), False)

    return lambda: draw(jnp.full(count, 0.3), True), guide


def hundred(enumerate_: bool) -> Program:
    infer = {"enumerate": "parallel"} if enumerate_ else {}

    def model() -> None:
        k = numpyro.sample("k", dist.Categorical(logits=jnp.zeros(100)))
        with numpyro.plate("data", 20):
            loc = numpyro.param("w", jnp.linspace(-1.0, 1.0, 100))[k]
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=jnp.linspace(0.0, 1.0, 20))

    def guide() -> None:
        numpyro.sample("k", dist.Categorical(logits=numpyro.param("a", jnp.zeros(100))), infer=infer)

    return model, guide


def normals(count: int) -> Program:
    def model() -> None:
        total = sum(numpyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(count))
        numpyro.sample("x", dist.Normal(total, 1.0), obs=0.4)

    def guide() -> None:
        a = numpyro.param("a", jnp.zeros(count))
        for i in range(count):
            numpyro.sample(f"z{i}", dist.Normal(a[i], 0.5))

    return model, guide


Contestant = tuple[Program, Any]
CONTESTS: dict[str, tuple[Contestant, dict[str, tuple[Contestant, float]]]] = {
    f"{kind} of {count} bits": (
        (tree(count, branches), TraceGraph_ELBO()),
        {
            "default": ((tree(count, branches), EstimatorELBO()), 1.5),
            "DisARM()": ((tree(count, branches), EstimatorELBO(DisARM())), 2.5),
        },
    )
    for kind, count, branches in (("chain", 10, 1), ("tree", 15, 2), ("chain", 50, 1))
}
CONTESTS["one site of 100 values"] = (
    (hundred(True), TraceEnum_ELBO()),
    {"Enumerate()": ((hundred(False), EstimatorELBO(Enumerate())), 1.5)},
)


def compiled(contestant: Contestant) -> tuple[float, float, int]:
    """CPU seconds to trace and to compile one update, and its operations."""
    (model, guide), loss = contestant
    svi = SVI(model, guide, Adam(1e-3), loss)
    state = svi.init(jax.random.key(1))
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(svi.update).lower(state)
    traced = time.process_time()
    lowered.compile()
    return traced - start, time.process_time() - traced, lowered.as_text().count(" = ")


def stepping(contestant: Contestant, jit: bool) -> Callable[[], object]:
    (model, guide), loss = contestant
    svi = SVI(model, guide, Adam(1e-3), loss)
    state = svi.init(jax.random.key(1))
    update = jax.jit(svi.update) if jit else svi.update
    return lambda: jax.block_until_ready(update(state))


def main() -> None:
    options = arguments(__doc__, rounds=2, steps=20)
    warnings.simplefilter("ignore")
    report = Report("compiling", "NumPyro: what a choice costs to compile")
    rows = []
    for program, (theirs, ours) in CONTESTS.items():
        several = {"theirs": theirs, **{n: c for n, (c, _) in ours.items()}}
        found = {n: min((compiled(c) for _ in range(options.rounds)), key=sum) for n, c in several.items()}
        stock = sum(found["theirs"][:2])
        rows.append((program, type(theirs[1]).__name__, *_cells(found["theirs"]), "", ""))
        for name, (_, target) in ours.items():
            value = sum(found[name][:2]) / stock
            rows.append((program, name, *_cells(found[name]), f"{value:.2f}", verdict(value, target)))
        print(*rows[-len(several) :], sep="\n", flush=True)
    columns = ("program", "loss", "tracing, s", "compiling, s", "operations", "ratio", "target")
    report.table("Compile time, CPU seconds", columns, rows)
    rows = []
    for program, these, stock in (
        ("chain of 5 bits", tree(5, 1), TraceGraph_ELBO()),
        ("5 normals", normals(5), Trace_ELBO()),
    ):
        for title, jit in (("called from Python", False), ("jitted", True)):
            several = {"theirs": stepping((these, stock), jit), "default": stepping((these, EstimatorELBO()), jit)}
            repeats = 20 if jit else 1
            times = take_turns(title, several, options.steps, warmup=2, repeats=repeats, clock=time.process_time)
            shown, value = ratio(times, "default", "theirs")
            rows.append((program, f"svi.update, {title}", type(stock).__name__, shown, verdict(value, 1.2)))
    report.table("Dispatch, the default", ("program", "step", "against", "ratio (quartiles)", "target"), rows)
    report.write()


def _cells(found: tuple[float, float, int]) -> tuple[str, str, str]:
    return f"{found[0]:.2f}", f"{found[1]:.2f}", f"{found[2]:,}"


if __name__ == "__main__":
    main()
