"""Which of the stock ELBOs' defects `ppl_estimators.testing.assert_unbiased` finds.

    python benchmarks/stock_unbiased.py            # run, print, and rewrite the tables in docs/testing.md
    python benchmarks/stock_unbiased.py --rows 4 7 # run and print some rows of the first table only

Every row asks `assert_unbiased(stock ELBO, model, guide)` about a model of the zoo (the bounds with able_to_see=0.1),
and the same about `EstimatorELBO`. The second table is how often it raises a false alarm, and how often it finds a bias
of exactly the size that it promises to see, each over 200 repetitions. All draws are seeded; it takes some
minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro.infer
import pyro
import pyro.infer
import torch

from ppl_estimators import EstimatorError, ImportanceWeighted
from ppl_estimators import numpyro as ours_numpyro
from ppl_estimators import pyro as ours_pyro
from ppl_estimators.numpyro.gradients import Gradients
from ppl_estimators.testing import Biased, TooFewDraws, assert_unbiased, zoo
from ppl_estimators.testing.draws import Differences
from ppl_estimators.testing.power import Wanted, measure

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "testing.md"


@dataclass(frozen=True)
class Row:
    """A stock ELBO on a case of the zoo. ``reference``: where the objective is not the ELBO."""

    number: int
    library: str
    elbo: str
    what: str
    case: zoo.Case
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    program: Callable[..., Any] | None = None
    bound: bool = False

    def ask(self, elbo: Any, ours: bool = False) -> str:
        case = zoo.CASES[self.case.name.partition("_bound")[0]] if self.bound else self.case
        language = zoo.language(self.library)
        program = case.program if ours or self.program is None else self.program
        model, guide = program(language, case.params)
        reference = self.case.exact_gradient() if self.bound else None
        see = 0.1 if self.bound else 0.05
        pyro.clear_param_store()
        try:
            with pyro.validation_enabled(case.strict):
                found = assert_unbiased(
                    elbo, model, guide, reference=reference, able_to_see=see, max_draws=400_000, nodes=48
                )
        except Biased as error:
            name, sigmas = max(error.sigmas.items(), key=lambda item: np.max(item[1]))
            far = "without any noise" if np.isinf(np.max(sigmas)) else f"{np.max(sigmas):,.0f} standard errors"
            return f"**biased**: `{name}`, {far}"
        except (TooFewDraws, EstimatorError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
            return f"`{type(error).__name__}`"
        return f"passes, {found.draws:,} draws"

    def stock(self) -> str:
        library = pyro.infer if self.library == "pyro" else numpyro.infer
        return self.ask(getattr(library, self.elbo)(**self.options))

    def mine(self) -> str:
        library = ours_pyro if self.library == "pyro" else ours_numpyro
        return self.ask(library.EstimatorELBO(**{"num_particles": 4, **self.ours}), ours=True)


def rows() -> Iterable[Row]:
    c = zoo.CASES
    graph = "TraceGraph_ELBO"
    many = {"num_particles": 1000, "vectorize_particles": True}
    yield Row(1, "numpyro", graph, "subsampling: the score is scaled twice", c["subsample"])
    yield Row(1, "numpyro", graph, "`handlers.scale`: the same", c["scaled"])
    yield Row(2, "numpyro", graph, "`scan`: no credit for later steps", c["over_time"])
    yield Row(
        3, "numpyro", "TraceEnum_ELBO", "guide and model on different minibatches", c["amortised"],
        program=lambda ppl, init: zoo.minibatches.amortised(ppl, init, infer={"enumerate": "parallel"}),
    )  # fmt: skip
    yield Row(4, "numpyro", graph, "masked latent: the score is masked too", c["masked_by_handler"])
    yield Row(5, "numpyro", graph, "`Bernoulli(logits=0.)` in the guide", c["single_zero"])
    yield Row(5, "numpyro", graph, "`Bernoulli(logits=0.)` in the model", c["single_zero_model"])
    bound = zoo.bound(c["chain"], 2, 0.0)
    two = {"alpha": 0, "num_particles": 2}
    mine = {"num_particles": 2, "objective": ImportanceWeighted()}
    yield Row(6, "pyro", "RenyiELBO", "importance-weighted bound, discrete guide", bound, two, mine, bound=True)
    yield Row(6, "numpyro", "RenyiELBO", "the same", bound, two, mine, bound=True)
    yield Row(7, "pyro", "Trace_ELBO", "`is_auxiliary`: −log q is missing", c["auxiliary"], many, many)
    yield Row(14, "numpyro", "Trace_ELBO", "a mixture's weights get no gradient", c["mixture"])
    yield Row(15, "numpyro", graph, "a batch dimension that no plate declares", c["undeclared"])
    undeclared = {**many, "max_plate_nesting": 1}
    yield Row(15, "pyro", graph, "the same", c["undeclared"], undeclared, undeclared)
    yield Row(16, "pyro", graph, "`if z.item():`", c["branching"], ours={"num_particles": 1})
    yield Row(18, "pyro", graph, "a plate entered twice", c["reentered_same_plate"], many, many)
    yield Row(18, "numpyro", graph, "the same", c["reentered_same_plate"])


HEAD = "| defect | stock ELBO | what it does wrong | `assert_unbiased(stock)` | `assert_unbiased(EstimatorELBO)` |"
LIBRARIES = {"pyro": "Pyro", "numpyro": "NumPyro"}


def rates(repetitions: int = 200) -> Iterable[str]:
    """False alarms and detections: the gradient of a zoo case, and a reference moved by exactly 5% of its length, in
    the direction that is hardest to see (along the standard deviations)."""
    case, wanted = zoo.CASES["masked_by_handler"], Wanted()
    model, guide = case.build("numpyro")
    exact = case.exact_gradient()
    draws = Differences(Gradients(ours_numpyro.EstimatorELBO(), model, guide, params=case.params), exact, 0)
    flat = np.concatenate([np.ravel(g) for g in exact.values()])
    length = float(np.linalg.norm(flat))
    sums = draws(10**8, 20_000)
    direction = np.sqrt(sums.squares / sums.draws)
    direction *= wanted.able_to_see * length / np.linalg.norm(direction)

    def found(shift: np.ndarray) -> float:
        raised = 0
        for i in range(repetitions):

            def source(first: int, n: int, i: int = i) -> Any:
                s = draws(500_000 * i + first, n)
                return s._replace(
                    total=s.total + s.draws * shift, squares=s.squares + 2 * shift * s.total + s.draws * shift**2
                )

            raised += measure(source, length, wanted, 200_000).biased
        return raised / repetitions

    yield f"| no bias | at most {wanted.false_alarms:.0%} | {found(0 * direction):.1%} |"
    to_see, seen = f"{wanted.able_to_see:.0%}", f"at least {wanted.detection:.0%}"
    yield f"| a bias of {to_see}, along the noise | {seen} | {found(direction):.1%} |"
    yield f"| every entry {to_see} too long | {seen} | {found(wanted.able_to_see * flat):.1%} |"


def rewrite(name: str, table: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    DOCUMENT.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="run these, write nothing")
    chosen = parser.parse_args().rows
    logging.getLogger("pyro").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    lines = [HEAD, "|---|---|---|---|---|"]
    for row in rows():
        if chosen is None or row.number in chosen:
            cells = (str(row.number), f"{LIBRARIES[row.library]} `{row.elbo}`", row.what, row.stock(), row.mine())
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if chosen is None:
        measured = ["| | promised | raised `Biased`, of 200 |", "|---|---|---|", *rates()]
        print("\n".join(measured))
        rewrite("stock-unbiased", "\n".join(lines))
        rewrite("rates", "\n".join(measured))
        print(f"wrote {DOCUMENT}", file=sys.stderr)


if __name__ == "__main__":
    main()
