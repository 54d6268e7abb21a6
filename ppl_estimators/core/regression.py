"""The coefficient of a control variate: the slope of the cost on it, from draws that it is not applied to."""

from __future__ import annotations

from collections.abc import Mapping

from .keep import Initial, guarded
from .ops import Array, Ops

#: A slope through n points of a continuous law has tails like a t distribution of n − 1 degrees of freedom: through
#: two it has no mean, through three no variance. So many other draws it takes for both.
FEWEST = 4


def fitted(
    ops: Ops, f: Array, h: Array, state: Mapping[str, Array], decay: float | None
) -> tuple[Array, dict[str, Array]]:
    """Cov(f, h) / Var(h) of ``f`` and ``h [K, *plates]`` from the other particles, or with ``decay`` from the past;
    and the new moments."""
    h = h + ops.zeros_like(f)
    moments = {"weight": ops.ones_like(f), "f": f, "h": h, "fh": f * h, "hh": h * h}
    if decay is None:
        others = {k: ops.sum(x, axis=0, keepdims=True) - x for k, x in moments.items()}
        return _slope(ops, others), {}
    old = {k: state[k] for k in moments}
    now = {k: decay * old[k] + (1 - decay) * ops.like(ops.mean(x), old[k]) for k, x in moments.items()}
    return ops.like(_slope(ops, old), f) + ops.zeros_like(f), guarded(ops, old, now)


def no_past() -> dict[str, Initial]:
    """What `fitted` keeps with a ``decay``, before the first step."""
    return {k: Initial() for k in ("weight", "f", "h", "fh", "hh")}


def _slope(ops: Ops, m: Mapping[str, Array]) -> Array:
    weight = ops.where(m["weight"] > 0, m["weight"], ops.ones_like(m["weight"]))
    f, h, fh, hh = (m[k] / weight for k in ("f", "h", "fh", "hh"))
    variance = hh - h * h
    flat = variance <= 1e-12 * (hh + 1e-30)
    return ops.where(flat, ops.zeros_like(variance), (fh - f * h) / ops.where(flat, ops.ones_like(variance), variance))
