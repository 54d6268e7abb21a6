"""`ppl-estimators demo`."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ppl_estimators.commands.output import CommandError, folder, show


class Backend(StrEnum):
    """Which library trains."""

    pyro = "pyro"
    numpyro = "numpyro"
    both = "both"


DISTRIBUTIONS = {"pyro": "pyro-ppl array-api-compat", "numpyro": "numpyro"}
DEMO_MODULES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def demo(
    backend: Annotated[
        Backend, typer.Option(help="The library that trains; both share one starting point.")
    ] = Backend.both,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps per estimator. By default more in NumPyro, which compiles."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the starting point and all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and figure.png.", file_okay=False)] = Path(
        "demo-results"
    ),
    smoke: Annotated[bool, typer.Option("--smoke", help="A short run, to see that everything works.")] = False,
) -> None:
    """Train a deep belief network of digits with every kind of estimator, and compare them.

    **The model** draws two layers of binary latents (`top`, then `low`: score function) and a continuous one
    (`style`: pathwise), and from them 1,797 real images of 8 × 8 pixels. The guide runs the hierarchy backwards. The
    unmodified `SVI` of each library trains it with a stock ELBO and with `EstimatorELBO` under each estimator:
    nothing but the loss is swapped.

    **The table** says what each estimator costs and what it gains:

    - *held-out ELBO*, in nats per image: higher is better;
    - *gradient variance*, every row at the same parameters: lower is better;
    - *variance × time*, the noise that a fixed budget of time leaves: lower is better.

    **The folder** of `--out` gets every number (`results.json`) and a figure (`figure.png`): learning curves, noise
    against cost, digits and their reconstructions. The default run takes three to four minutes on two cores.

    **Examples**

    - `ppl-estimators demo --smoke`
    - `ppl-estimators demo --backend numpyro --steps 20000 --out digits`
    """
    chosen = list(DISTRIBUTIONS) if backend is Backend.both else [str(backend)]
    _require(chosen)
    folder(out)

    from ppl_estimators.demo import experiment
    from ppl_estimators.diagnostics.library import bar

    settings = experiment.Settings(seed=seed)
    if smoke:
        settings = settings.smoke()
    if steps is not None:
        settings = settings.with_steps(steps)
    order = [name for name in experiment.BACKENDS if name in chosen]
    with bar("demo", experiment.evaluations(order, settings), None) as advance:
        outcome = experiment.run(order, settings, advance)
    show(outcome, out, "results", "figure")
    typer.echo(f"Wrote results.json and figure.png to {out}")


def _require(backends: list[str]) -> None:
    for name in backends:
        if find_spec(name) is None:
            raise CommandError(f"--backend {name} needs it: pip install {DISTRIBUTIONS[name]}")
    for module, package in DEMO_MODULES.items():
        if find_spec(module) is None:
            raise CommandError(f"the demo needs {package}: pip install {package}")
