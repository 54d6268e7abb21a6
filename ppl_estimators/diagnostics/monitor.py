"""`GradientMonitor`: the noise of the gradient while it trains, by running moments of what steps compute anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends import Library, of_svi
from ..core.errors import EstimatorError, warn
from ..measure.watch import Moment, Snapshot
from .log import Log, MonitorRow, open_log
from .moments import running
from .program import check_program
from .show import Showable, Shown, axes, named, number, ratio

#: signal to noise below which a step is nothing but noise, and what counts as a clear signal
DROWNED, CLEAR = 0.05, 0.2
#: looks whose mean is judged, and the fewest of them
LOOKS, FEWEST = 10, 3
#: a fall of the signal with less noise than so many times that of the clear signal is convergence
LOUDER = 10.0


@dataclass(frozen=True, repr=False)
class MonitorReport(Showable):
    """The looks of a `GradientMonitor`: ``rows`` of all, in order. Printed, it is the last one."""

    library: str
    every: int
    decay: float
    step: int
    skipped: int
    loss: float
    rows: tuple[MonitorRow, ...]

    def last(self, kind: str | None = None) -> list[MonitorRow]:
        return [r for r in self.rows if r.step == self.step and kind in (None, r.kind)]

    def __getitem__(self, name: str) -> MonitorRow:
        """The last look at a site or parameter."""
        found: MonitorRow = named(self.last(), "name", name, "site or parameter")
        return found

    def tables(self) -> list[Shown]:
        about = f"Running means over about {round(1 / (1 - self.decay)):,} steps; running loss {number(self.loss, 5)}."
        if self.skipped:
            about += f" {self.skipped:,} steps were not finite and are left out."
        headings = ("‖mean‖", "variance", "signal/noise")
        return [
            Shown(
                f"Gradient by {kind}, step {self.step:,} ({self.library})",
                (kind, *headings),
                tuple(
                    (r.name, number(r.mean_norm or None), number(r.variance), ratio(r.signal_to_noise))
                    for r in self.last(kind)
                ),
                caption,
            )
            for kind, caption in (("parameter", about), ("site", "In the parameters of the site's own distribution."))
            if self.last(kind)
        ]

    def records(self) -> list[dict[str, Any]]:
        return [vars(r) for r in self.rows]

    def plot(self) -> Any:
        """Signal to noise over the steps, as a matplotlib figure."""
        kinds = [kind for kind in ("parameter", "site") if self.last(kind)]
        figure, places = axes(8, max(len(kinds), 1))
        for ax, kind in zip(places, kinds, strict=False):
            for name in dict.fromkeys(r.name for r in self.rows if r.kind == kind):
                mine = [r for r in self.rows if r.kind == kind and r.name == name]
                ax.plot([r.step for r in mine], [max(r.signal_to_noise, 1e-3) for r in mine], label=name)
            ax.set(title=f"by {kind}", xlabel="step", ylabel="signal / noise of one step", yscale="log")
            ax.legend(fontsize="small", labelcolor="linecolor", frameon=False)
        return figure


class GradientMonitor:
    """Mean, variance and signal-to-noise of the gradient while `SVI` trains, in either library, with any ELBO.

    >>> monitor = GradientMonitor(every=100)  # doctest: +SKIP
    >>> svi = monitor.watch(SVI(model, guide, optim, loss=EstimatorELBO()))  # doctest: +SKIP
    >>> svi.run(jax.random.key(0), 2000, data)  # or svi.step(data) in Pyro; as before  # doctest: +SKIP
    >>> print(monitor.report())  # doctest: +SKIP

    By parameter: of the gradient that the optimiser gets. By site: of the slope of the loss in the parameters of the
    site's distribution, which the backward pass meets on its way. No further evaluation, no further backward pass;
    one running mean for each entry is kept (in NumPyro inside the optimiser's state, so that a compiled loop carries
    it). Steps that are not finite are left out. Elements of a plate are entries: where they are other data at every
    step, what differs between data counts as noise.

    ``every``: steps from look to look. ``decay``: of the running means, which see about 1 / (1 − decay) steps.
    ``log``: where the looks go: a ``.csv`` file, a folder for TensorBoard (needs tensorboardX or tensorboard), or
    a writer with ``add_scalar(tag, value, step)``.

    Warns (`EstimatorWarning`), once for each:

    - a site's signal is lost in noise: not seen in ten looks, or gone while the noise grew tenfold;
    - a pathwise site moves the model's cost by jumps only, so that its gradient is wrong (checked before the first
      step).

    Before the first step guide and model run once by themselves, and a mistake in them is named (`EstimatorError`).

    In NumPyro, sites inside a `scan` have no row of their own.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        decay: float = 0.99,
        log: str | Path | Any | None = None,
    ):
        if every < 1:
            raise EstimatorError(f"GradientMonitor(every=...) needs 1 or more steps, got {every!r}.")
        if not 0 < decay < 1:
            raise EstimatorError(f"GradientMonitor(decay=...) lies between 0 and 1, got {decay!r}.")
        self.every, self.decay = every, decay
        self.rows: list[MonitorRow] = []
        self.library: Library | None = None
        self._log: Log | None = open_log(log)
        self._last: Snapshot | None = None
        self._watched: Any = None
        self._close: Callable[..., None] | None = None  # of a Pyro loop's step
        self._memory: dict[str, _Memory] = {}
        self._said: set[str] = set()

    def watch(self, thing: Any) -> Any:
        """A watched copy of an `SVI` (of its own class), to be used in its place; ``thing`` itself is not changed.

        In Pyro also of a guide, for a loop without `SVI`: call the monitor after each backward pass.
        """
        library = of_svi(thing)
        if library is None:
            if not callable(thing):
                raise EstimatorError(f"GradientMonitor.watch takes an SVI (or in Pyro a guide), got {thing!r}.")
            library = Library.pyro
        if self._watched is not None:
            raise EstimatorError("this GradientMonitor watches already. Make one for each SVI.")
        self.library = library
        self._watched, self._close = library.part("monitor").watch(thing, self)
        return self._watched

    def __call__(self, loss: Any, parameters: Iterable[tuple[str, Any]]) -> None:
        """In a Pyro loop without `SVI`, after ``loss.backward()``: one step has its gradients in
        ``module.named_parameters()``."""
        if self._close is None:
            raise EstimatorError("this GradientMonitor watches no guide. Write guide = monitor.watch(guide) first.")
        self._close(loss, dict(parameters))

    def report(self) -> MonitorReport:
        """All looks so far."""
        if self.library is not None:
            self.library.part("monitor").arrived()
        if self._last is None:
            raise EstimatorError(
                f"this GradientMonitor has seen no step that it looks at: it looks every {self.every} steps. Train on "
                "with what monitor.watch(svi) returned, or use a smaller every=."
            )
        at = self._last
        return MonitorReport(str(self.library), self.every, self.decay, at.step, at.skipped, at.loss, tuple(self.rows))

    # ---- what the adapters ask and hand over: `measure.watch.Watcher` -----------------------------------------------

    def begin(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Name a mistake in the program, in its own terms."""
        check_program(model, guide, args, kwargs, backend=self.library)

    def receive(self, snapshot: Snapshot) -> None:
        """One look."""
        if self._last is not None and snapshot.step <= self._last.step:  # another run begins
            self.rows, self._memory = [], {}
        skipped = snapshot.skipped - (self._last.skipped if self._last and self.rows else 0)
        self._last = snapshot
        signals, rows = [], []
        for m in (m for m in snapshot.moments if m.count > 1):
            signal, variance = running(m.square_of_mean, m.mean_square, self.decay, m.count)
            signals.append(signal)
            rows.append(_row(snapshot.step, m, max(signal, 0.0), variance))
        self.rows += rows
        if self._log is not None:
            self._log.write(rows, snapshot.loss)
        if skipped >= self.every:
            self._warn("finite", f"none of the last {self.every:,} steps was finite; the monitor left them out.")
        for row, signal in zip(rows, signals, strict=True):
            if row.kind == "site" and row.variance > 0:  # else neither signal nor noise
                self._judge(row, signal / row.variance)

    def _judge(self, row: MonitorRow, ratio: float) -> None:
        past = self._memory.setdefault(row.name, _Memory())
        past.ratios.append(ratio)  # may be negative: without bias, so that looks average out
        mean = sum(past.ratios) / len(past.ratios)
        if len(past.ratios) < FEWEST:
            return
        if min(mean, ratio) > CLEAR**2:
            past.clear = row.variance
        if mean > DROWNED**2:
            return
        if past.clear is None and len(past.ratios) == LOOKS:
            how = f"no signal stood out of the noise in {LOOKS} looks"
        elif past.clear is not None and row.variance > LOUDER * past.clear:
            how = f"the signal is lost: the variance is {row.variance / past.clear:,.0f} times what it was"
        else:
            return
        self._warn(
            f"drowned {row.name}",
            f"site '{row.name}': {how} (signal/noise below {DROWNED:g} at step {row.step:,}). Unless it has converged, "
            "its steps are noise: use more particles or a quieter estimator there (diagnostics.compare finds one), or "
            "a lower learning rate.",
        )

    def flat(self, site: str, terms: Iterable[str]) -> None:
        """A pathwise site in which these cost terms jump."""
        self._warn(
            f"flat {site}",
            f"site '{site}': the log density at {', '.join(terms)} changes with its value, but has derivative 0 in it: "
            "a jump, which no pathwise gradient sees. Did you mean Reinforce()? Write "
            f'EstimatorELBO({{"{site}": Reinforce(LeaveOneOut())}}, num_particles=2).',
        )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warn(message)


def _row(step: int, m: Moment, signal: float, variance: float) -> MonitorRow:
    if variance > 1e-12 * m.mean_square:
        ratio = (signal / variance) ** 0.5
    else:  # as good as none, in single precision
        ratio = float("inf") if signal > 0 else 0.0
    return MonitorRow(step, m.kind, m.name, signal**0.5, variance, ratio)


@dataclass
class _Memory:
    """Of one site: signal² / variance of the last looks, and the variance when there was a clear signal last."""

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKS))
    clear: float | None = None
