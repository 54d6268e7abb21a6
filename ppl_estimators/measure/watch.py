"""What a `GradientMonitor` and the adapters tell one another while a program trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..core.families import DISCRETE
from ..core.plan import Plan


class Moment(NamedTuple):
    """Exponential averages of one vector g over ``count`` steps, the weights summing to 1 − decay^count:
    ``square_of_mean`` is ‖avg g‖², ``mean_square`` avg ‖g‖²."""

    kind: str  # "parameter" or "site"
    name: str
    count: int  # type: ignore[assignment]  # instead of a tuple's own
    square_of_mean: float
    mean_square: float


class Snapshot(NamedTuple):
    """What an adapter hands over at a look. ``skipped``: steps left out because something was not finite."""

    step: int
    skipped: int
    loss: float
    moments: tuple[Moment, ...]


class Watcher(Protocol):
    """What an adapter asks of a monitor."""

    every: int
    decay: float

    def begin(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the first step."""

    def flat(self, site: str, terms: Iterable[str]) -> None:
        """A pathwise site in which these cost terms jump."""

    def receive(self, snapshot: Snapshot) -> None:
        """One look."""


def place(term: Any) -> str:
    """A cost term, in words."""
    return f"'{term.site}'" + (" in the guide" if term.side == "guide" else "")


def through_values(plan: Plan) -> list[str]:
    """Sites whose gradient is taken through their value, and the model's slope in it."""
    return [n for n, e in plan.estimators.items() if e.value.moves and plan.sites[n].family not in DISCRETE]


#: what both adapters call with a site and a change of its value: the terms' values and their derivatives along that
Probe = Callable[[str, Any], Mapping[str, tuple[float, float]]]


def flat_sites(pathwise: Sequence[str] | None, latents: Mapping[str, Any], probe: Probe) -> dict[str, list[str]]:
    """Sites whose gradient is taken through their value (those that are ``pathwise``, if this is known), and the cost
    terms that jump in it: three values of each are tried, all other sites held."""
    known = [n for n, m in latents.items() if (m["fn"].has_rsample if pathwise is None else n in pathwise)]
    found = {n: jumps(partial(probe, n), range(3)) for n in known}
    return {n: terms for n, terms in found.items() if terms}


def jumps(probe: Callable[[Any], Mapping[str, tuple[float, float]]], values: Iterable[Any]) -> list[str]:
    """Terms that change with the value although their derivative was exactly 0 at every value."""
    seen = [probe(v) for v in values]
    found = []
    for term in seen[0]:
        pairs = [s[term] for s in seen if term in s]
        heights = [height for height, _ in pairs]
        if all(slope == 0 for _, slope in pairs) and max(heights) - min(heights) > 1e-6 * (1 + abs(heights[0])):
            found.append(term)
    return found
