"""The results file: everything that the table and the figure show, as JSON."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ppl_estimators.demo.experiment import Experiment, Result
from ppl_estimators.demo.rows import REFERENCE

PACKAGES = ("ppl-estimators", "pyro-ppl", "torch", "numpyro", "jax", "jaxlib", "numpy")


def write(experiment: Experiment, path: Path) -> None:
    """Units are in the names; ELBOs are in nats per held-out image."""
    document = {
        "settings": asdict(experiment.settings),
        "variance_measured_at": REFERENCE.label,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "results": [_row(result) for result in experiment.results],
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
