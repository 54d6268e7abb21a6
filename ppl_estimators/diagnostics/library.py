"""What every diagnostic does: ask an ELBO for its library, refuse what is not finite, show a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..backends import Library, of_elbo
from ..core.errors import EstimatorError


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


def bar(description: str, total: int, show: bool | None) -> Any:
    """A progress bar, as a context whose value takes the number of draws done. ``show`` None: in a terminal only."""
    if show is None:
        show = sys.stderr.isatty()
    return _Bar(description, total) if show else nullcontext(None)


class _Bar:
    def __init__(self, description: str, total: int):
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(description, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        return lambda done: self.progress.update(self.task, completed=done)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
