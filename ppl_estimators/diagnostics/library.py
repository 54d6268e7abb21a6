"""Which library an ELBO belongs to, and its `Gradients`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from ..core.errors import EstimatorError


def library_of(elbo: Any) -> str:
    """ "pyro" or "numpyro", by the class of the ELBO."""
    for base in type(elbo).__mro__:
        root = base.__module__.split(".")[0]
        if root in ("pyro", "numpyro"):
            return root
    raise EstimatorError(
        f"{elbo!r} is an ELBO of neither Pyro nor NumPyro. Pass an object such as EstimatorELBO() or Trace_ELBO()."
    )


def gradients_class(library: str) -> Any:
    """`Gradients` of a library."""
    if library == "pyro":
        from ..pyro.gradients import Gradients
    else:
        from ..numpyro.gradients import Gradients
    return Gradients


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
