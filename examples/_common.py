"""What the examples share: command line, progress bars, figures, files of numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

INK, PALE = "#202124", "#80868b"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, RED, GREY = (  # Okabe and Ito's colours, told apart by everyone
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800", "#d55e00", "#80868b",
)  # fmt: skip
LIBRARIES = {"numpyro": "NumPyro", "pyro": "Pyro"}
console = Console()


def arguments(script: str, description: str) -> argparse.Namespace:
    """``backend``, ``smoke`` and ``out`` (a folder, made here)."""
    summary = description.strip().splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--backend", choices=sorted(LIBRARIES), default="numpyro", help="default: numpyro")
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("example-results"), help="folder for figure and numbers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.stem = args.out / f"{Path(script).stem}-{args.backend}"
    return args


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar; call what it yields with a description to say what is going on, and with a number to advance."""
    bar = Progress(
        TextColumn("{task.description:<38}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total)

        def report(what: str | int) -> None:
            if isinstance(what, str):
                bar.update(task, description=what)
            else:
                bar.advance(task, what)

        yield report


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others numbers."""
    view = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    view.add_column(columns[0], overflow="fold")  # gives way in a narrow terminal, which a number must not
    for column in columns[1:]:
        view.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        view.add_row(*map(escape, row))
    console.print(view, highlight=False)


def axes(columns: int, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with its panels ``[rows, columns]``; ink on white, so that it reads on a dark page too."""
    figure = Figure(figsize=(5.6 * columns, 4.2 * rows), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        quiet(panel)
    return figure, panels


def quiet(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(PALE)
    panel.tick_params(labelcolor=INK, labelsize=9, color=PALE)
    panel.grid(axis="y", color="#eef0f2", linewidth=1)
    panel.set_axisbelow(True)


def heading(panel: Axes, text: str) -> None:
    panel.set_title(text, loc="left", color=INK, fontweight="bold", fontsize=11)


def save(args: argparse.Namespace, figure: Figure, numbers: dict[str, Any]) -> None:
    """Write ``<out>/<script>-<backend>.png`` and ``.json``, and say where they are."""
    image, document = (args.stem.with_name(args.stem.name + suffix) for suffix in (".png", ".json"))
    figure.savefig(image, facecolor="white")
    document.write_text(json.dumps(_plain(numbers), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"figure   {image}\nnumbers  {document}", highlight=False, soft_wrap=True)


def _plain(x: Any) -> Any:
    """As JSON knows it: lists of numbers, null for what is not finite."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, str):
        return x
    if isinstance(x, (list, tuple, np.ndarray)) and np.ndim(x):
        return [_plain(value) for value in x]
    x = np.asarray(x).item()
    return x if np.isfinite(x) else None


def variance(estimates: np.ndarray) -> tuple[float, float]:
    """The variance of independent estimates ``[n, ...]``, summed over the rest, and its standard error."""
    deviations = ((estimates - estimates.mean(0)) ** 2).reshape(len(estimates), -1).sum(1)
    n = len(estimates)
    return float(deviations.sum() / (n - 1)), float(deviations.std() / np.sqrt(n))
