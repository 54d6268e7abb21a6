"""What the stock ELBOs of Pyro and NumPyro return where the exact gradient is known, and what ours does.

    python benchmarks/stock_defects.py            # measure, print, and rewrite the table in docs/why.md
    python benchmarks/stock_defects.py --rows 4 9 # measure and print some rows only

Every row is a model of a few states whose ELBO is an explicit sum, differentiated without any of the two
libraries (ppl_estimators/testing/zoo/oracle.py); "exact" is that. "Stock" is the mean over many steps of the
library's own ELBO, or the exception it raises; "ours" is `EstimatorELBO` on the same program. ± is one standard error
of the mean. All numbers are derivatives of the loss, −ELBO. Takes three minutes on two free cores; draws are seeded.
Milliseconds are of this machine: compare them with each other only.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "laws"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.infer  # noqa: E402
import pyro  # noqa: E402
import pyro.infer  # noqa: E402
import torch  # noqa: E402
from measure import Measured, numpyro_measure, pyro_measure  # noqa: E402
from numpyro import optim  # noqa: E402

from ppl_estimators import (  # noqa: E402
    Enumerate,
    ImportanceWeighted,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
)
from ppl_estimators import numpyro as ours_numpyro  # noqa: E402
from ppl_estimators import pyro as ours_pyro  # noqa: E402
from ppl_estimators.testing import zoo  # noqa: E402
from ppl_estimators.testing.zoo import CASES, Case, NumPyroLanguage, PyroLanguage  # noqa: E402  # noqa: E402

DOCUMENT = ROOT / "docs" / "why.md"
BEGIN, END = "<!-- stock-defects:start -->", "<!-- stock-defects:end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table; `stock`, `exact` and `ours` are what is shown."""

    number: str
    elbo: str
    happens: str
    stock: str
    exact: str
    ours: str

    def markdown(self) -> str:
        cells = (self.number, self.elbo, self.happens, self.stock, self.exact, self.ours)
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


# Showing numbers.


def number(x: float, digits: int = 3) -> str:
    return f"{x + 0.0:.{digits}f}".replace("-", "−")


def numbers(values: Any, digits: int = 3) -> str:
    flat = [number(x, digits) for x in np.ravel(np.asarray(values))]
    return flat[0] if len(flat) == 1 else f"({', '.join(flat)})"


def mean(measured: Measured, name: str) -> str:
    """Mean and the largest standard error."""
    error = float(np.max(measured.error()[name]))
    digits = max(1, -math.floor(math.log10(error))) if error > 1e-9 else 3
    shown = numbers(measured.mean()[name], max(digits, 3))
    return shown if error < 1e-9 else f"{shown} ± {number(error, digits)}"


def exact(case: Case, name: str) -> str:
    return numbers(case.exact_gradient()[name])


def raised(run: Callable[[], Any]) -> str:
    """The exception that a call ends in, on one line."""
    try:
        run()
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 90 else text[:87] + "..."
        return f"`{type(error).__name__}: {text}`"
    return "no error"


# Measuring.


def in_pyro(elbo: Any, case: Case, steps: int = 60, hook: Any = None) -> Measured:
    return pyro_measure(elbo, case, steps, hook=hook)


def in_numpyro(elbo: Any, case: Case, draws: int = 200_000, hook: Any = None) -> Measured:
    return numpyro_measure(elbo, case, draws, hook=hook)(0)


def many(elbo: Callable[..., Any], case: Case, **options: Any) -> Any:
    """A Pyro ELBO that averages thousands of particles."""
    nesting = {} if case.nesting is None else {"max_plate_nesting": case.nesting}
    return elbo(num_particles=4_000, vectorize_particles=True, **nesting, **options)


def gradient_rows(
    label: str,
    happens: str,
    case: Case,
    name: str,
    stock: dict[str, Callable[[], Any]],
    *,
    estimators: Any = None,
    hook: Any = None,
) -> Iterable[Row]:
    """A row per stock ELBO that is wrong on a case, in either library."""
    for letter, (who, elbo) in zip("abc", stock.items(), strict=False):
        own_label = label + letter if len(stock) > 1 else label
        if who.startswith("NumPyro"):
            theirs = in_numpyro(elbo(), case)
            mine = in_numpyro(ours_numpyro.EstimatorELBO(estimators, num_particles=4), case, hook=hook)
        else:
            theirs = in_pyro(many(elbo, case), case)
            mine = in_pyro(many(partial(ours_pyro.EstimatorELBO, estimators), case), case, hook=hook)
        yield Row(own_label, who, happens, mean(theirs, name), exact(case, name), mean(mine, name))


