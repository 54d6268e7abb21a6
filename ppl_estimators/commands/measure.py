"""`ppl-estimators report`, `compare` and `recommend`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ppl_estimators.backends import Library
from ppl_estimators.commands import programs
from ppl_estimators.commands.output import CommandError, folder, show

PROGRAM = f"{', '.join(programs.BUILT_IN)}, or module:function of your own, which returns (model, guide) or with args."


Backend = Annotated[Library, typer.Option(help="The library of the program.")]
Draws = Annotated[int, typer.Option(min=2, help="Gradients to draw, of each estimator.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all draws, and of the parameters' starting point.")]
Budget = Annotated[int, typer.Option(min=50, help="Gradients to draw of each candidate in the last round.")]
Particles = Annotated[int, typer.Option(min=1, help="Particles a step, unless an estimator needs more.")]
Json = Annotated[bool, typer.Option("--json", help="Print every number as JSON instead of the table.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the numbers (JSON) and a figure (PNG).", file_okay=False)]


def report(
    program: Annotated[str, typer.Argument(help=PROGRAM)] = "mixture",
    estimator: Annotated[
        str, typer.Option(help='"default", a stock ELBO by name, or an estimator: "Reinforce(LeaveOneOut())".')
    ] = "default",
    backend: Backend = Library.numpyro,
    draws: Draws = 500,
    particles: Particles = 1,
    seed: Seed = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Where the noise of a gradient is: by parameter, and by site.

    **By parameter**: *signal/noise* is the length of the mean gradient over the standard deviation of one draw. Below
    one, most of a step is noise. *Share of variance* says which parameter has it.

    **By site**: each site's part of the gradient, wherever it flows. The site with the largest share is the one whose
    estimator is worth changing.

    **Examples**

    - `ppl-estimators report bits --estimator "Reinforce()"`
    - `ppl-estimators report mine:program --backend pyro --draws 200`
    """
    from ppl_estimators import diagnostics
    from ppl_estimators.diagnostics import candidates

    model, guide, args = programs.load(program, backend)

    def run() -> Any:
        _, plan = candidates.opened("report", model, guide, args, None, seed=seed, backend=backend, particles=particles)
        name: Any = {} if estimator == "default" else estimator
        chosen = candidates.resolve(name, None, backend, guide, plan, particles)
        return diagnostics.gradient_report(chosen.elbo, model, chosen.guide, *args, num_draws=draws, seed=seed)

    _shown(run, json, out, "report")


def compare(
    program: Annotated[str, typer.Argument(help=PROGRAM)] = "bit",
    estimator: Annotated[
        list[str] | None, typer.Option(help='One to compare; give it several times. As in "report".')
    ] = None,
    backend: Backend = Library.numpyro,
    draws: Draws = 1000,
    particles: Particles = 1,
    seed: Seed = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Several estimators of one gradient: noise, price and bias, best *variance × ms* first.

    *Variance × ms* is the noise that a fixed budget of time leaves. *Bias* is measured against the exact gradient
    where the program is small enough to enumerate, else against a long run; beside it stands what noise alone would
    make it.

    **Examples**

    - `ppl-estimators compare bit`
    - `ppl-estimators compare bits --estimator DisARM --estimator "Reinforce(LeaveOneOut())" --draws 500`
    - `ppl-estimators compare mine:program --backend pyro --out comparison`
    """
    from ppl_estimators import diagnostics

    model, guide, args = programs.load(program, backend)
    names = estimator or ["default", "Reinforce", "Reinforce(LeaveOneOut())", "TraceGraph_ELBO"]

    counts: dict[str, Any] = {"num_draws": draws, "num_particles": particles, "seed": seed}
    _shown(lambda: diagnostics.compare(model, guide, args, names, backend=backend, **counts), json, out, "comparison")


def recommend(
    program: Annotated[str, typer.Argument(help=PROGRAM)] = "bit",
    backend: Backend = Library.pyro,
    draws: Budget = 600,
    particles: Particles = 1,
    seed: Seed = 0,
    json: Json = False,
    out: Out = None,
) -> None:
    """Choose an estimator for each site by measuring those that it admits.

    Only unbiased estimators that need no training take part; at each site the better half goes on with twice the
    draws, and sites that are alike share one choice. Then the choices are measured together, against the default and
    against each runner-up, here and after 200 steps of training.

    **The first table** is the answer, and what it would cost to take the runner-up instead; below it stand the lines
    to paste. **The second** is the joint measurement. `--json` and `--out` also give every estimator that was tried.

    NumPyro compiles every candidate, so there it takes longer.

    **Examples**

    - `ppl-estimators recommend mixture --draws 300`
    - `ppl-estimators recommend mine:program --out recommendation`
    """
    from ppl_estimators import diagnostics

    model, guide, args = programs.load(program, backend)

    counts: dict[str, Any] = {"budget": draws, "num_particles": particles, "seed": seed}
    _shown(lambda: diagnostics.recommend(model, guide, args, backend=backend, **counts), json, out, "recommendation")


def _shown(run: Callable[[], Any], json: bool, out: Path | None, stem: str) -> None:
    from ppl_estimators import EstimatorError, EstimatorWarning

    if out is not None:
        folder(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        try:
            result = run()
        except EstimatorError as error:
            raise CommandError(str(error)) from None
    show(result, out, stem, stem, json=json)
