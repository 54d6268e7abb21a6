"""`compare`: several estimators of one gradient, by noise, by price and by bias."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import EstimatorError, EstimatorWarning
from ..core.families import DISCRETE
from ..estimators.baselines.leave_one_out import LeaveOneOut
from ..estimators.reinforce import Reinforce
from ..testing.exact import exact_gradient
from ..testing.library import backend_of
from .candidates import Candidate, look, ours, resolve
from .library import bar, gradients_class
from .moments import Moments
from .report import _check_finite, timing
from .show import Showable, Shown, axes, number

#: draws of the reference, for one of each candidate's
LONGER = 10


class Reference(NamedTuple):
    """What bias is measured against: in words, the gradient by name, its standard errors (None: exact)."""

    what: str
    gradient: Mapping[str, Any] | None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Compared:
    """One candidate. ``variance``: of one draw, summed over the entries; ``variance_error``: its standard error;
    ``bias``: ‖mean − reference‖; ``bias_expected``: what that is on average without any bias;
    ``biased``: is it five standard deviations above?"""

    label: str
    num_particles: int
    variance: float
    variance_error: float
    milliseconds: float
    compile_seconds: float | None
    variance_times_milliseconds: float
    bias: float | None
    bias_expected: float | None
    biased: bool | None
    unbiased_as_declared: bool | None


@dataclass(frozen=True)
class Comparison(Showable):
    """What `compare` found, best variance × time first. ``failed``: candidates that could not run, and why."""

    library: str
    num_draws: int
    seed: int
    reference: str
    reference_norm: float | None
    rows: tuple[Compared, ...]
    failed: Mapping[str, str]

    def __getitem__(self, label: str) -> Compared:
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no row '{label}': {', '.join(r.label for r in self.rows)}")

    def tables(self) -> list[Shown]:
        lines = [f"'{n}' could not run: {why}" for n, why in self.failed.items()]
        norm = "" if self.reference_norm is None else f", norm {number(self.reference_norm)}"
        caption = (
            f"Reference: {self.reference}{norm}. Bias is ‖mean − reference‖, beside what noise alone would make it."
        )
        return [
            Shown(
                f"Estimators compared ({self.library}), {self.num_draws:,} draws",
                ("estimator", "particles", "variance", "ms", "variance × ms", "bias", "by noise alone", ""),
                tuple(
                    (
                        r.label, str(r.num_particles), f"{number(r.variance)} ± {number(r.variance_error, 1)}",
                        number(r.milliseconds), number(r.variance_times_milliseconds), number(r.bias),
                        number(r.bias_expected), "biased" if r.biased else "",
                    )
                    for r in self.rows
                ),
                " ".join([caption, *lines]),
            )
        ]  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        return [vars(r) for r in self.rows]

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "rows": self.records()}

    def plot(self) -> Any:
        """Variance against milliseconds, bias as colour; the line joins those that none beats in both."""
        figure, (ax,) = axes(12)
        from ppl_estimators.figures import INK

        floor = min((r.variance for r in self.rows if r.variance > 0), default=1.0) / 10
        x = [r.milliseconds for r in self.rows]
        y = [max(r.variance, floor) for r in self.rows]
        colour = [0.0 if r.bias is None else max(r.bias - (r.bias_expected or 0.0), 0.0) for r in self.rows]
        points = ax.scatter(x, y, c=colour, cmap="viridis_r", vmin=0, vmax=max(colour) or 1, zorder=3)
        for r, px, py in zip(self.rows, x, y, strict=True):
            ax.annotate(r.label, (px, py), textcoords="offset points", xytext=(5, 3), fontsize="small", color=INK)
        best = frontier(x, y)
        ax.plot([x[i] for i in best], [y[i] for i in best], color=INK, lw=1)
        ax.set(xscale="log", yscale="log", xlabel="milliseconds per step", ylabel="variance of one gradient")
        bar = figure.colorbar(points)
        bar.set_label("bias beyond noise", color=INK)
        bar.ax.tick_params(color=INK, labelcolor=INK)
        bar.outline.set_visible(False)
        return figure


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
    reference: Mapping[str, Any] | Reference | str = "auto",
    max_states: int = 2000,
    timing_steps: int = 20,
    backend: str | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Measure several estimators of one gradient at one point, on the same seeds.

    ``candidates``: ELBOs (ours or stock), mappings ``{site: estimator}``, specs such as ``DisARM()``, or names:
    "default", "DisARM", "Reinforce(LeaveOneOut())", "TraceGraph_ELBO". A mapping gives them labels. A spec stands at
    every site that admits it (not at reparameterisable ones, if there are others); the rest keep the default. A
    candidate that needs more particles than ``num_particles`` gets as many as it needs. What estimators keep is at its
    start.

    ``reference``: what bias is measured against. "auto": the exact gradient by enumeration where all sites are
    discrete with at most ``max_states`` states together, else ten times as many draws of score functions, which are
    unbiased whatever the model; "exact" (continuous sites by quadrature: only for smooth models); "long"; "none"; or a
    gradient by name. ``params``, ``seed``, ``progress``: as in `gradient_report`.

    A candidate that cannot run is in ``failed``, with the reason. Raises `EstimatorError` if none can.
    """
    if num_draws < 2:
        raise EstimatorError(f"compare(num_draws=...) needs 2 or more for a variance, got {num_draws!r}.")
    kwargs = dict(kwargs or {})
    library = backend or backend_of(model, guide, args, kwargs)
    plan = look(library, model, guide, args, kwargs, params, num_particles)
    program = (library, model, args, kwargs, params, seed)
    if isinstance(candidates, str):
        candidates = [candidates]
    given = list(candidates.items()) if isinstance(candidates, Mapping) else [(None, c) for c in candidates]
    if not isinstance(reference, Reference):
        reference = reference_for(program, guide, plan, reference, max_states, num_draws, progress)
    what, target, target_error = reference
    rows, failed = [], {}
    for label, one in given:
        try:
            candidate = resolve(one, label, library, guide, plan, num_particles)
            rows.append(_measure(program, candidate, num_draws, timing_steps, target, target_error, progress))
        except (EstimatorError, NotImplementedError) as error:
            failed[label or (one if isinstance(one, str) else repr(one))] = str(error)
    if not rows:
        raise EstimatorError("compare: no candidate could run. " + " ".join(f"{n}: {w}" for n, w in failed.items()))
    rows.sort(key=lambda r: r.variance_times_milliseconds)
    norm = None if target is None else _norm(target)
    return Comparison(library, num_draws, seed, what, norm, tuple(rows), failed)


