"""`gradient_report`: the noise of one ELBO's gradient, by parameter and by site."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import Library
from ..core.errors import EstimatorError
from ..measure.gradients import EXPLICIT
from .library import Advance, bar, check_finite, library_of
from .moments import Moments, signal_to_noise
from .program import check_call, check_program, within
from .show import Showable, Shown, axes, number, percent, ratio


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. ``mean_norm``: ‖E g‖ in nats per unit; ``variance``: of one draw, summed over the entries;
    ``share``: of the total variance."""

    name: str
    shape: tuple[int, ...]
    mean_norm: float
    variance: float
    signal_to_noise: float
    share: float


@dataclass(frozen=True)
class SiteRow:
    """One site's part of the gradient, over all parameters. ``share``: Cov(part, gradient) / Var(gradient), which sums
    to one and is negative for a part that cancels others' noise; ``evaluations``: runs of model and guide per step
    and particle that its estimator adds; ``cost_share``: of all evaluations of a step (the common run is nobody's)."""

    name: str
    estimator: str | None
    mean_norm: float
    variance: float
    signal_to_noise: float
    share: float
    evaluations: float | None
    cost_share: float | None


@dataclass(frozen=True, repr=False)
class Report(Showable):
    """What `gradient_report` found; ``mean`` and ``variance`` by parameter as arrays; ``data_share``: how much of the
    variance is of which elements the minibatch has (None: no plate subsamples). Print it, or look at its rows."""

    elbo: str
    library: str
    num_draws: int
    seed: int
    parameters: tuple[ParameterRow, ...]
    sites: tuple[SiteRow, ...]
    why_no_sites: str | None
    total_variance: float
    loss: float
    loss_error: float
    milliseconds: float
    compile_seconds: float | None
    evaluations: int | None
    data_share: float | None
    mean: Mapping[str, np.ndarray]
    variance: Mapping[str, np.ndarray]

    def tables(self) -> list[Shown]:
        compiled = "" if self.compile_seconds is None else f", compiled in {self.compile_seconds:.1f} s"
        runs = "" if self.evaluations is None else f", {number(self.evaluations)} evaluations a particle"
        head = f"{self.elbo} ({self.library}): {self.milliseconds:.3g} ms a step{runs}{compiled}"
        data = ""
        if self.data_share is not None:
            data = (
                f" Of the variance {percent(max(self.data_share, 0.0))} is of the data, which elements a minibatch "
                "has, and no estimator lowers it; the rest is of the draws."
            )
        by_parameter = Shown(
            f"Gradient by parameter, {self.num_draws:,} draws",
            ("parameter", "shape", "‖mean‖", "variance", "signal/\nnoise", "share of\nvariance"),
            tuple(
                (p.name, "×".join(map(str, p.shape)) or "scalar", number(p.mean_norm), number(p.variance),
                 ratio(p.signal_to_noise), percent(p.share))
                for p in self.parameters
            ),
            f"{head}. Loss {number(self.loss, 5)} ± {number(self.loss_error)}. Variance is of one draw, summed over "
            f"entries; signal/noise is ‖mean‖ / √variance.{data}",
        )  # fmt: skip
        if not self.sites:
            return [by_parameter]
        by_site = Shown(
            "Gradient by site",
            ("site", "estimator", "‖mean‖", "variance", "signal/\nnoise", "share of\nvariance", "of eval-\nuations"),
            tuple(
                (s.name, s.estimator or "–", number(s.mean_norm), number(s.variance),
                 ratio(s.signal_to_noise) if s.variance else "–", percent(s.share), percent(s.cost_share))
                for s in self.sites
            ),
            f"{EXPLICIT}: what reaches the parameters with every drawn value held. A share below zero cancels the "
            "noise of another part.",
        )  # fmt: skip
        return [by_parameter, by_site]

    def records(self) -> list[dict[str, Any]]:
        kinds = (("parameter", self.parameters), ("site", self.sites))
        return [{"kind": kind, **vars(row)} for kind, rows in kinds for row in rows]

    def facts(self) -> dict[str, Any]:
        return {k: v for k, v in super().facts().items() if k not in ("mean", "variance")}

    def plot(self) -> Any:
        """Shares of the variance, as a matplotlib figure."""
        groups: list[tuple[str, Any]] = [
            ("parameter", self.parameters),
            *([("site", self.sites)] if self.sites else []),
        ]
        figure, places = axes(max(len(rows) for _, rows in groups), len(groups))
        for ax, (kind, rows) in zip(places, groups, strict=True):
            ax.barh([r.name for r in rows], [100 * r.share for r in rows], color="#0072b2")
            ax.invert_yaxis()
            ax.set(title=f"by {kind}", xlabel="share of the variance (%)")
        return figure


