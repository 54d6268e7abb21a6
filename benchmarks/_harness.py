"""Ratios measured side by side: the contestants take turns, and each round gives one ratio."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "pyro-ppl", "jax", "numpyro", "ppl-estimators")

Times = dict[str, list[float]]


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """One integer option per keyword, ``--like-this``."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    return parser.parse_args()


def take_turns(
    label: str, steps: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 3, repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:  # fmt: skip
    """Seconds per call of every step, once a round. The order rotates, so that nobody always runs first; every step
    runs ``repeats`` times in a row, of which the fastest counts."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: Times = {name: [] for name in steps}
    names = list(steps)
    for i in track(range(rounds), label, console=Console(stderr=True), transient=True):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(min(_seconds(steps[name], clock) for _ in range(repeats)))
    return times


def _seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def milliseconds(times: Times, name: str) -> str:
    return f"{1e3 * statistics.median(times[name]):.2f}"


def ratio(times: Times, ours: str, theirs: str) -> tuple[str, float]:
    """The median of the rounds' ratios: with its quartiles, for print; and as a number."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})", middle


def verdict(value: float, target: float) -> str:
    return f"≤ {target:g}: {'met' if value <= target else 'MISSED'}"


class Report:
    """Tables and remarks, printed as they come and written to ``results/<name>.md``, or to another folder."""

    def __init__(self, name: str, title: str):
        self.name, self.lines, self.console = name, [f"# {title}", ""], Console()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        shown = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            shown.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        self.console.print(shown)
        self.lines += [
            f"## {title}",
            "",
            f"| {' | '.join(columns)} |",
            f"|---|{'---:|' * (len(columns) - 1)}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]

    def remark(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
        self.lines += [text, ""]

    def write(self, folder: Path = RESULTS) -> None:
        versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES if _installed(p))
        python = ".".join(map(str, sys.version_info[:3]))
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self.lines += [f"`{command}` on {os.cpu_count()} CPUs; Python {python}, {versions}.", ""]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text("\n".join(self.lines), encoding="utf-8")
        self.console.print(f"Written to {folder.name}/{self.name}.md")


def _installed(package: str) -> bool:
    try:
        version(package)
    except ModuleNotFoundError:
        return False
    return True
