"""How the price of a step grows with sites, particles, other values, time and plates, beside the stock ELBO.

NumPyro: one jitted `svi.update`; CPU seconds to trace and compile it, and the temporary memory that XLA plans. Pyro:
one uncompiled `svi.step`; CPU seconds of the first three, in which the program is looked at, and what is held for the
backward pass. Growth is the exponent from one size to the next: 1 is a straight line, 0 a price that does not change.
"""

from __future__ import annotations

import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import torch
from _harness import RESULTS, Report, arguments
from numpyro.contrib.control_flow import scan
from rich.progress import track

from ppl_estimators import Enumerate, LeaveOneOut, Reinforce
from ppl_estimators.figures import BLUE, INK, ORANGE, heading, panels
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.pyro import EstimatorELBO as PyroELBO

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
MIB = 2**20
SIZES = {
    "sites": (10, 50, 200, 1000),
    "particles": (1, 4, 16, 64),
    "evaluations": (1, 4, 16, 64),
    "steps of time": (10, 100, 1000),
    "elements of a plate": (100, 10_000, 1_000_000),
}
PIXELS, HIDDEN, BATCH = 100, 50, 20
Program = tuple[Callable[[Any], Any], Callable[[Any], Any], tuple[int, ...]]  # model, guide, shape of the data


class Price(NamedTuple):
    """Milliseconds a step, seconds before the first, MiB."""

    step: float
    start: float
    memory: float


# ---- the programs, in both libraries: guide and model of some data -----------------------------------------------


def sites(ppl: Any, dist: Any, zeros: Any, n: int) -> Program:
    """Bits that do not depend on each other, each seen."""

    def model(x: Any) -> None:
        for i in range(n):
            z = ppl.sample(f"z{i}", dist.Bernoulli(zeros(1)[0] + 0.4))
            ppl.sample(f"x{i}", dist.Normal(1.0 * z, 1.0), obs=x[i])

    def guide(x: Any) -> None:
        a = ppl.param("a", zeros(n))
        for i in range(n):
            ppl.sample(f"z{i}", dist.Bernoulli(logits=a[i]))

    return model, guide, (n,)


def network(ppl: Any, dist: Any, zeros: Any, _: int) -> Program:
    """A sigmoid belief network."""

    def model(x: Any) -> None:
        w = ppl.param("w", zeros(HIDDEN, PIXELS))
        with ppl.plate("batch", BATCH):
            z = ppl.sample("z", dist.Bernoulli(logits=zeros(HIDDEN)).to_event(1))
            ppl.sample("x", dist.Bernoulli(logits=1.0 * z @ w).to_event(1), obs=x)

    def guide(x: Any) -> None:
        v = ppl.param("v", zeros(PIXELS, HIDDEN))
        with ppl.plate("batch", BATCH):
            ppl.sample("z", dist.Bernoulli(logits=x @ v).to_event(1))

    return model, guide, (BATCH, PIXELS)


def label(ppl: Any, dist: Any, zeros: Any, n: int, *, marked: bool = False) -> Program:
    """A label of n + 1 categories that decides where data lie; ``marked``, for the stock ELBO that sums over it."""
    infer = {"enumerate": "parallel"} if marked else {}

    def model(x: Any) -> None:
        w = ppl.param("w", zeros(n + 1, 500))
        k = ppl.sample("k", dist.Categorical(logits=zeros(n + 1)))
        with ppl.plate("data", 100):
            ppl.sample("x", dist.Normal(w[k], 1.0).to_event(1), obs=x)

    def guide(x: Any) -> None:
        ppl.sample("k", dist.Categorical(logits=ppl.param("a", zeros(n + 1))), infer=infer)

    return model, guide, (100, 500)


def plate(ppl: Any, dist: Any, zeros: Any, n: int) -> Program:
    """A bit for each datum."""

    def model(x: Any) -> None:
        with ppl.plate("data", n):
            z = ppl.sample("z", dist.Bernoulli(zeros(n) + 0.4))
            ppl.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with ppl.plate("data", n):
            ppl.sample("z", dist.Bernoulli(logits=ppl.param("a", zeros(n))))

    return model, guide, (n,)