def gradient_report(
    elbo: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 200,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    by_site: bool = True,
    timing_steps: int = 20,
    progress: bool | None = None,
    mutable_state: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Draw ``num_draws`` gradients of ``elbo`` at one point, and say where their noise is and what a step costs.

    ``params``: the point, constrained values by name; by default Pyro's parameter store, or in NumPyro what
    `SVI.init` makes. ``mutable_state`` (NumPyro): ``svi_state.mutable_state``. ``by_site``: also each site's part,
    one more backward pass for each site and draw. Where a plate subsamples, two further draws for each minibatch tell
    the noise of the data from that of the draws. ``progress``: a bar; by default in a terminal.
    ``*args, **kwargs`` go to model and guide.

    A site's part is what reaches the cost by way of its distribution and no later site's: the noise of its estimator,
    wherever it flows. The parts sum to the gradient.

    Raises `EstimatorError` for a program without latent sites or parameters, unknown ``params``, and a gradient that
    is not finite.
    """
    if num_draws < 2:
        raise EstimatorError(f"gradient_report(num_draws=...) needs 2 or more for a variance, got {num_draws!r}.")
    call = "gradient_report(elbo, model, guide, *args)"
    library = library_of(elbo, call)
    check_call(call, model, guide, args)
    check_program(model, guide, args, kwargs, backend=library, anywhere=not params)
    more = {} if mutable_state is None else {"mutable_state": mutable_state}
    why, moments = None, Moments()
    with within(type(elbo).__name__):
        g = library.gradients(elbo, model, guide, args, kwargs, params, seed=seed, **more)
        milliseconds, compiled = timing(g, library, timing_steps)
        if by_site and not g.has_parts:
            by_site, why = False, f"{type(elbo).__name__} runs backward itself: parameters only"
        with bar("gradients", num_draws * (2 if g.subsampled else 1), progress) as advance:
            for losses, found in (g.parts if by_site else g.draws)(num_draws, seed):
                check_finite(losses, found, elbo)
                (moments.add_parts if by_site else moments.add)(losses, found)
                advance(len(losses))
            data_share = _of_the_data(g, num_draws, seed, elbo, advance) if g.subsampled else None
        plan, evaluations = g.plan(), None
        if plan is not None:
            extra = evaluations_by_site(plan)
            evaluations = 1 + sum(group.alternatives + group.relaxations for group in plan.groups)
    total = moments.total_variance
    rows = tuple(_parameter(moments, n, total) for n in g.names)
    sites: tuple[SiteRow, ...] = ()
    if by_site:
        sites = tuple(
            _site(moments, i, n, total, plan, None if plan is None else extra.get(n, 0.0), evaluations)
            for i, n in enumerate(g.part_names)
        )
    return Report(
        repr(elbo) if plan is not None else type(elbo).__name__, library, num_draws, seed, rows, sites, why, total,
        float(moments.losses.mean), moments.losses.error, milliseconds, compiled, evaluations,
        data_share,
        dict(moments.mean), {n: moments.variance(n) for n in g.names},
    )  # fmt: skip


def _of_the_data(g: Any, num_draws: int, seed: int, elbo: Any, advance: Advance) -> float:
    """Var(E[g | data]) / Var(g): two draws g₁, g₂ of one minibatch have the covariance Var(E[g | data])."""
    pairs = Moments()
    for losses, found in g.pairs(num_draws, seed):
        check_finite(losses, found, elbo)
        pairs.add_parts(losses, found)
        advance(len(losses))
    variances = sum(float(s.sum()) for s in pairs.part_squares.values())  # of g₁ and of g₂
    products = sum(float(s.sum()) for s in pairs.part_products.values())  # of each with g₁ + g₂
    return (products - variances) / variances if variances > 0 else 0.0


def timing(g: Any, library: Library, steps: int) -> tuple[float, float | None]:
    """Milliseconds of a step (median), and seconds to compile it (None in Pyro)."""
    first = g.seconds(1)[0]
    median = statistics.median(g.seconds(max(steps, 1)))
    return 1e3 * median, max(first - median, 0.0) if library.compiles else None


def evaluations_by_site(plan: Any) -> dict[str, float]:
    """Evaluations that each site adds to a step; those that sites share are divided between them."""
    extra = dict.fromkeys(plan.sites, 0.0)
    for group in plan.groups:
        for name in group.sites:
            extra[name] += (group.alternatives + group.relaxations) / len(group.sites)
    return extra


def _parameter(m: Moments, name: str, total: float) -> ParameterRow:
    variance = float(m.variance(name).sum())
    return ParameterRow(
        name,
        m.mean[name].shape,
        float(np.linalg.norm(m.mean[name])),
        variance,
        signal_to_noise(m.mean[name], variance, m.count),
        variance / total if total > 0 else 0.0,
    )


def _site(
    m: Moments, i: int, name: str, total: float, plan: Any, extra: float | None, evaluations: int | None
) -> SiteRow:
    means = np.concatenate([mean[i].ravel() for mean in m.part_mean.values()])
    variance = float(sum(s[i] for s in m.part_squares.values())) / (m.count - 1)
    covariance = float(sum(s[i] for s in m.part_products.values())) / (m.count - 1)
    known = plan is not None and name in plan.estimators
    return SiteRow(
        name,
        repr(plan.estimators[name]) if known else None,
        float(np.linalg.norm(means)),
        variance,
        signal_to_noise(means, variance, m.count),
        covariance / total if total > 0 else 0.0,
        extra if known else None,
        extra / evaluations if known and extra is not None and evaluations else None,
    )
