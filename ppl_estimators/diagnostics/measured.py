"""One candidate under measurement: draws and times so far, and more on demand."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .candidates import Candidate, Program
from .library import Advance, check_finite, quiet
from .moments import Moments

#: seconds that a draw by itself costs in NumPyro beside its own time
OVERHEAD = 2e-3


class Measured:
    """Draw number i is a function of the program's seed and of i, so going on gives what starting afresh would.

    ``evaluations``: runs of the program a step, if somebody has said so.
    ``batch``: the variance is also taken over every so many draws, which gives its standard error.
    """

    def __init__(self, program: Program, candidate: Candidate, batch: int):
        self.candidate, self.program = candidate, program
        self.moments, self._batch = Moments(), Moments()
        self._batches: list[float] = []
        self._size = max(2, batch)
        self._first: float | None = None
        self._times: list[float] = []
        self.evaluations = 0
        with quiet():
            p = program
            self.gradients = p.library.gradients(
                candidate.elbo, p.model, candidate.guide, p.args, p.kwargs, p.params, seed=p.seed
            )

    def moved(self, away: Mapping[str, np.ndarray]) -> Measured:
        """The same at another point of the parameters, nothing drawn yet; its times are those of this one."""
        other = copy.copy(self)
        other.gradients = self.gradients.moved(away)
        other.moments, other._batch, other._batches = Moments(), Moments(), []
        return other

    # ---- time ---------------------------------------------------------------------------------------------------

    def time(self, steps: int) -> None:
        """That many steps; the very first is apart, since NumPyro compiles in it."""
        with quiet():
            if self._first is None:
                self._first = self.gradients.seconds(1)[0]
            self._times += self.gradients.seconds(max(steps, 1))

    def forget_times(self) -> None:
        self._times = []

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self._times)

    @property
    def compile_seconds(self) -> float | None:
        if self._first is None or not self.program.library.compiles:
            return None
        return max(self._first - self.milliseconds / 1e3, 0.0)

    # ---- noise --------------------------------------------------------------------------------------------------

    def draw(self, until: int, advance: Advance, offset: int = 0) -> None:
        """Go on until that many draws are in, of numbers from ``offset`` on."""
        with quiet():
            while (left := until - self.moments.count) > 0:
                size = 1 if self._singly(left) else left
                start = offset + self.moments.count
                advance(0, self.candidate.label)
                for losses, gradients in self.gradients.draws(size, self.program.seed, None, start):
                    check_finite(losses, gradients, self.candidate.elbo)
                    self._add(losses, gradients)
                    advance(len(losses), self.candidate.label)

    def _singly(self, draws: int) -> bool:
        """Is a loop over the program that `time` has compiled sooner done than another compilation?"""
        if not self._times or self.compile_seconds is None:
            return False
        return draws * (self.milliseconds / 1e3 + OVERHEAD) < self.compile_seconds

    def _add(self, losses: np.ndarray, gradients: Mapping[str, np.ndarray]) -> None:
        self.moments.add(losses, gradients)
        done = 0
        while done < len(losses):
            count = min(self._size - self._batch.count, len(losses) - done)
            self._batch.add(losses[done : done + count], {n: g[done : done + count] for n, g in gradients.items()})
            done += count
            if self._batch.count == self._size:
                self._batches.append(self._batch.total_variance)
                self._batch = Moments()

    @property
    def variance_error(self) -> float:
        """Standard error of the total variance of one draw."""
        if len(self._batches) < 2:
            return float("nan")
        return float(np.std(self._batches, ddof=1) / np.sqrt(len(self._batches)))


def trained(gradients: Any, steps: int, step_size: float, seed: int) -> dict[str, np.ndarray]:
    """How far so many steps of Adam get, by parameter, in the unconstrained space."""
    zero = {name: np.zeros(shape) for name, shape in gradients.shapes.items()}
    away, mean, square = dict(zero), dict(zero), dict(zero)
    with quiet():
        for t in range(1, steps + 1):
            _, gradient = gradients.moved(away).draw(seed, t)
            for n, g in gradient.items():
                mean[n], square[n] = 0.9 * mean[n] + 0.1 * g, 0.999 * square[n] + 0.001 * g**2
                size = step_size * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
                away[n] = away[n] - size * mean[n] / (square[n] ** 0.5 + 1e-8)
    return away


def time_together(several: Iterable[Measured], steps: int) -> None:
    """Afresh and in turns, so that whatever else the machine does meets all alike."""
    several, turns = list(dict.fromkeys(several)), min(4, max(steps, 1))
    for one in several:
        one.forget_times()
    for _ in range(turns):
        for one in several:
            one.time(-(-steps // turns))
