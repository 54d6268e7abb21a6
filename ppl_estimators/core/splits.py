"""A categorical draw as a run of coin flips: C − 1 splits of the categories in two.

Split ν is reached by a category it holds, and its bit says on which side: left[ν, c] for bit 1, right[ν, c] for bit 0.

    a_ν = log Σ_{c left of ν} exp φ_c − log Σ_{c right of ν} exp φ_c,   b_ν ~ Bernoulli(σ(a_ν))

The one category that agrees with every split on its path is distributed as softmax(φ).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .families import BERNOULLI, category, encoded, threshold
from .ops import Array, Ops
from .site import Costs, Draw, Local, Site


class Splits(NamedTuple):
    """Which categories lie on either side: rows of zeros and ones, ``[C - 1, C]``."""

    left: list[list[float]]
    right: list[list[float]]


def sticks(c: int) -> Splits:
    """Stick-breaking: split ν parts category ν from those after it."""
    return Splits(
        [[float(i == s) for i in range(c)] for s in range(c - 1)],
        [[float(i > s) for i in range(c)] for s in range(c - 1)],
    )


def tree(c: int) -> Splits:
    """A balanced tree: split each range of categories in the middle."""
    found = Splits([], [])

    def split(low: int, high: int) -> None:
        middle = (low + high) // 2
        if low < middle:
            found.left.append([float(low <= i < middle) for i in range(c)])
            found.right.append([float(middle <= i < high) for i in range(c)])
            split(low, middle)
            split(middle, high)

    split(0, c)
    return found


def split_logits(ops: Ops, splits: Splits, logits: Array) -> Array:
    """``a [..., C - 1]`` of ``logits [..., C]``, differentiable."""
    wide = logits[..., None, :]

    def side(members: list[list[float]]) -> Array:
        inside = ops.like(members, logits) > 0
        return ops.logsumexp(ops.where(inside, wide, ops.full_like(wide, -math.inf)), axis=-1)

    return side(splits.left) - side(splits.right)


def leaf(ops: Ops, splits: Splits, bits: Array) -> Array:
    """The category that ``bits [..., C - 1]`` lead to, integers ``[...]``."""
    against = ops.matmul(1 - bits, ops.like(splits.left, bits)) + ops.matmul(bits, ops.like(splits.right, bits))
    return ops.argmin(against, axis=-1)


def path(ops: Ops, splits: Splits, index: Array, like: Array) -> Array:
    """Which splits the category ``index [...]`` meets: zeros and ones ``[..., C - 1]`` in the dtype of ``like``."""
    categories = len(splits.left) + 1
    held = ops.like(splits.left, like) + ops.like(splits.right, like)
    return ops.matmul(ops.one_hot(index, categories, like), ops.permute_dims(held, (1, 0)))


def ordering(ops: Ops, logits: Array, order: str) -> Array:
    """Categories in the order in which they are tried, ``[..., C]``."""
    if order == "given":
        return ops.broadcast_to(ops.indices(logits.shape[-1], logits), logits.shape)
    return ops.argsort(-logits if order == "descending" else logits, axis=-1)


def antithetic(ops: Ops, site: Site, tree: Splits, order: Array, u: Array) -> Draw:
    """z from the bits of u, z̃ from those of 1 − u: each is a draw of its own."""
    a = split_logits(ops, tree, ops.take_last(site.logits, order))
    b, b_tilde = threshold(ops, BERNOULLI, a, u), threshold(ops, BERNOULLI, a, 1 - u)
    z, z_tilde = (ops.take_last(order, leaf(ops, tree, x)[..., None])[..., 0] for x in (b, b_tilde))
    extra = {"b": b, "b_tilde": b_tilde, "z_tilde": z_tilde, "order": order}
    return Draw(encoded(ops, site.family, z, site.logits), extra)


def visited(ops: Ops, site: Site, tree: Splits, draw: Draw) -> tuple[Array, Array]:
    """m and m̃: which splits z and z̃ meet, zeros and ones ``[K, *batch, *event, C - 1]``."""
    order = draw.extra["order"]
    found = []
    for z in (category(ops, site.family, draw.value), draw.extra["z_tilde"]):
        place = ops.argmax(ops.like(order == z[..., None], site.logits), axis=-1)
        found.append(path(ops, tree, place, site.logits))
    return found[0], found[1]


def disarm(ops: Ops, site: Site, tree: Splits, draw: Draw, costs: Costs) -> Local:
    """DisARM at splits that both meet, score function at splits that one of them meets. Nothing where z = z̃."""
    b, b_tilde = draw.extra["b"], draw.extra["b_tilde"]
    a = split_logits(ops, tree, ops.take_last(site.logits, draw.extra["order"]))
    m, m_tilde = visited(ops, site, tree, draw)
    p = ops.sigmoid(a)
    both = m * m_tilde * (b - b_tilde) * ops.sigmoid(ops.abs(a))
    one = m * (1 - m_tilde) * (b - p) - m_tilde * (1 - m) * (b_tilde - p)
    gradient = 0.5 * site.spread(ops, costs.value - costs.alternatives[0], trailing=1) * (both + one)
    return Local(ops.stop_gradient(gradient) * a)
