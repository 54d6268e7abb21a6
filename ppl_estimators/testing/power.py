"""The statistics of `assert_unbiased`: how many draws, and what counts as a bias.

    n  =  (c + z)² Σ_j σ_j² / (ε ‖g‖)²,     c = t_{1 − α/2P},   z = Φ⁻¹(detection)

P entries of the gradient, α false alarms, ε the relative bias to see. A bias b of length ε ‖g‖ has an entry with
|b_j| / σ_j ≥ ‖b‖ / ‖σ‖ (else Σ b_j² < ‖b‖²), so that entry's mean is at least c + z standard errors off: it is
beyond c with the wanted probability, whichever way b points and however the entries depend on each other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

PILOT = 200


class Sums(NamedTuple):
    """Of ``draws`` differences d between a gradient and the reference: Σ d ``[P]``, Σ d² ``[P]``, and how many were
    not finite ``[P]``."""

    draws: int
    total: np.ndarray
    squares: np.ndarray
    broken: np.ndarray

    def __add__(self, other: object) -> Sums:
        assert isinstance(other, Sums)
        return Sums(*map(operator.add, self, other))


#: ``source(first, n)``: the sums over draws number first, ..., first + n − 1 (at least n of them)
Source = Callable[[int, int], Sums]


@dataclass(frozen=True)
class Wanted:
    """A relative bias of ``able_to_see`` is found with probability ``detection``; none with 1 − ``false_alarms``."""

    able_to_see: float = 0.05
    false_alarms: float = 0.01
    detection: float = 0.99

    def __post_init__(self) -> None:
        for name in ("able_to_see", "false_alarms", "detection"):
            x = getattr(self, name)
            if not 0 < x < 1:
                raise ValueError(f"assert_unbiased({name}=...) takes a number between 0 and 1, got {x!r}.")

    def threshold(self, entries: int, draws: int) -> float:
        """c: Student's t by its expansion in 1 / draws."""
        x = NormalDist().inv_cdf(1 - self.false_alarms / (2 * entries))
        return x + (x**3 + x) / (4 * (draws - 1))

    def draws(self, variance: np.ndarray, length: float, draws: int) -> float:
        reach = self.threshold(len(variance), draws) + NormalDist().inv_cdf(self.detection)
        return float(reach**2 * variance.sum() / (self.able_to_see * length) ** 2)


@dataclass(frozen=True)
class Outcome:
    """Entry by entry: mean difference, its standard error, and distance in standard errors."""

    draws: int
    needed: float
    difference: np.ndarray
    error: np.ndarray
    sigmas: np.ndarray
    threshold: float
    sees: float

    @property
    def biased(self) -> bool:
        return bool((self.sigmas > self.threshold).any())


def measure(
    source: Source, length: float, wanted: Wanted, max_draws: int, slack: Callable[[np.ndarray], Any] = np.zeros_like
) -> Outcome:
    """Draw as many as the power needs; the means are looked at once, the number of draws looks at variances only.

    ``length``: ‖g‖. ``slack``: how far the means may be off by arithmetic alone, given the root mean square of the
    differences.
    """
    sums = source(0, min(PILOT, max_draws))
    while not sums.broken.any():
        n = sums.draws
        variance = np.maximum(sums.squares - sums.total**2 / n, 0) / (n - 1)
        needed = wanted.draws(variance, length, n)
        if n >= min(needed, max_draws) or needed > 4 * max_draws:
            break
        more = math.ceil(min(1.05 * needed, max_draws, 20 * n)) - n
        sums = sums + source(n, max(more, 1))
    n = sums.draws
    with np.errstate(invalid="ignore"):
        variance = np.maximum(sums.squares - sums.total**2 / n, 0) / (n - 1)
        difference, error = sums.total / n, np.sqrt(variance / n)
        beyond = np.maximum(np.abs(difference) - slack(np.sqrt(sums.squares / n)), 0)
        sigmas = np.divide(beyond, error, out=np.where(beyond > 0, np.inf, 0.0), where=error > 0)
    c = wanted.threshold(len(difference), n)
    sees = (c + NormalDist().inv_cdf(wanted.detection)) * float(np.sqrt(variance.sum() / n)) / length
    if sums.broken.any():
        return Outcome(n, math.inf, sums.broken.astype(float), error, np.full_like(error, np.nan), c, math.nan)
    return Outcome(n, wanted.draws(variance, length, n), difference, error, sigmas, c, sees)
