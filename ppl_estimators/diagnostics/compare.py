"""`compare`: several estimators of one gradient, by noise, by price and by bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import EstimatorError
from ..measure.look import in_short
from .candidates import opened, resolve
from .library import bar
from .measured import Measured, time_together
from .program import within
from .reference import Reference, judge, reference_for
from .show import CHOSEN, Showable, Shown, axes, named, number


@dataclass(frozen=True)
class Compared:
    """One candidate. ``variance``: of one draw, summed over the entries; ``variance_error``: its standard error;
    ``bias``: ‖mean − reference‖; ``bias_expected``: what that is on average without any bias;
    ``biased``: is it five standard deviations above?"""

    label: str
    num_particles: int
    num_draws: int
    variance: float
    variance_error: float
    milliseconds: float
    compile_seconds: float | None
    variance_times_milliseconds: float
    bias: float | None
    bias_expected: float | None
    biased: bool | None
    unbiased_as_declared: bool | None


@dataclass(frozen=True, repr=False)
class Comparison(Showable):
    """What `compare` found, best variance × time first. ``failed``: candidates that could not run, and why;
    ``chosen``: the row that `recommend` takes."""

    library: str
    num_draws: int
    seed: int
    reference: str
    reference_norm: float | None
    rows: tuple[Compared, ...]
    failed: Mapping[str, str]
    chosen: str | None = None

    def __getitem__(self, label: str) -> Compared:
        found: Compared = named(self.rows, "label", label, "row")
        return found

    def tables(self) -> list[Shown]:
        lines = [f"'{n}' could not run: {why}" for n, why in self.failed.items()]
        norm = "" if self.reference_norm is None else f", norm {number(self.reference_norm)}"
        caption = (
            f"Reference: {self.reference}{norm}. Bias is ‖mean − reference‖, in brackets what noise alone makes of it."
        )
        if self.chosen is not None:
            lines.append(f"{CHOSEN}is what was chosen.")
        rows = []
        for r in self.rows:
            label = r.label + f", {r.num_particles} particles" * (r.num_particles > 1)
            bias = "–" if r.bias is None else f"{number(r.bias, 2)} ({number(r.bias_expected, 2)})"
            rows.append(
                (
                    CHOSEN * (r.label == self.chosen) + label, f"{number(r.variance)} ± {number(r.variance_error, 1)}",
                    number(r.milliseconds), number(r.variance_times_milliseconds), bias + "\nbiased" * bool(r.biased),
                )
            )  # fmt: skip
        return [
            Shown(
                f"Estimators compared ({self.library}), {self.num_draws:,} draws",
                ("estimator", "variance", "ms", "variance\n× ms", "bias\n(noise)"),
                tuple(rows),
                "\n".join([caption, *lines]),
            )
        ]

    def records(self) -> list[dict[str, Any]]:
        return [vars(r) for r in self.rows]

    def plot(self) -> Any:
        """Variance against milliseconds, biased ones hollow; the line joins those that none beats in both."""
        figure, (ax,) = axes(len(self.rows), width=7.5)
        draw_frontier(ax, self.rows, self.chosen)
        return figure


def draw_frontier(ax: Any, rows: Sequence[Compared], chosen: str | None = None) -> None:
    """Rows as points on an axis of matplotlib, their names beside it from the noisiest down, the chosen one's bold. A
    variance of zero stands at the foot."""
    from ppl_estimators.figures import BLUE, INK

    floor = min((r.variance for r in rows if r.variance > 0), default=1.0) / 10
    x = [r.milliseconds for r in rows]
    y = [max(r.variance, floor) for r in rows]
    scales = ["log" if max(values) > 10 * min(values) else "linear" for values in (x, y)]
    ax.set(xscale=scales[0], yscale=scales[1], xlabel="milliseconds per step", ylabel="variance of one gradient")
    best = frontier(x, y)
    ax.plot([x[i] for i in best], [y[i] for i in best], color=INK, lw=1)
    ax.scatter(x, y, facecolors=["none" if r.biased else BLUE for r in rows], edgecolors=BLUE, zorder=3)
    ax.margins(0.1)
    order = sorted(range(len(rows)), key=lambda i: (-y[i], x[i]))
    for place, i in enumerate(order):
        name = rows[i].label if len(rows[i].label) <= 34 else rows[i].label[:33] + "…"
        weight = "bold" if rows[i].label == chosen else "normal"
        ax.annotate(
            name + ", biased" * bool(rows[i].biased), (x[i], y[i]), (1.08, 1 - (place + 0.5) / len(rows)),
            textcoords="axes fraction", va="center", fontsize="small", weight=weight, color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def frontier(x: list[float], y: list[float]) -> list[int]:
    """Indices of the points that no other beats in both, by growing ``x``."""
    found: list[int] = []
    for i in sorted(range(len(x)), key=lambda i: (x[i], y[i])):
        if not found or y[i] < y[found[-1]]:
            found.append(i)
    return found


def compare(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    candidates: Mapping[str, Any] | Iterable[Any] = ("default",),
    *,
    kwargs: Mapping[str, Any] | None = None,
    num_draws: int = 1000,
    num_particles: int = 1,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    reference: Mapping[str, Any] | str = "auto",
    max_states: int = 2000,
    timing_steps: int = 20,
    backend: str | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Measure several estimators of one gradient at one point.

    ``candidates``: ELBOs (ours or stock), mappings ``{site: estimator}``, specs such as ``DisARM()``, or names:
    "default", "DisARM", "Reinforce(LeaveOneOut())", "TraceGraph_ELBO". A mapping gives them labels. A spec stands at
    every site that admits it (not at reparameterisable ones, if there are others); the rest keep the default. A
    candidate that needs more particles than ``num_particles`` gets as many as it needs. "TraceEnum_ELBO" by name also
    marks the guide's sites of finite support for enumeration; an object takes the guide as it is. What estimators keep
    is at its start.

    What is paired: draw number i of every candidate starts at the random state of ``(seed, i)``, and all are timed in
    turns. Estimators use randomness in their own ways, so values agree only where they ask for the same: our ELBOs
    see one minibatch at draw i (in Pyro if the plate comes before the first site), stock ones of NumPyro another.

    ``reference``: what bias is measured against. "auto": the exact gradient by enumeration where all sites are
    discrete with at most ``max_states`` states together, else ten times as many draws of score functions, which are
    unbiased whatever the model; "exact" (continuous sites by quadrature: only for smooth models); "long"; "none"; or a
    gradient by name. ``params``, ``seed``, ``progress``: as in `gradient_report`.

    A candidate that cannot run is in ``failed``, with the reason. Raises `EstimatorError` if none can, and names a
    mistake in model or guide.
    """
    if num_draws < 2:
        raise EstimatorError(f"compare(num_draws=...) needs 2 or more for a variance, got {num_draws!r}.")
    if isinstance(candidates, str):
        candidates = [candidates]
    given = list(candidates.items()) if isinstance(candidates, Mapping) else [(None, c) for c in candidates]
    point: dict[str, Any] = {"params": params, "seed": seed, "backend": backend, "particles": num_particles}
    program, plan = opened("compare(model, guide, args, candidates)", model, guide, args, kwargs, **point)
    library = program.library
    running, failed = [], {}
    for label, one in given:
        try:
            candidate = resolve(one, label, library, guide, plan, num_particles)
            measured = Measured(program, candidate, num_draws // 10)
            measured.time(1)
            running.append(measured)
        except Exception as error:  # a stock ELBO complains in whatever way; the program itself has run above
            failed[label or (one if isinstance(one, str) else repr(one))] = reason(error)
    rows = []
    if running:
        with within("the reference"):
            against = reference_for(program, plan, reference, max_states, num_draws, progress)
        time_together(running, timing_steps)
        with bar("compare", num_draws * len(running), progress) as advance:
            for measured in running:
                try:
                    measured.draw(num_draws, advance)
                except Exception as error:
                    failed[measured.candidate.label] = reason(error)
                else:
                    rows.append(row(measured, against))
    if not rows:
        raise EstimatorError("compare: no candidate could run. " + " ".join(f"{n}: {w}" for n, w in failed.items()))
    rows.sort(key=lambda r: r.variance_times_milliseconds)
    return Comparison(library, num_draws, seed, against.what, against.norm, tuple(rows), failed)


def reason(error: Exception) -> str:
    """One line; an error of ours names everything itself."""
    return str(error) if isinstance(error, EstimatorError) else in_short(error)


def row(m: Measured, reference: Reference, label: str | None = None) -> Compared:
    bias = expected = biased = None
    if reference.gradient is not None:
        bias, expected, biased = judge(m.moments, reference)
    v, c = m.moments.total_variance, m.candidate
    return Compared(
        label or c.label, c.elbo.num_particles, m.moments.count, v, m.variance_error, m.milliseconds, m.compile_seconds,
        v * m.milliseconds, bias, expected, biased, c.unbiased,
    )  # fmt: skip
