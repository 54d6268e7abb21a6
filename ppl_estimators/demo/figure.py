"""The figure: learning curves, noise against cost, original and reconstructed digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ppl_estimators.demo.experiment import BACKENDS, REFERENCE, Experiment, Result
from ppl_estimators.demo.network import SIDE
from ppl_estimators.figures import BLUE, BROWN, FAINT, GREEN, INK, ORANGE, PINK, SKY, VERMILLION, blank, heading, quiet

STOCK_COLOURS = {"Trace_ELBO (stock)": BROWN, "TraceGraph_ELBO (stock)": INK}
COLOURS = (VERMILLION, ORANGE, PINK, SKY, BLUE, GREEN)
MARKERS = {"numpyro": "o", "pyro": "s"}


def draw(experiment: Experiment) -> Figure:
    """A page's width; the first row has an axis for each backend."""
    rows, backends = experiment.by_backend, list(experiment.by_backend)
    ours = iter(COLOURS)
    labels = sorted(dict.fromkeys(r.label for r in experiment.results), key=lambda label: label not in STOCK_COLOURS)
    colours = {label: STOCK_COLOURS.get(label) or next(ours) for label in labels}
    heights = [3.6, 3.8, 0.75 * (1 + len(experiment.reconstructions))]
    figure = blank(9, sum(heights))
    mosaic = [[backends[0], backends[-1]], ["noise", "legend"], ["digits", "digits"]]
    axes: dict[str, Axes] = figure.subplot_mosaic(mosaic, height_ratios=heights)
    for backend in backends:
        _learning_curves(axes[backend], backend, rows[backend], colours)
    _noise_against_cost(axes["noise"], experiment.results, colours)
    _legend(axes["legend"], colours, backends)
    _digits(axes["digits"], experiment)
    return figure


def _dashes(label: str) -> str:
    return "--" if label in STOCK_COLOURS else "-"


def _learning_curves(axis: Axes, backend: str, rows: list[Result], colours: Mapping[str, str]) -> None:
    for row in rows:
        axis.plot(*np.transpose(row.curve), color=colours[row.label], linestyle=_dashes(row.label), linewidth=1.8)
    # from where the slowest row stands a quarter of the way, so that the ends can be told apart
    early, best = min(row.curve[len(row.curve) // 4][1] for row in rows), max(e for row in rows for _, e in row.curve)
    axis.set(ylim=(early, best + 0.05 * (best - early)), xlabel="step", ylabel="held-out ELBO (nats per image)")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    heading(axis, f"{BACKENDS[backend]}: learning")
    quiet(axis)


def _noise_against_cost(axis: Axes, results: list[Result], colours: Mapping[str, str]) -> None:
    for row in results:
        marker, colour = MARKERS[row.backend], colours[row.label]
        axis.scatter(row.milliseconds_per_step, row.gradient_variance, marker=marker, s=75, color=colour, zorder=3)
    axis.set(xscale="log", yscale="log", xlabel="milliseconds per step", ylabel="gradient variance (nats per image)²")
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
    said: dict[str, Any] = {"transform": axis.transAxes, "ha": "right", "va": "top", "fontsize": 8.5, "color": INK}
    axis.text(0.98, 0.97, "slanted lines: equal variance × time", **said)
    heading(axis, "noise against cost")
    quiet(axis)


def _legend(panel: Axes, colours: Mapping[str, str], backends: list[str]) -> None:
    lines = [Line2D([], [], color=c, linestyle=_dashes(n), linewidth=2.4, label=n) for n, c in colours.items()]
    plain: dict[str, Any] = {"color": INK, "linestyle": "", "markersize": 8}
    marks = [Line2D([], [], marker=MARKERS[b], label=BACKENDS[b], **plain) for b in backends]
    panel.set_axis_off()
    panel.legend(handles=[*lines, *marks], loc="center left", frameon=False, fontsize=9.5, labelcolor=INK)


def _digits(panel: Axes, experiment: Experiment) -> None:
    """A strip of ten digits each, a pixel between any two."""
    strips = {"held-out digits": experiment.originals}
    strips |= {f"{BACKENDS[b]}, {REFERENCE.label}": images for b, images in experiment.reconstructions.items()}
    tiles = np.pad(np.reshape(list(strips.values()), (len(strips), -1, SIDE, SIDE)), ((0, 0), (0, 0), (0, 1), (0, 1)))
    image = tiles.transpose(0, 2, 1, 3).reshape(len(strips) * (SIDE + 1), -1)[:-1, :-1]
    panel.imshow(image, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([SIDE / 2 - 0.5 + i * (SIDE + 1) for i in range(len(strips))], labels=list(strips))
    panel.tick_params(length=0, labelcolor=INK, labelsize=10)
    panel.spines[:].set_visible(False)
