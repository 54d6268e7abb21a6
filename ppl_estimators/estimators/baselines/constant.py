"""A fixed number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.estimator import Array, Kept, Ops, Site
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class Constant(Baseline):
    """The same number at every step, in nats of the (scaled) downstream cost.

    For           a cost whose level you know

    >>> Constant(-12.5)
    Constant(-12.5)
    """

    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"Constant(value) needs a finite number, got {self.value!r}.")

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return ops.zeros_like(cost) + self.value
