"""Many gradients of an ELBO as running sums: no gradient is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .power import Sums


class Differences:
    """Draws of ``gradients`` (a `Gradients` of either library) minus ``reference``, seeded, entries in its order.

    ``eps``: the spacing of the gradients' floats at 1, once one was drawn.
    """

    def __init__(self, gradients: Any, reference: Mapping[str, np.ndarray], seed: int):
        self.gradients, self.reference, self.seed = gradients, reference, seed
        self.eps = float(np.finfo(float).eps)

    def __call__(self, first: int, number: int) -> Sums:
        chunk = self.gradients.chunk()
        number = -(-number // chunk) * chunk  # whole chunks: one compiled program
        target = np.concatenate([np.ravel(g) for g in self.reference.values()])
        total, squares, broken = np.zeros_like(target), np.zeros_like(target), np.zeros_like(target)
        for _, found in self.gradients.draws(number, self.seed, start=first):
            rows = [np.reshape(found[name], (len(found[name]), -1)) for name in self.reference]
            self.eps = max(float(np.finfo(r.dtype).eps) for r in rows)
            difference = np.concatenate(rows, axis=1) - target
            finite = np.isfinite(difference)
            difference = np.where(finite, difference, 0)
            total += difference.sum(0)
            squares += (difference**2).sum(0)
            broken += (~finite).sum(0)
        return Sums(number, total, squares, broken)
