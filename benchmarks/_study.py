"""What the studies of gradient noise share: the estimators, the count of evaluations, bars and figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _harness import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ppl_estimators import (
    ARM,
    ARMS,
    NVIL,
    REBAR,
    RELAX,
    UGC,
    Antithetic,
    BitFlip,
    Combine,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    GappedStraightThrough,
    GumbelSoftmax,
    Learned,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    OptimalConstant,
    PastSteps,
    RaoGumbel,
    Reinforce,
    ReinMax,
    RELAXWithModel,
    Stein,
    StochasticTriple,
    StraightThrough,
)
from ppl_estimators.figures import BLUE, GREEN, INK, PINK, VERMILLION

SCORE, COUPLED, LOCAL, SLOPES, BIASED = FAMILIES = (
    "score function",
    "coupled draws",
    "moves single elements",
    "learned or sloped control variate",
    "biased",
)
COLOURS = dict(zip(FAMILIES, (VERMILLION, BLUE, GREEN, PINK, INK), strict=True))
FIGURES = RESULTS.parent.parent / "docs" / "figures"


@dataclass(frozen=True)
class Contestant:
    estimator: Any
    family: str
    particles: int = 1
    slope: bool = False  # whether it differentiates the model in z

    @property
    def name(self) -> str:
        return repr(self.estimator) + (f", {self.particles} particles" if self.particles > 1 else "")

    @property
    def biased(self) -> bool:
        return not self.estimator.unbiased

    @property
    def label(self) -> str:
        return f"{self.name}{' (biased)' if self.biased else ''}"


#: What takes a Bernoulli site, without what is the same as another there (MeasureValued is Enumerate, SmoothedTriple
#: is ReinMax) and what has another's mean and more noise (GumbelStraightThrough).
BERNOULLI = (
    Contestant(Reinforce(), SCORE),
    Contestant(Reinforce(MovingAverage()), SCORE),
    Contestant(Reinforce(OptimalConstant(PastSteps(0.99))), SCORE),
    Contestant(Reinforce(MovingAverage() + Learned()), SCORE),
    Contestant(NVIL(), SCORE),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=2),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=3),
    Contestant(Antithetic(Reinforce(MovingAverage())), COUPLED),
    Contestant(ARM(), COUPLED),
    Contestant(DisARM(), COUPLED),
    Contestant(ARMS(3), COUPLED),
    Contestant(UGC(), COUPLED),
    Contestant(Combine((DisARM(), Reinforce(MovingAverage()))), COUPLED),
    Contestant(BitFlip(), LOCAL),
    Contestant(StochasticTriple(), LOCAL),
    Contestant(Enumerate(), LOCAL),
    Contestant(MuProp(), SLOPES, slope=True),
    Contestant(MuProp(baseline=MovingAverage()), SLOPES, slope=True),
    Contestant(RELAX(), SLOPES),
    Contestant(RELAX(baseline=None), SLOPES),
    Contestant(RELAXWithModel(), SLOPES, slope=True),
    Contestant(REBAR(), SLOPES, slope=True),
    Contestant(DoubleControlVariate(), SLOPES, particles=2, slope=True),
    Contestant(Stein(), SLOPES, particles=2, slope=True),
    Contestant(ReinMax(), BIASED, slope=True),
    Contestant(StraightThrough(), BIASED, slope=True),
    Contestant(GumbelSoftmax(0.5), BIASED, slope=True),
    Contestant(RaoGumbel(10, 0.5), BIASED, slope=True),
    Contestant(GappedStraightThrough(), BIASED, slope=True),
)


class Tally:
    """Counts how often the model runs, relaxed and counterfactual runs included: call it there with the site's value.

    Side by side is not at once: the lanes of a `vmap` count one each.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, value: Any) -> None:
        jax.debug.callback(self._add, jnp.sum(value))

    def _add(self, _: Any) -> None:
        self.count += 1

    def per_call(self, step: Callable[[], Any]) -> float:
        """Evaluations of one call of a compiled ``step``, mean of ten."""
        jax.block_until_ready(step())
        jax.effects_barrier()
        self.count = 0
        for _ in range(10):
            jax.block_until_ready(step())
        jax.effects_barrier()
        return self.count / 10


