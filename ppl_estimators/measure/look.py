"""What one plain run of a program shows, and how its mistakes are named."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import EstimatorError


@dataclass
class Ran:
    """What one run of a guide or a model had: shapes of its latent sites, what it observes, plates with their full and
    drawn size, latents marked to be summed out, sites whose log probability is not finite (and what it was)."""

    latents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    observed: list[str] = field(default_factory=list)
    plates: dict[str, tuple[int, int]] = field(default_factory=dict)
    enumerated: set[str] = field(default_factory=set)
    bad: dict[str, float] = field(default_factory=dict)

    def note(self, message: Mapping[str, Any], log_p: float) -> None:
        """A sample site, as either library's trace holds it."""
        name = message["name"]
        if message["is_observed"]:
            self.observed.append(name)
        else:
            self.latents[name] = tuple(message["value"].shape)
            if message["infer"].get("enumerate"):
                self.enumerated.add(name)
        if not math.isfinite(log_p):
            self.bad[name] = log_p


@contextmanager
def said(what: str) -> Iterator[None]:
    """An exception that is not ours is said in one line after ``what``, with the original as cause."""
    try:
        yield
    except EstimatorError:
        raise
    except Exception as error:
        raise EstimatorError(f"{what} {in_short(error)}") from error


def raised_by(role: str) -> AbstractContextManager[None]:
    return said(f"the {role} raised")


def in_short(error: Exception) -> str:
    """An exception of somebody else's in one line, without the trace that Pyro appends."""
    text = str(error).partition("Trace Shapes:")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"
