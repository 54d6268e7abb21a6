"""What is compared, and how long: trains every row in every backend and measures it; prints nothing."""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ppl_estimators import (
    DisARM,
    EstimatorWarning,
    Learned,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    Reinforce,
    RELAXWithModel,
)
from ppl_estimators.demo.network import Digits, initial_parameters, load

#: In the order of running: the first one's reference parameters serve the others too.
BACKENDS = {"numpyro": "NumPyro", "pyro": "Pyro"}


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `steps` by backend, because a step of NumPyro's is compiled and a step of Pyro's is not. The
    defaults take both libraries four to six minutes on two cores."""

    steps: dict[str, int] = field(default_factory=lambda: {"numpyro": 3_000, "pyro": 400})
    batch_size: int = 100
    learning_rate: float = 3e-3
    checkpoints: int = 20
    held_out_particles: int = 10
    burn_in: int = 200  # steps that an estimator's own networks get to settle at the reference
    gradient_draws: int = 150
    seed: int = 0

    def with_steps(self, steps: int) -> Settings:
        """The same, with `steps` in every backend."""
        return replace(self, steps=dict.fromkeys(self.steps, steps))

    def smoke(self) -> Settings:
        """A few seconds of everything, to see that it works; the figures mean nothing."""
        return replace(self.with_steps(20), checkpoints=4, held_out_particles=2, burn_in=4, gradient_draws=8)


@dataclass(frozen=True)
class Row:
    """One way to train. `stock` names an ELBO of the library itself; otherwise it is `EstimatorELBO`."""

    label: str
    estimators: Mapping[str, Any] = field(default_factory=dict)
    num_particles: int = 1
    stock: str | None = None


def ours(binary: Any, num_particles: int = 1) -> Row:
    """`binary` at both layers of binary latents, the pathwise estimator at the continuous one."""
    label = repr(binary) + (f", {num_particles} particles" if num_particles > 1 else "")
    return Row(label, {"top": binary, "low": binary, "style": Pathwise()}, num_particles)


def stock(name: str) -> Row:
    """The library's own ELBO of that name."""
    return Row(f"{name} (stock)", stock=name)


#: Every row's gradient variance is measured at the parameters that this row ends with.
REFERENCE = ours(DisARM())

OURS = (
    ours(Reinforce()),
    ours(Reinforce(MovingAverage())),
    ours(Reinforce(MovingAverage() + Learned())),
    ours(Reinforce(LeaveOneOut()), num_particles=2),
    REFERENCE,
    ours(RELAXWithModel()),
)

ROWS: Mapping[str, tuple[Row, ...]] = {
    "numpyro": (stock("TraceGraph_ELBO"), *OURS),
    "pyro": (stock("Trace_ELBO"), stock("TraceGraph_ELBO"), *OURS),
}


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


def run(backends: list[str], settings: Settings, watcher: Any) -> Experiment:
    """Every row of every backend; the results come in the order of the table. ``watcher`` is told how it goes
    (`display.Bars`)."""
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
                result.gradient_variance = _variance(trainer.gradients(reference), settings)
            watcher.finish(result)
            results[row.label] = result
        experiment.results += [results[row.label] for row in rows]
    return experiment


def _train(trainer, result: Result, digits: Digits, settings: Settings, watcher: Any) -> None:
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


def _variance(gradients: Any, settings: Settings) -> float:
    """Of the guide's parameters in total, in (nats per image)², the loss being the minibatch's mean."""
    chunks = [chunk for _, chunk in gradients.draws(settings.gradient_draws, settings.seed)]
    guide = [name for name in gradients.names if name.startswith("guide.")]
    parts = (np.concatenate([chunk[name] for chunk in chunks]).var(0, ddof=1, dtype=float).sum() for name in guide)
    return float(sum(parts)) / settings.batch_size**2
