"""What the terminal shows: progress bars while it runs, a table when it is done."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from ppl_estimators.demo.experiment import BACKENDS, REFERENCE, Experiment, Result


class Bars:
    """A bar for the row at work and one for the whole; a finished row becomes a line above them."""

    def __init__(self, console: Console, rows: int) -> None:
        self.progress = Progress(  # fits a terminal of 80 columns
            TextColumn("{task.description:<47}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self.whole = self.progress.add_task("[bold]all estimators", total=rows, status="")
        self.row = TaskID(-1)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, result: Result) -> None:
        name = f"{BACKENDS[result.backend]:<7}  {result.label}"
        status = "compiling …" if result.backend == "numpyro" else "training …"
        self.row = self.progress.add_task(name, total=result.steps, status=status)

    def advance(self, result: Result) -> None:
        self.progress.update(self.row, completed=result.curve[-1][0], status=f"ELBO {result.held_out_elbo:.2f}")

    def measure(self, result: Result) -> None:
        self.progress.update(self.row, status="gradient …")

    def finish(self, result: Result) -> None:
        self.progress.remove_task(self.row)
        self.progress.advance(self.whole)
        name = f"{BACKENDS[result.backend]:<7}  {result.label:<39}"
        figures = f"ELBO {result.held_out_elbo:8.2f}  {result.milliseconds_per_step:6.2f} ms"
        self.progress.console.print(name, figures, highlight=False, soft_wrap=True)


def table(experiment: Experiment) -> Table:
    """The results, the best of each library's columns in bold."""
    settings = experiment.settings
    first = BACKENDS[experiment.results[0].backend]
    view = Table(
        title="A deep belief network of digits, one latent continuous, two layers binary",
        caption=f"Held-out ELBO in nats per image. Gradient variance: total over the guide's parameters, "
        f"at the point that {REFERENCE.label} reached in {first}, on one minibatch of "
        f"{settings.batch_size}, over {settings.gradient_draws} draws. "
        "Variance × time (a step's seconds): the noise that a fixed budget of time leaves.",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    view.add_column("\nestimator", no_wrap=True)
    for heading in ("held-out\nELBO", "gradient\nvariance", "ms per\nstep", "variance\n× time"):
        view.add_column(heading, justify="right")
    for backend in dict.fromkeys(result.backend for result in experiment.results):
        rows = [result for result in experiment.results if result.backend == backend]
        view.add_section()
        view.add_row(f"[bold cyan]{BACKENDS[backend]}[/], {rows[0].steps:,} steps")
        columns = [
            _column([row.held_out_elbo for row in rows], "{:.2f}".format, max),
            _column([row.gradient_variance for row in rows], _three_digits, min),
            _column([row.milliseconds_per_step for row in rows], "{:.2f}".format, min),
            _column([row.variance_times_seconds for row in rows], _three_digits, min),
        ]
        for row, *cells in zip(rows, *columns, strict=True):
            view.add_row(f"  {row.label}", *cells)
    return view


def _column(values: list[float], form: Callable[[float], str], best: Callable[[list[float]], float]) -> list[str]:
    winner = best(values)
    return [f"[bold]{form(value)}[/]" if value == winner else form(value) for value in values]


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"
