"""What every diagnostic does: ask an ELBO for its library, refuse what is not finite, show a bar."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from ..backends import Library, of_elbo
from ..core.errors import EstimatorError, EstimatorWarning


class Advance(Protocol):
    def __call__(self, draws: int, what: str = "") -> None: ...


def library_of(elbo: Any, call: str = "") -> Library:
    """Of an ELBO, or an `EstimatorError`."""
    if isinstance(elbo, type):
        raise EstimatorError(f"elbo is the class {elbo.__name__}, not an ELBO. Write {elbo.__name__}().")
    library = of_elbo(elbo)
    if library is None:
        order = f" The order is {call}." if call else ""
        raise EstimatorError(
            f"{elbo!r} is an ELBO of neither Pyro nor NumPyro. Pass an object such as EstimatorELBO() or "
            f"Trace_ELBO().{order}"
        )
    return library


def check_finite(losses: np.ndarray, gradients: Mapping[str, np.ndarray], elbo: Any) -> None:
    bad = [name for name, x in gradients.items() if not np.isfinite(x).all()]
    if bad or not np.isfinite(losses).all():
        what = f"the gradient of {', '.join(map(repr, bad))}" if bad else "the loss"
        raise EstimatorError(
            f"{what} is not finite in a draw of {type(elbo).__name__}. A value outside a support, a scale of zero or "
            "an overflow in the guide or the model: look at these parameters' values, and at the warnings above."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """What a candidate warns of is not about the user's own choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        yield


@contextmanager
def bar(description: str, total: int, show: bool | None) -> Iterator[Advance]:
    """A progress bar with the time so far and the time to go; its value takes how many draws have been added, and of
    what. ``show`` None: in a terminal only."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda draws, what="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=34))
    columns = (what, BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda draws, what="": progress.update(
            task, advance=draws, description=f"{description}: {what}" if what else description
        )
