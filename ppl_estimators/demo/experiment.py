"""Trains every row in every backend and measures it; prints nothing."""

from __future__ import annotations

import importlib
import statistics
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ppl_estimators import EstimatorWarning
from ppl_estimators.demo.digits import Digits, load
from ppl_estimators.demo.network import initial_parameters
from ppl_estimators.demo.rows import REFERENCE, ROWS
from ppl_estimators.demo.settings import Settings

#: In the order of running: the first one's reference parameters serve the others too.
BACKENDS = {"numpyro": "NumPyro", "pyro": "Pyro"}


@dataclass
class Result:
    """One row of the table. ELBOs are in nats per image; `curve` has (steps, held-out ELBO)."""

    backend: str
    label: str
    num_particles: int
    steps: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    milliseconds_per_step: float = float("nan")
    compile_seconds: float = 0.0
    gradient_variance: float = float("nan")

    @property
    def held_out_elbo(self) -> float:
        """At the last checkpoint."""
        return self.curve[-1][1]

    @property
    def variance_times_seconds(self) -> float:
        """What a fixed budget of time leaves of the noise: lower is better."""
        return self.gradient_variance * self.milliseconds_per_step / 1e3


@dataclass
class Experiment:
    """All of a run: `reconstructions` by backend and `originals` are shares of ink, `[10, PIXELS]`."""

    settings: Settings
    results: list[Result] = field(default_factory=list)
    originals: Any = None
    reconstructions: dict[str, np.ndarray] = field(default_factory=dict)


class Watcher(Protocol):
    """Told how the run goes on; the progress bars are one."""

    def start(self, result: Result) -> None:
        """A row begins (its compilation, if any, comes first)."""

    def advance(self, result: Result) -> None:
        """A checkpoint was added to the row's curve."""

    def measure(self, result: Result) -> None:
        """Training is over, the gradient is being measured."""

    def finish(self, result: Result) -> None:
        """The row is complete."""


def run(backends: list[str], settings: Settings, watcher: Watcher) -> Experiment:
    """Every row of every backend; the results come in the order of the table."""
    digits = load(settings.seed)
    initial = initial_parameters(digits.train, settings.seed)
    experiment = Experiment(settings, originals=digits.one_of_each() / digits.train.max())
    reference: dict[str, np.ndarray] | None = None
    for backend in backends:
        trainer_of = importlib.import_module(f"ppl_estimators.demo.{backend}_trainer").Trainer
        rows = ROWS[backend]
        results = {}
        for row in sorted(rows, key=lambda row: row != REFERENCE):  # the reference comes first
            result = Result(backend, row.label, row.num_particles, settings.steps[backend])
            with warnings.catch_warnings():
                # Plain Reinforce() warns that it is a poor choice: here that is what it is shown for.
                warnings.simplefilter("ignore", EstimatorWarning)
                trainer = trainer_of(row, digits, initial, settings)
                watcher.start(result)
                _train(trainer, result, digits, settings, watcher)
                if row == REFERENCE:
                    reference = reference or trainer.parameters()
                    experiment.reconstructions[backend] = trainer.reconstruct(digits.one_of_each())
                watcher.measure(result)
                result.gradient_variance = trainer.gradient_variance(reference)
            watcher.finish(result)
            results[row.label] = result
        experiment.results += [results[row.label] for row in rows]
    return experiment


def _train(trainer, result: Result, digits: Digits, settings: Settings, watcher: Watcher) -> None:
    minibatches = digits.minibatches(result.steps, settings.batch_size, settings.seed)
    chunks = min(settings.checkpoints, result.steps)
    seconds = []
    for done, seconds_per_step in trainer.steps(minibatches, chunks):
        seconds.append(seconds_per_step)
        result.curve.append((done, trainer.held_out_elbo()))
        result.milliseconds_per_step = 1e3 * statistics.median(seconds[1:] or seconds)
        watcher.advance(result)
    steady = result.milliseconds_per_step / 1e3
    result.compile_seconds = max(0.0, (seconds[0] - steady) * result.curve[0][0])