def options(description: str, **defaults: int) -> argparse.Namespace:
    """``smoke``; ``out``, a folder or None for the repository's own places; and one integer per keyword."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--out", type=Path, help="where table and figure go; default benchmarks/results, docs/figures")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    if args.smoke and args.out is None:
        parser.error("--smoke needs --out: its numbers are not to replace the committed ones")
    args.results, args.figures = (args.out, args.out) if args.out else (RESULTS, FIGURES)
    for folder in (args.results, args.figures):
        folder.mkdir(parents=True, exist_ok=True)
    return args


@contextmanager
def progress(total: int) -> Iterator[Callable[[str | int], None]]:
    """A bar; call what it yields with what is going on, and with how many to advance."""
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:<50}"), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def report(what: str | int) -> None:
            if isinstance(what, str):
                bar.update(task, description=what.replace("[", r"\["))
            else:
                bar.advance(task, what)

        yield report


def scientific(x: float, digits: int = 2) -> str:
    return "0" if x == 0 else f"{x:.{digits}e}" if abs(x) < 1e-2 or abs(x) >= 1e4 else f"{x:.{digits + 2}g}"


# ---- figures -----------------------------------------------------------------------------------------------------


def keep(args: argparse.Namespace, study: str, shown: Any) -> Any:
    """What the study's figure shows, written beside the tables, so that `docs/make_figures.py` can draw it again.
    Returned as it is read from there: plain lists and dictionaries, six digits a number."""
    text = json.dumps(_plain(shown), indent=1, ensure_ascii=False)
    (args.results / f"{study}.json").write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (str, int)):
        return x
    return [_plain(value) for value in x] if np.ndim(x) else float(f"{float(x):.6g}")


def numbered(axis: Axes, contestants: Sequence[Contestant], x: Any, y: Any, *, floor: float | None = None) -> None:
    """Points with numbers, log axes. What lies below ``floor`` (exact estimators) is drawn there, hollow."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    below = np.zeros(len(y), bool) if floor is None else y < floor
    axis.set(xscale="log", yscale="log")
    shown = np.where(below, floor, y) if floor is not None else y
    for i, c in enumerate(contestants):
        colour = COLOURS[c.family]
        axis.scatter(
            x[i], shown[i], s=26, color="none" if below[i] else colour, edgecolor=colour, linewidth=1.3, zorder=3
        )
    axis.margins(x=0.2, y=0.08)
    axis.autoscale_view()
    crowds: list[tuple[Any, list[int]]] = []  # points that would write over each other, and where the first lies
    for i, at in enumerate(axis.transData.transform(np.stack([x, shown], -1))):
        near = [members for first, members in crowds if abs(at[0] - first[0]) < 30 and abs(at[1] - first[1]) < 14]
        if near:
            near[0].append(i)
        else:
            crowds.append((at, [i]))
    for _, members in crowds:
        right = 5
        for i in members:
            axis.annotate(
                f"{i + 1}",
                (x[members[0]], shown[members[0]]),
                (right, 3),
                textcoords="offset points",
                fontsize=8.5,
                color=COLOURS[contestants[i].family],
            )
            right += 4 + 6 * len(f"{i + 1}")
    if floor is not None and below.any():
        axis.text(0.99, 0.01, "hollow: no measurable noise", transform=axis.transAxes, ha="right", color=INK, size=8)


def key(figure: Figure, contestants: Sequence[Contestant]) -> None:
    """Below the panels: which number is which estimator."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[c.family], marker="o", linestyle="", markersize=4, label=f"{i + 1}  {c.label}")
        for i, c in enumerate(contestants)
    ]
    columns = 2 if max(len(c.label) for c in contestants) > 40 else 3
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-len(handles) // columns))
    style = {"ncols": columns, "frameon": False, "fontsize": 8.5, "labelcolor": INK, "columnspacing": 1.0}
    figure.legend(handles=handles, loc="outside lower left", **style)