def _measure(
    program: tuple[Any, ...], c: Candidate, num_draws: int, timing_steps: int, target: Any, target_error: Any, show: Any
) -> Compared:
    moments, deviations, g = _draw(program, c, num_draws, show)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        milliseconds, compiled = timing(g, timing_steps)
    bias = expected = biased = None
    if target is not None:
        bias, expected, biased = judge(moments, target, target_error)
    v = moments.total_variance
    return Compared(
        c.label, c.elbo.num_particles, v, deviations, milliseconds, compiled, v * milliseconds, bias, expected, biased,
        c.unbiased,
    )  # fmt: skip


def judge(m: Moments, target: Mapping[str, Any], target_error: Mapping[str, Any] | None) -> tuple[float, float, bool]:
    """‖mean − target‖, the same if there were no bias, and whether the first is too large for that.

    With d_j ~ N(0, s_j²), Σ d_j² has mean Σ s_j² and variance 2 Σ s_j⁴ (entries taken as independent; five of its
    standard deviations and the 25 of a single entry are allowed).
    """
    away, noise = [], []
    for name in m.mean:
        away.append(np.ravel(m.mean[name] - target[name]))
        square = m.variance(name) / m.count
        noise.append(np.ravel(square + (0.0 if target_error is None else np.asarray(target_error[name]) ** 2)))
    d, s = np.concatenate(away), np.concatenate(noise)
    rounding = 1e-10 * (_norm(target) ** 2 + 1e-6)  # single precision
    worst = float(s.max())
    limit = float(s.sum()) + 5 * float(np.sqrt(2 * (s**2).sum())) + 17 * worst + rounding
    square = float((d**2).sum())
    return float(np.sqrt(square)), float(np.sqrt(s.sum())), square > limit


def _draw(program: tuple[Any, ...], c: Candidate, num_draws: int, show: Any, offset: int = 0) -> tuple[Any, float, Any]:
    """Moments; the standard error of the total variance; the `Gradients`."""
    library, model, args, kwargs, params, seed = program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        g = gradients_class(library)(c.elbo, model, c.guide, args, kwargs, params, seed=seed)
        moments, batches = Moments(), []
        with bar(c.label, num_draws, show) as report:
            done, size = 0, max(2, num_draws // 10)
            while done < num_draws:  # ten batches, whose variances differ
                count = num_draws - done if num_draws - done < 2 * size else size
                batch = Moments()
                for losses, gradients in g.draws(count, seed, None, offset + done):
                    _check_finite(losses, gradients, c.elbo)
                    moments.add(losses, gradients)
                    batch.add(losses, gradients)
                batches.append(batch.total_variance)
                done += count
                if report is not None:
                    report(done)
    error = float(np.std(batches, ddof=1) / np.sqrt(len(batches))) if len(batches) > 1 else float("nan")
    return moments, error, g


def reference_for(
    program: tuple[Any, ...], guide: Any, plan: Any, reference: Any, max_states: int, num_draws: int, show: Any
) -> Reference:
    """See `compare`. Quadrature of a continuous site differentiates the model in it, so by itself it is not trusted:
    where the model jumps it would share the bias of a pathwise gradient. Score functions would not."""
    library, model, args, kwargs, params, _ = program
    if isinstance(reference, Mapping):
        return Reference("given", {n: np.asarray(v) for n, v in reference.items()})
    if reference == "none":
        return Reference("none", None)
    if reference not in ("auto", "exact", "long"):
        raise EstimatorError(
            f'compare(reference=...) takes "auto", "exact", "long", "none" or a gradient, got {reference!r}.'
        )
    discrete = all(site.family in DISCRETE for site in plan.sites.values())
    if reference == "exact" or (reference == "auto" and discrete):
        try:
            exact = exact_gradient(model, guide, *args, params=params, max_states=max_states, backend=library, **kwargs)
            return Reference(f"exact, {exact.states:,} states", exact.gradient)
        except EstimatorError:
            if reference == "exact":
                raise
    elbo = ours(library).EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=4)
    m, _, _ = _draw(program, Candidate("reference", elbo, guide), LONGER * num_draws, show, offset=num_draws)
    errors = {n: np.sqrt(m.variance(n) / m.count) for n in m.mean}
    return Reference(f"{m.count:,} draws of score functions with four particles", m.mean, errors)


def _norm(gradient: Mapping[str, Any]) -> float:
    return float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in gradient.values())))
