"""Every example runs in both libraries, and leaves its figure and its numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LIGHTNING = "digits_lightning.py"
SCRIPTS = sorted({path.name for path in EXAMPLES.glob("[!_]*.py")} - {LIGHTNING})


def numbers(document: object) -> list[float]:
    """Every number in a document."""
    if isinstance(document, dict):
        return [x for value in document.values() for x in numbers(value)]
    if isinstance(document, list):
        return [x for value in document for x in numbers(value)]
    return [float(document)] if isinstance(document, (int, float)) else []


def test_there_are_examples() -> None:
    assert {"categorical_fit.py", "gaussian_square.py", "bernoulli_toy.py", "beta_bernoulli.py"} <= set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_run(script: str, backend: str, tmp_path: Path) -> None:
    out = tmp_path / "with a space"
    command = [sys.executable, str(EXAMPLES / script), "--backend", backend, "--smoke", "--out", str(out)]
    quick = {"OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # mostly compilation
    environment = {**os.environ, **quick, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=environment, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    assert "100%" in run.stdout  # the bar came to its end

    stem = f"{Path(script).stem}-{backend}"
    assert sorted(path.name for path in out.iterdir()) == [f"{stem}.json", f"{stem}.png"]
    figure = (out / f"{stem}.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 20_000
    found = numbers(json.loads((out / f"{stem}.json").read_text(encoding="utf-8")))
    assert len(found) > 10
    assert np.isfinite(found).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_says_what_it_shows(script: str) -> None:
    source = (EXAMPLES / script).read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert f"python examples/{script} --backend pyro" in source


@pytest.mark.slow
def test_a_lightning_module_on_two_processes_and_from_its_checkpoint_on_one(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / LIGHTNING), "--smoke", "--devices", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    bounds = [float(found) for line in lines for found in re.findall(r"-\d+\.\d\d", line)]
    assert len(bounds) == 3
    assert bounds[0] < bounds[1] < bounds[2]
    assert lines[-1].endswith("kept: z$state.mean, z$state.started")
