"""The coefficient of a control variate: the slope of the cost on it, from draws that it is not applied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .keep import Initial, Keeps, guarded
from .ops import Array, Ops
from .spec import Spec

#: A slope through n points of a continuous law has tails like a t distribution of n − 1 degrees of freedom: through
#: two it has no mean, through three no variance. So many other draws it takes for both.
FEWEST = 4

#: of `fitted`
MOMENTS = ("weight", "f", "h", "fh", "hh")


class Source(Spec):
    """Where the sums behind a coefficient come from: never from the draw that it is applied to."""

    from_particles: ClassVar[bool]

    def keeps(self, labels: tuple[str, ...]) -> Keeps:
        return Keeps()

    def sums(
        self, ops: Ops, now: Mapping[str, Array], state: Mapping[str, Array]
    ) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        """What stands in for each of ``now [K, *plates]``, all times one positive number; and the new state."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class OtherParticles(Source):
    """Source of the other particles of this step, per plate element."""

    from_particles: ClassVar[bool] = True

    def sums(
        self, ops: Ops, now: Mapping[str, Array], state: Mapping[str, Array]
    ) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        return {k: ops.sum(x, axis=0, keepdims=True) - x for k, x in now.items()}, {}


@dataclass(frozen=True, eq=False, repr=False)
class PastSteps(Source):
    """Source of past steps, as moving averages of one number per site. ``decay``: weight of the past, in [0, 1).

    >>> PastSteps(0.9)
    PastSteps(0.9)
    """

    decay: float = 0.99

    from_particles: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"PastSteps(decay) needs 0 <= decay < 1, got {self.decay!r}.")

    def keeps(self, labels: tuple[str, ...]) -> Keeps:
        return Keeps(state={k: Initial() for k in labels})

    def sums(
        self, ops: Ops, now: Mapping[str, Array], state: Mapping[str, Array]
    ) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
        # All moments decay alike, so their ratios need no correction for the start at zero.
        old = {k: state[k] for k in now}
        new = {k: self.decay * old[k] + (1 - self.decay) * ops.like(ops.mean(x), old[k]) for k, x in now.items()}
        return {k: ops.like(old[k], x) + ops.zeros_like(x) for k, x in now.items()}, guarded(ops, old, new)


def check_source(spec: Spec, label: str, decay: float | None) -> None:
    """Of field ``label``; ``decay`` is short for what it means, `PastSteps`."""
    if decay is not None:
        if getattr(spec, label) != OtherParticles():
            raise ValueError(f"{type(spec).__name__} takes {label} or decay, not both.")
        object.__setattr__(spec, label, PastSteps(decay))
    given = getattr(spec, label)
    if not isinstance(given, Source):
        raise TypeError(f"{type(spec).__name__}({label}) takes OtherParticles() or PastSteps(0.99), got {given!r}.")


def fitted(
    ops: Ops, f: Array, h: Array, state: Mapping[str, Array], moments: Source
) -> tuple[Array, Mapping[str, Array]]:
    """Cov(f, h) / Var(h) of ``f`` and ``h [K, *plates]``; and the new state."""
    h = h + ops.zeros_like(f)
    now = dict(zip(MOMENTS, (ops.ones_like(f), f, h, f * h, h * h), strict=True))
    sums, new = moments.sums(ops, now, state)
    return _slope(ops, sums), new


def _slope(ops: Ops, m: Mapping[str, Array]) -> Array:
    weight = ops.where(m["weight"] > 0, m["weight"], ops.ones_like(m["weight"]))
    f, h, fh, hh = (m[k] / weight for k in ("f", "h", "fh", "hh"))
    variance = hh - h * h
    flat = variance <= 1e-12 * (hh + 1e-30)
    return ops.where(flat, ops.zeros_like(variance), (fh - f * h) / ops.where(flat, ops.ones_like(variance), variance))