def scanned(n: int) -> Program:
    """A hidden Markov model of bits in NumPyro's `scan`."""

    def steps(logits: Any, x: Any) -> None:
        def step(before: Any, given: Any) -> Any:
            z = numpyro.sample("z", ndist.Bernoulli(logits=given[0] + before)).astype(float)
            if x is not None:
                numpyro.sample("x", ndist.Normal(z, 1.0), obs=given[1])
            return z, None

        scan(step, 0.0, (logits, x), length=n)

    return lambda x: steps(jnp.zeros(n), x), lambda x: steps(numpyro.param("a", jnp.zeros(n)), None), (n,)


def looped(n: int) -> Program:
    """The same as a loop of Pyro's."""

    def steps(logits: Any, x: Any) -> None:
        z = torch.zeros(())
        for t in pyro.markov(range(n)):
            z = pyro.sample(f"z{t}", pdist.Bernoulli(logits=logits[t] + z))
            if x is not None:
                pyro.sample(f"x{t}", pdist.Normal(z, 1.0), obs=x[t])

    return lambda x: steps(torch.zeros(n), x), lambda x: steps(pyro.param("a", lambda: torch.zeros(n)), None), (n,)


Contest = dict[str, tuple[Program, Any]]


def in_numpyro(axis: str, n: int) -> Contest:
    ppl, dist, infer = numpyro, ndist, numpyro.infer
    zeros = lambda *shape: jnp.zeros(shape)  # noqa: E731
    if axis == "evaluations":
        theirs = label(ppl, dist, zeros, n, marked=True), infer.TraceEnum_ELBO()
        return {"ours": (label(ppl, dist, zeros, n), NumPyroELBO(Enumerate())), "stock": theirs}
    if axis == "steps of time":
        return {"ours": (scanned(n), NumPyroELBO(Reinforce())), "stock": (scanned(n), infer.Trace_ELBO())}
    program = {"sites": sites, "particles": network, "elements of a plate": plate}[axis](ppl, dist, zeros, n)
    k = n if axis == "particles" else 1
    ours = NumPyroELBO(Reinforce(LeaveOneOut()) if k > 1 else Reinforce(), num_particles=k)
    return {"ours": (program, ours), "stock": (program, infer.TraceGraph_ELBO(num_particles=k))}


def in_pyro(axis: str, n: int) -> Contest:
    ppl, dist, infer, zeros = pyro, pdist, pyro.infer, torch.zeros
    if axis == "evaluations":
        theirs = label(ppl, dist, zeros, n, marked=True), infer.TraceEnum_ELBO(max_plate_nesting=1)
        return {"ours": (label(ppl, dist, zeros, n), PyroELBO(Enumerate())), "stock": theirs}
    if axis == "steps of time":
        program = looped(n)
    else:
        program = {"sites": sites, "particles": network, "elements of a plate": plate}[axis](ppl, dist, zeros, n)
    k = n if axis == "particles" else 1
    ours = PyroELBO(Reinforce(LeaveOneOut()) if k > 1 else Reinforce(), num_particles=k)
    return {"ours": (program, ours), "stock": (program, infer.Trace_ELBO(num_particles=k))}


def data(shape: tuple[int, ...]) -> Any:
    """Bits, an argument of each step: from zeros that it knows, a compiler would work out a good part beforehand."""
    return (np.random.default_rng(0).random(shape) < 0.3).astype(np.float32)


# ---- what they cost ----------------------------------------------------------------------------------------------


def numpyro_prices(contest: Contest) -> dict[str, Price]:
    steps, found = {}, {}
    for name, ((model, guide, shape), loss) in contest.items():
        svi, x = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), loss), jnp.asarray(data(shape))
        state = svi.init(jax.random.key(0), x)
        jax.clear_caches()
        start = time.process_time()
        compiled = jax.jit(svi.update).lower(state, x).compile()
        found[name] = time.process_time() - start, compiled.memory_analysis().temp_size_in_bytes / MIB
        steps[name] = lambda compiled=compiled, given=(state, x): jax.block_until_ready(compiled(*given))
    return _timed(steps, found)


