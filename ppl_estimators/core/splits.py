"""A categorical draw as a run of coin flips: C − 1 splits of the categories in two.

Split ν is reached by a category it holds, and its bit says on which side: left[ν, c] for bit 1, right[ν, c] for bit 0.

    a_ν = log Σ_{c left of ν} exp φ_c − log Σ_{c right of ν} exp φ_c,   b_ν ~ Bernoulli(σ(a_ν))

The one category that agrees with every split on its path is distributed as softmax(φ).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .ops import Array, Ops


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
