"""The results file: everything that the table and the figure show, as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ppl_estimators.demo.experiment import REFERENCE, Experiment, Result, Settings

PACKAGES = ("ppl-estimators", "pyro-ppl", "torch", "numpyro", "jax", "jaxlib", "numpy")


def write(experiment: Experiment, path: Path) -> None:
    """Units are in the names; ELBOs are in nats per held-out image."""
    document = {
        "settings": asdict(experiment.settings),
        "variance_measured_at": REFERENCE.label,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "results": [_row(result) for result in experiment.results],
        "originals": _images(experiment.originals),
        "reconstructions": {backend: _images(images) for backend, images in experiment.reconstructions.items()},
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Experiment:
    """What `write` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Result)}
    rows = [{name: value for name, value in row.items() if name in names} for row in document["results"]]
    for row in rows:
        row["curve"] = [(point["step"], point["held_out_elbo"]) for point in row["curve"]]
    return Experiment(
        Settings(**document["settings"]),
        [Result(**row) for row in rows],
        _pixels(document["originals"]),
        {backend: _pixels(images) for backend, images in document["reconstructions"].items()},
    )


def _images(images: np.ndarray) -> list[str]:
    """Shares of ink to three digits, one line an image; JSON would give every pixel a line."""
    return [" ".join(f"{share:.3g}" for share in image) for image in images]


def _pixels(lines: list[str]) -> np.ndarray:
    return np.array([line.split() for line in lines], dtype=float)


def _row(result: Result) -> dict[str, object]:
    row = asdict(result)
    row["curve"] = [{"step": step, "held_out_elbo": elbo} for step, elbo in result.curve]
    row["held_out_elbo"] = result.held_out_elbo
    row["variance_times_seconds"] = result.variance_times_seconds
    return row


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
