"""The figure: learning curves, noise against cost, original and reconstructed digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ppl_estimators.demo.experiment import BACKENDS, REFERENCE, Experiment, Result
from ppl_estimators.demo.network import SIDE
from ppl_estimators.figures import BLUE, BROWN, FAINT, GREEN, INK, ORANGE, PINK, SKY, VERMILLION, heading, quiet

STOCK_COLOURS = {"Trace_ELBO (stock)": BROWN, "TraceGraph_ELBO (stock)": INK}
COLOURS = (VERMILLION, ORANGE, PINK, SKY, BLUE, GREEN)
MARKERS = {"numpyro": "o", "pyro": "s"}


def draw(experiment: Experiment, path: Path) -> None:
    """Write the figure to `path`; the format is the one of its suffix."""
    backends = list(dict.fromkeys(result.backend for result in experiment.results))
    colours = _colours(experiment.results)
    strips = 1 + len(experiment.reconstructions)
    heights = [3.6, 3.8, 0.75 * strips]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(9, sum(heights)), dpi=130, layout=layout, facecolor="none")
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = parts
    for part in (top, middle, bottom):
        part.set_facecolor("none")
    for axis, backend in zip(top.subplots(1, len(backends), squeeze=False)[0], backends, strict=True):
        _learning_curves(axis, backend, experiment.results, colours)
    noise, beside = middle.subplots(1, 2, width_ratios=(5.2, 3.8))
    _noise_against_cost(noise, experiment.results, colours)
    _legend(beside, colours, backends)
    _digits(bottom, experiment)
    figure.savefig(path)


def _colours(results: list[Result]) -> dict[str, str]:
    labels = dict.fromkeys(sorted((result.label for result in results), key=lambda x: x not in STOCK_COLOURS))
    ours = iter(COLOURS)
    return {label: STOCK_COLOURS.get(label) or next(ours) for label in labels}


def _elbo_limits(results: list[Result]) -> tuple[float, float]:
    """From where the slowest row stands a quarter of the way, so that the ends can be told apart."""
    best = max(elbo for result in results for _, elbo in result.curve)
    early = min(result.curve[len(result.curve) // 4][1] for result in results)
    return early, best + 0.05 * (best - early)


def _learning_curves(axis: Axes, backend: str, results: list[Result], colours: dict[str, str]) -> None:
    rows = [result for result in results if result.backend == backend]
    for row in rows:
        dashes = (0, (4, 2)) if row.label in STOCK_COLOURS else "-"
        steps, elbos = np.transpose(row.curve)
        axis.plot(steps, elbos, color=colours[row.label], linestyle=dashes, linewidth=1.8)
    axis.set_ylim(_elbo_limits(rows))
    heading(axis, f"{BACKENDS[backend]}: learning")
    axis.set_xlabel("step")
    axis.set_ylabel("held-out ELBO (nats per image)")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    quiet(axis)


def _noise_against_cost(axis: Axes, results: list[Result], colours: dict[str, str]) -> None:
    for result in results:
        axis.scatter(
            result.milliseconds_per_step,
            result.gradient_variance,
            marker=MARKERS[result.backend],
            s=75,
            color=colours[result.label],
            zorder=3,
        )
    axis.set(xscale="log", yscale="log")
    heading(axis, "noise against cost")
    axis.set_xlabel("milliseconds per step")
    axis.set_ylabel("gradient variance (nats per image)²")
    axis.margins(0.12)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    x = np.array([left, right])
    for level in np.geomspace(low * left, high * right, 9)[1:-1]:
        axis.plot(x, level / x, color=FAINT, linewidth=1, zorder=1)
    axis.set(xlim=(left, right), ylim=(low, high))
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        ticks.set_minor_formatter(NullFormatter())
    axis.text(
        0.98,
        0.97,
        "slanted lines: equal variance × time",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8.5,
        color=INK,
    )
    quiet(axis)


def _legend(panel: Axes, colours: dict[str, str], backends: list[str]) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            linestyle="--" if label in STOCK_COLOURS else "-",
            linewidth=2.4,
            label=label,
        )
        for label, colour in colours.items()
    ]
    handles += [
        Line2D([], [], color=INK, linestyle="", marker=MARKERS[b], markersize=8, label=BACKENDS[b]) for b in backends
    ]
    panel.set_axis_off()
    panel.legend(handles=handles, loc="center left", frameon=False, fontsize=9.5, labelcolor=INK)


def _digits(panel: Figure, experiment: Experiment) -> None:
    strips = {"held-out digits": experiment.originals}
    for backend, images in experiment.reconstructions.items():
        strips[f"{BACKENDS[backend]}, {REFERENCE.label}"] = images
    grid = panel.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(grid, strips.items(), strict=True):
        gap = np.zeros((SIDE, 1))
        tiles = [tile for image in images for tile in (image.reshape(SIDE, SIDE), gap)]
        axis.imshow(np.hstack(tiles[:-1]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", color=INK, fontsize=10)
