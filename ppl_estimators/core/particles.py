"""Draws of one site side by side: the particles are the first axis of its arrays, ``[K, ...]``."""

from __future__ import annotations

from .ops import Array, Ops
from .site import Site


def of_the_others(ops: Ops, x: Array) -> Array:
    """Mean over the other particles, ``[K, ...]``; of a particle that stands alone, zero."""
    k = x.shape[0]
    return (ops.sum(x, axis=0, keepdims=True) - x) / max(k - 1, 1)


def times(ops: Ops, site: Site, n: int, cost: Array, log_q: Array | None) -> Site:
    """The site with ``n`` draws in each of K particles, as n·K particles: the first draw of each, then the second of
    each, ... ``cost [K, *plates]`` is that of one of them, ``log_q [n K, *batch]`` that of all."""

    def tiled(x: Array | None) -> Array | None:
        return None if x is None else ops.concat([x] * n, axis=0)

    unit = site.unit(ops, cost)
    return site.filled(
        scale=tiled(ops.broadcast_to(unit, (cost.shape[0], *unit.shape[1:]))),
        logits=tiled(site.logits),
        named={k: tiled(x) for k, x in site.named.items()},
        log_q=log_q,
        score_norm=None,
    )