# The rows.


def subsampling() -> Iterable[Row]:
    yield from gradient_rows(
        "1a",
        "under `plate(..., subsample_size=...)` the score is multiplied by N/B once more than it should be "
        "(here N/B = 2)",
        CASES["subsample"],
        "b",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )
    yield from gradient_rows(
        "1b",
        "the same with `handlers.scale(scale=0.1)`: a tenth of the gradient is left",
        CASES["scaled"],
        "a",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )


def scans() -> Iterable[Row]:
    yield from gradient_rows(
        "2",
        "a step of a `scan` gets no credit for what it does to later steps (one number per step)",
        CASES["over_time"],
        "a",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )


def indices() -> Iterable[Row]:
    case = CASES["amortised"]
    stock = in_numpyro(
        numpyro.infer.TraceEnum_ELBO(),
        replace(case, program=partial(zoo.minibatches.amortised, infer={"enumerate": "parallel"})),
    )
    mine = in_numpyro(ours_numpyro.EstimatorELBO({"z": Enumerate()}), case)
    yield Row(
        "3",
        "NumPyro `TraceEnum_ELBO`",
        "guide and model draw different subsample indices: the guide is judged on other data than it has seen",
        mean(stock, "c"),
        exact(case, "c"),
        mean(mine, "c"),
    )


def masks() -> Iterable[Row]:
    yield from gradient_rows(
        "4",
        "the score of a masked latent is masked too: no gradient, although the latent acts on what is observed "
        "(the second of three is masked)",
        CASES["masked_by_handler"],
        "a",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )


def zero_logits() -> Iterable[Row]:
    yield from gradient_rows(
        "5a",
        "`Bernoulli(logits=0.)` in the guide: log_prob has the derivatives 0 and 1 where −½ and ½ are right, and 0 "
        "is how many networks start",
        CASES["single_zero"],
        "a",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )
    yield from gradient_rows(
        "5b",
        "the same in the model",
        CASES["single_zero_model"],
        "t",
        {"NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO},
    )


def bounds() -> Iterable[Row]:
    case = zoo.bound(CASES["chain"], 2, 0.0)
    shown = partial(mean, name="a")
    options = {"num_particles": 2, "objective": ImportanceWeighted()}
    copies = zoo.copies(case, 4_000)
    stock = in_pyro(pyro.infer.RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True), copies)
    mine = in_pyro(ours_pyro.EstimatorELBO(vectorize_particles=True, **options), copies)
    happens = "importance-weighted bound (K = 2), discrete guide: the guide's gradient is "
    yield Row(
        "6a",
        "Pyro `RenyiELBO`",
        happens + "0, always",
        shown(stock.divided_by(4_000)),
        exact(case, "a"),
        shown(mine.divided_by(4_000)),
    )
    yield Row(
        "6b",
        "NumPyro `RenyiELBO`",
        happens + "that of another objective, here of the wrong sign",
        shown(in_numpyro(numpyro.infer.RenyiELBO(alpha=0, num_particles=2), case)),
        exact(case, "a"),
        shown(in_numpyro(ours_numpyro.EstimatorELBO(**options), case)),
    )


def auxiliary() -> Iterable[Row]:
    yield from gradient_rows(
        "7",
        "a discrete guide site marked `is_auxiliary`: its −log q is missing from its own signal",
        CASES["auxiliary"],
        "a",
        {"Pyro `Trace_ELBO`": pyro.infer.Trace_ELBO},
    )


