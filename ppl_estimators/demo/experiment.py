"""What is compared, and how long; trains every row in every backend and measures it. The result shows itself."""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import distributions
from pathlib import Path
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
from ppl_estimators.diagnostics.library import Advance
from ppl_estimators.diagnostics.show import CHOSEN, Showable, Shown, number

#: In the order of running: the first one's reference parameters serve the others too.
BACKENDS = {"numpyro": "NumPyro", "pyro": "Pyro"}
PACKAGES = ("ppl-estimators", "pyro-ppl", "torch", "numpyro", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `steps` by backend, because a step of NumPyro's is compiled and a step of Pyro's is not. The
    defaults take both libraries three to four minutes on two cores."""

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


@dataclass(repr=False)
class Experiment(Showable):
    """All of a run: `reconstructions` by backend and `originals` are shares of ink, `[10, PIXELS]`."""

    settings: Settings
    results: list[Result] = field(default_factory=list)
    originals: Any = ()
    reconstructions: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def by_backend(self) -> dict[str, list[Result]]:
        backends = dict.fromkeys(result.backend for result in self.results)
        return {backend: [r for r in self.results if r.backend == backend] for backend in backends}

    def tables(self) -> list[Shown]:
        (first, _), *_ = self.by_backend.items()
        caption = (
            f"Held-out ELBO in nats per image. Gradient variance: total over the guide's parameters, at the point that "
            f"{REFERENCE.label} reached in {BACKENDS[first]}, on one minibatch of {self.settings.batch_size}, over "
            f"{self.settings.gradient_draws} draws. Variance × time (a step's seconds): the noise that a fixed budget "
            f"of time leaves; the row with the least is marked {CHOSEN.strip()}."
        )
        headings = ("estimator", "held-out\nELBO", "gradient\nvariance", "ms per\nstep", "variance\n× time")
        shown = []
        for backend, rows in self.by_backend.items():
            best = min(rows, key=lambda row: row.variance_times_seconds)
            cells = tuple(
                (
                    CHOSEN * (row is best) + row.label, f"{row.held_out_elbo:.2f}", number(row.gradient_variance),
                    f"{row.milliseconds_per_step:.2f}", number(row.variance_times_seconds),
                )
                for row in rows
            )  # fmt: skip
            shown.append(Shown(f"{BACKENDS[backend]}, {rows[0].steps:,} steps", headings, cells))
        return [*shown[:-1], replace(shown[-1], caption=caption)]

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                **asdict(row),
                "curve": [{"step": step, "held_out_elbo": elbo} for step, elbo in row.curve],
                "held_out_elbo": row.held_out_elbo,
                "variance_times_seconds": row.variance_times_seconds,
            }
            for row in self.results
        ]

    def facts(self) -> dict[str, Any]:
        """Units are in the names; ELBOs are in nats per held-out image."""
        return {
            "settings": asdict(self.settings),
            "variance_measured_at": REFERENCE.label,
            "python": platform.python_version(),
            "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
            "results": self.records(),
            "originals": _lines(self.originals),
            "reconstructions": {backend: _lines(images) for backend, images in self.reconstructions.items()},
        }

    def plot(self) -> Any:
        """Learning curves, noise against cost, original and reconstructed digits, as a matplotlib figure."""
        from ppl_estimators.demo.figure import draw

        return draw(self)


def _lines(images: np.ndarray) -> list[str]:
    """Shares of ink to three digits, one line an image; JSON would give every pixel a line."""
    return [" ".join(f"{share:.3g}" for share in image) for image in images]


def _images(lines: Sequence[str]) -> np.ndarray:
    return np.array([line.split() for line in lines], dtype=float)


def read(path: Path) -> Experiment:
    """What `Experiment.to_json` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    results = [Result(**{f.name: row[f.name] for f in fields(Result)}) for row in document["results"]]
    for result, row in zip(results, document["results"], strict=True):
        result.curve = [(point["step"], point["held_out_elbo"]) for point in row["curve"]]
    reconstructions = {backend: _images(lines) for backend, lines in document["reconstructions"].items()}
    return Experiment(Settings(**document["settings"]), results, _images(document["originals"]), reconstructions)


def evaluations(backends: Sequence[str], settings: Settings) -> int:
    """How often `run` advances."""
    return sum(len(ROWS[b]) * (1 + min(settings.checkpoints, settings.steps[b])) for b in backends)


def run(backends: Sequence[str], settings: Settings, advance: Advance) -> Experiment:
    """Every row of every backend; the results come in the order of the table."""
    digits = load(settings.seed)
    initial = initial_parameters(digits.train, settings.seed)
    experiment = Experiment(settings, originals=digits.one_of_each() / digits.train.max())
    settling = np.arange(settings.burn_in * settings.batch_size) % len(digits.train)
    reference: dict[str, np.ndarray] | None = None
    for backend in backends:
        trainer_of = importlib.import_module(f"ppl_estimators.demo.{backend}_trainer").Trainer
        results = {}
        for row in sorted(ROWS[backend], key=lambda row: row != REFERENCE):  # the reference comes first
            result = results[row.label] = Result(backend, row.label, row.num_particles, settings.steps[backend])
            with warnings.catch_warnings():
                # Plain Reinforce() warns that it is a poor choice: here that is what it is shown for.
                warnings.simplefilter("ignore", EstimatorWarning)
                trainer = trainer_of(row, digits, initial, settings)
                _train(trainer, result, digits, settings, advance)
                if row == REFERENCE:
                    reference = reference or trainer.parameters()
                    experiment.reconstructions[backend] = trainer.reconstruct(digits.one_of_each())
                gradients = trainer.gradients(reference, settling.reshape(settings.burn_in, -1))
                result.gradient_variance = _variance(gradients, settings)
            advance(1, f"{BACKENDS[backend]}, {row.label}")
        experiment.results += [results[row.label] for row in ROWS[backend]]
    return experiment


def _train(trainer: Any, result: Result, digits: Digits, settings: Settings, advance: Advance) -> None:
    """On every minibatch; the first chunk's time includes the compilation."""
    minibatches = digits.minibatches(result.steps, settings.batch_size, settings.seed)
    seconds, done = [], 0
    for chunk in np.array_split(minibatches, min(settings.checkpoints, result.steps)):
        start = time.perf_counter()
        trainer.train(chunk)
        seconds.append((time.perf_counter() - start) / len(chunk))
        done += len(chunk)
        result.curve.append((done, trainer.held_out_elbo()))
        advance(1, f"{BACKENDS[result.backend]}, {result.label}")
    steady = statistics.median(seconds[1:] or seconds)
    result.milliseconds_per_step = 1e3 * steady
    result.compile_seconds = max(0.0, (seconds[0] - steady) * result.curve[0][0])


def _variance(gradients: Any, settings: Settings) -> float:
    """Of the guide's parameters in total, in (nats per image)², the loss being the minibatch's mean."""
    chunks = [chunk for _, chunk in gradients.draws(settings.gradient_draws, settings.seed)]
    guide = [name for name in gradients.names if name.startswith("guide.")]
    parts = (np.concatenate([chunk[name] for chunk in chunks]).var(0, ddof=1, dtype=float).sum() for name in guide)
    return float(sum(parts)) / settings.batch_size**2