def pyro_prices(contest: Contest) -> dict[str, Price]:
    steps, found = {}, {}
    for name, ((model, guide, shape), loss) in contest.items():
        pyro.clear_param_store()
        x = torch.as_tensor(data(shape))
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        start = time.process_time()
        for _ in range(3):
            svi.step(x)
        first, held = time.process_time() - start, {}

        def hold(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            svi.step(x)
        found[name], steps[name] = (first, sum(held.values()) / MIB), partial(svi.step, x)
    return _timed(steps, found)


def _timed(steps: Mapping[str, Callable[[], object]], found: Mapping[str, tuple[float, float]]) -> dict[str, Price]:
    """CPU time a step, of the fastest of five turns, in alternation (three if they are long). A turn is eight steps,
    or as many as take 20 ms, and begins with nothing to collect: each pays for the garbage that it makes, and for no
    other's."""
    best = dict.fromkeys(steps, math.inf)
    until = time.process_time() + 8
    for i in range(5):
        for name, step in steps.items():
            gc.collect()
            count, start = 0, time.process_time()
            while count < 8 or time.process_time() < start + 0.02:
                step()
                count += 1
            best[name] = min(best[name], (time.process_time() - start) / count)
        if i >= 2 and time.process_time() > until:
            break
    return {name: Price(1e3 * best[name], *found[name]) for name in steps}


LIBRARIES = {"Pyro": (in_pyro, pyro_prices), "NumPyro": (in_numpyro, numpyro_prices)}


def rows(prices: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    before = None
    for n, found in prices.items():
        ours, stock = (Price(*found[name]) for name in ("ours", "stock"))
        growth = ""
        if before is not None:
            growth = f"{math.log(ours.step / before[1]) / math.log(int(n) / before[0]):.2f}"
        before = int(n), ours.step
        yield (
            f"{int(n):,}", f"{ours.step:.2f}", f"{stock.step:.2f}", f"{ours.step / stock.step:.2f}", growth,
            f"{ours.start:.2f}", f"{stock.start:.2f}", f"{ours.memory:.2f}", f"{stock.memory:.2f}",
        )  # fmt: skip


def draw(shown: Mapping[str, Any], path: Path) -> None:
    columns = len(SIZES)
    figure, axes = panels(columns, width=9 / columns, height=2.3, rows=len(LIBRARIES))
    for i, (library, what) in enumerate((library, what) for library in LIBRARIES for what in SIZES):
        prices = shown[library][what]
        for name, colour in (("stock", ORANGE), ("ours", BLUE)):
            axes[i].loglog([int(n) for n in prices], [p[name][0] for p in prices.values()], "o-", color=colour, ms=4)
        axes[i].xaxis.set_minor_formatter("")
        axes[i].yaxis.set_minor_formatter("")
        if i < columns:
            heading(axes[i], what.replace("elements of a plate", "plate"))
        if i % columns == 0:
            axes[i].set_ylabel(f"{library}, ms a step", color=INK)
    axes[0].legend(
        axes[0].get_lines(), ["stock", "ours"], frameon=False, labelcolor=INK, fontsize=8.5, loc="lower right"
    )
    figure.savefig(path)


def main() -> None:
    most = arguments(__doc__, numpyro_sites=50).numpyro_sites  # 200 take XLA four minutes, both losses together
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report("growth", "How the price of a step grows")
    shown: dict[str, Any] = {library: {axis: {} for axis in SIZES} for library in LIBRARIES}
    jobs = [(library, axis, n) for library in LIBRARIES for axis, sizes in SIZES.items() for n in sizes]
    jobs = [j for j in jobs if j[:2] != ("NumPyro", "sites") or j[2] <= most]
    for library, axis, n in track(jobs, "sizes", transient=True):
        contest, prices = LIBRARIES[library]
        start = time.process_time()
        shown[library][axis][str(n)] = prices(contest(axis, n))
        (RESULTS / "growth.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        print(library, axis, n, f"{time.process_time() - start:.0f} s", flush=True)
    columns = ("", "ours, ms", "stock, ms", "ratio", "growth", "start, s", "stock, s", "MiB", "stock, MiB")
    for library in LIBRARIES:
        for axis in SIZES:
            report.table(f"{library}: {axis}", (axis, *columns[1:]), list(rows(shown[library][axis])))
    draw(shown, FIGURES / "growth.png")
    report.write()


if __name__ == "__main__":
    main()