def modules() -> Iterable[Row]:
    model, guide = CASES["chain"].program(PyroLanguage(), CASES["chain"].params)
    names = ("TraceGraph_ELBO", "JitTraceGraph_ELBO", "RenyiELBO", "ReweightedWakeSleep")
    messages = set()
    for name in names:
        pyro.clear_param_store()
        elbo = getattr(pyro.infer, name)(num_particles=2)
        messages.add(raised(lambda elbo=elbo: elbo(model, guide)()).replace(name, "..."))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = ours_pyro.EstimatorELBO(num_particles=2)(model, guide)()
    loss.backward()
    yield Row(
        "8",
        "Pyro " + ", ".join(f"`{n}`" for n in names),
        "`elbo(model, guide)` as a module, for plain torch optimisers: it is built, and fails when called",
        "; ".join(sorted(messages)),
        "a loss",
        f"a loss ({number(loss.item())}), and its gradient",
    )


def averages() -> Iterable[Row]:
    """A decaying average over minibatches of 8, 8 and 5."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Bernoulli(logits=torch.tensor(-0.4)))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    infer = {"baseline": {"use_decaying_avg_baseline": True}}

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = pyro.distributions.Bernoulli(logits=pyro.param("a", torch.tensor(0.7)))
            pyro.sample("z", fn, infer=infer)

    def steps(elbo: Any, guide: Any) -> str:
        pyro.clear_param_store()
        return raised(lambda: [elbo.loss_and_grads(model, guide, torch.ones(n)) for n in (8, 8, 5)])

    yield Row(
        "9",
        "Pyro `TraceGraph_ELBO`",
        "the decaying-average baseline is kept in the shape of the cost: a smaller last minibatch ends the run",
        steps(pyro.infer.TraceGraph_ELBO(), guide),
        "three steps",
        "three steps, " + steps(ours_pyro.EstimatorELBO(), ours_pyro.with_estimators(guide)),
    )


def forced() -> Iterable[Row]:
    normal = pyro.distributions.Normal(torch.zeros(2), 1.0)
    expanded = pyro.distributions.Normal(torch.zeros(2), 1.0).has_rsample_(False).expand([3, 2])
    forgets = f"`has_rsample` is {expanded.has_rsample} again"
    case = zoo.copies(CASES["wrapped"], 4_000)
    mine = ours_pyro.EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=4, vectorize_particles=True)
    yield Row(
        "10",
        "Pyro `has_rsample_(False)`; NumPyro has no way",
        "a score function by force (for a likelihood that has no gradient) through `to_event`, `expand`, `mask` or "
        "a transform",
        raised(lambda: normal.to_event(1).has_rsample_(False)) + f"; and `expand` forgets the flag: {forgets}",
        exact(CASES["wrapped"], "n"),
        mean(in_pyro(mine, case).divided_by(4_000), "n") + " with `Reinforce(LeaveOneOut())`",
    )


def rao_blackwell() -> Iterable[Row]:
    """40 independent bits; one step, one particle."""
    case = CASES["many_local"]

    def variance(elbo: Any) -> str:
        return f"total variance {pyro_measure(elbo, case, 1_500).total_variance():.3g}"

    yield Row(
        "11",
        "Pyro `TraceEnum_ELBO`",
        "sampled discrete sites lose Rao-Blackwellisation across sites: every site is credited with every cost "
        "(here 40 sites; one particle, plain score function)",
        variance(pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)),
        "",
        variance(ours_pyro.EstimatorELBO(default=Reinforce())),
    )
    yield beside_sums()


def beside_sums() -> Row:
    """20 drawn bits, each beside a summed label; one step, one particle. `TraceGraph_ELBO` gets the sum by hand."""
    normal, categorical, bits = (getattr(pyro.distributions, n) for n in ("Normal", "Categorical", "Bernoulli"))
    law, count = torch.tensor([0.2, 0.5, 0.3]), 20

    def guide() -> None:
        logits = pyro.param("a", lambda: torch.linspace(-1, 1, count))
        for i in range(count):
            pyro.sample(f"b_{i}", bits(logits=logits[i]))

    def model(by_hand: bool = False) -> None:
        for i in range(count):
            b = pyro.sample(f"b_{i}", bits(torch.tensor(0.4)))
            x = torch.tensor(0.1 * i)
            if by_hand:
                inside = law.log() + normal(torch.arange(3.0) - b, 1.0).log_prob(x)
                pyro.factor(f"x_{i}", inside.logsumexp(0))
            else:
                label = pyro.sample(f"w_{i}", categorical(law), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{i}", normal(label - b, 1.0), obs=x)

    def variance(elbo: Any, **given: bool) -> float:
        pyro.clear_param_store()
        drawn = []
        for _ in range(200):
            elbo.loss_and_grads(partial(model, **given), guide)
            parameter = pyro.param("a")
            drawn.append(parameter.grad.clone())
            parameter.grad = None
        return float(torch.stack(drawn).var(0).sum())

    by_hand = variance(pyro.infer.TraceGraph_ELBO(), by_hand=True)
    return Row(
        "11b",
        "Pyro `TraceEnum_ELBO`",
        f"the same beside sums: {count} drawn bits, each beside a label that the model sums out (200 steps)",
        f"total variance {variance(pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)):.3g}; `TraceGraph_ELBO` with the "
        f"sums written by hand {by_hand:.3g}",
        "",
        f"total variance {variance(ours_pyro.EstimatorELBO(default=Reinforce())):.3g}, and "
        f"{variance(ours_pyro.EstimatorELBO()):.3g} with the default",
    )


def speed() -> Iterable[Row]:
    def run(logits: Any) -> None:
        z: Any = torch.tensor(0.0)
        for i in range(50):
            z = pyro.sample(f"z_{i}", pyro.distributions.Bernoulli(logits=logits[i] + z))

    def model() -> None:
        run(torch.full((50,), -0.4))

    def guide() -> None:
        run(pyro.param("a", lambda: torch.full((50,), 0.3)))

    elbos = {
        "Trace": pyro.infer.Trace_ELBO(),
        "TraceGraph": pyro.infer.TraceGraph_ELBO(),
        "ours": ours_pyro.EstimatorELBO(default=Reinforce()),
    }
    pyro.clear_param_store()
    took: dict[str, list[float]] = {name: [] for name in elbos}
    for _ in range(15):  # in turn, so that other load on the machine falls on all alike
        for name, elbo in elbos.items():
            start = time.perf_counter()
            elbo.loss_and_grads(model, guide)
            took[name].append(1e3 * (time.perf_counter() - start))
    t = {name: statistics.median(ms) for name, ms in took.items()}
    yield Row(
        "12",
        "Pyro `TraceGraph_ELBO`",
        "the price of Rao-Blackwellisation, on a chain of 50 discrete sites",
        f"{t['TraceGraph'] / t['Trace']:.1f} × `Trace_ELBO` ({t['TraceGraph']:.0f} ms a step)",
        "",
        f"{t['ours'] / t['Trace']:.1f} × `Trace_ELBO` ({t['ours']:.0f} ms)",
    )


def baselines() -> Iterable[Row]:
    model, guide = CASES["chain"].program(NumPyroLanguage(), CASES["chain"].params)

    def counted() -> None:
        numpyro.primitives.mutable("count", jnp.zeros(()))
        guide()

    def stock(elbo: Any) -> str:
        svi = numpyro.infer.SVI(model, counted, optim.SGD(0.0), elbo)
        return raised(lambda: svi.update(svi.init(jax.random.key(0))))

    hooked = ours_numpyro.with_estimators(guide, {"*": Reinforce(MovingAverage())})
    svi = numpyro.infer.SVI(model, hooked, optim.SGD(0.0), ours_numpyro.EstimatorELBO())
    state = svi.run(jax.random.key(0), 200, progress_bar=False).state
    held = {**svi.get_params(state), **state.mutable_state}

    def total(guide: Any, held: dict[str, Any]) -> float:
        elbo = ours_numpyro.EstimatorELBO(default=Reinforce())
        params = {k: jnp.asarray(v) for k, v in CASES["chain"].params.items()}

        def loss(params: Any, key: Any) -> Any:
            return elbo.loss(key, {**held, **params}, model, guide)

        draws = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
        gradients = draws(params, jax.random.split(jax.random.key(1), 20_000))
        return float(sum(jnp.var(gradients[k], axis=0).sum() for k in "abc"))

    yield Row(
        "13",
        "NumPyro, all",
        "no baselines; and `TraceGraph_ELBO`, `TraceEnum_ELBO` and `RenyiELBO` refuse the mutable state that one "
        "would keep",
        stock(numpyro.infer.TraceGraph_ELBO()),
        "",
        f"variance {total(guide, {}):.2f} without, {total(hooked, held):.2f} with `MovingAverage()`",
    )


def mixtures() -> Iterable[Row]:
    yield from gradient_rows(
        "14",
        "a mixture can't be reparameterised: the gradient in its weights is silently lost",
        CASES["mixture"],
        "a",
        {"NumPyro `Trace_ELBO`": numpyro.infer.Trace_ELBO},
    )


def undeclared() -> Iterable[Row]:
    yield from gradient_rows(
        "15",
        "a batch dimension that no plate declares: elements are credited with their own costs only, though each "
        "acts on all (Pyro's validation refuses the program; here it is off)",
        CASES["undeclared"],
        "a",
        {
            "NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO,
            "Pyro `TraceGraph_ELBO`": pyro.infer.TraceGraph_ELBO,
        },
    )


def control_flow() -> Iterable[Row]:
    case = CASES["branching"]
    mine = pyro_measure(ours_pyro.EstimatorELBO({"z": Enumerate()}), case, 200)
    stock = pyro_measure(pyro.infer.TraceGraph_ELBO(), case, 4_000)
    yield Row(
        "16",
        "Pyro `TraceGraph_ELBO`",
        "`if z.item():` in the model: what comes after does not know that it depends on z, and is not credited",
        mean(stock, "a"),
        exact(case, "a"),
        mean(mine, "a"),
    )


def forgotten() -> Iterable[Row]:
    case = CASES["forgotten"]
    language = PyroLanguage()
    model, guide = case.program(language, case.params)
    pyro.clear_param_store()
    happens = "a latent of the model that the guide forgets"
    summed = f"{exact(case, 'a')} (summed out)"
    yield Row(
        "17a",
        "Pyro `Trace_ELBO`, `TraceGraph_ELBO`",
        happens + ": fails deep inside",
        raised(lambda: pyro.infer.TraceGraph_ELBO().loss_and_grads(model, guide)),
        summed,
        raised(lambda: ours_pyro.EstimatorELBO().loss_and_grads(model, guide)),
    )
    model, guide = case.program(NumPyroLanguage(), case.params)
    params = {"a": jnp.asarray(0.7)}
    yield Row(
        "17b",
        "NumPyro `TraceGraph_ELBO`",
        happens + ": is drawn from its prior, under a warning (`Found vars in model but not guide`)",
        mean(in_numpyro(numpyro.infer.TraceGraph_ELBO(), case), "a"),
        summed,
        raised(lambda: ours_numpyro.EstimatorELBO().loss(jax.random.key(0), params, model, guide)),
    )


def reentered() -> Iterable[Row]:
    yield from gradient_rows(
        "18",
        "a plate left and entered again: an element acts on the others through a site outside the plate, and is "
        "not credited with that",
        CASES["reentered_same_plate"],
        "a",
        {
            "Pyro `TraceGraph_ELBO`": pyro.infer.TraceGraph_ELBO,
            "NumPyro `TraceGraph_ELBO`": numpyro.infer.TraceGraph_ELBO,
        },
    )


ROWS: dict[int, Callable[[], Iterable[Row]]] = dict(
    enumerate(
        (
            subsampling,
            scans,
            indices,
            masks,
            zero_logits,
            bounds,
            auxiliary,
            modules,
            averages,
            forced,
            rao_blackwell,
            speed,
            baselines,
            mixtures,
            undeclared,
            control_flow,
            forgotten,
            reentered,
        ),
        start=1,
    )
)

HEAD = """| # | stock ELBO | what happens | stock | exact | ours |
|---|---|---|---|---|---|"""


def rewrite(table: str) -> None:
    """Put the table between the markers of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(ROWS), help="measure these, write nothing")
    chosen = parser.parse_args().rows
    logging.getLogger("pyro").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    lines = [HEAD]
    for index in chosen or ROWS:
        for row in ROWS[index]():
            lines.append(row.markdown())
            print(lines[-1], flush=True)
    if chosen is None:
        versions = f"pyro-ppl {pyro.__version__}, torch {torch.__version__.partition('+')[0]}, "
        versions += f"numpyro {numpyro.__version__}, jax {jax.__version__}"
        rewrite("\n".join([f"Measured with {versions}.", "", *lines]))
        print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
