"""The studies of gradient noise run, leave a table and a figure, and find the orderings that must hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STUDIES = ("toy_bernoulli", "quadratic_200", "noisy_bars")
RLOO = "Reinforce(LeaveOneOut()), 2 particles"
NUMBER = re.compile(r"[-−+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def smoke(study: str, out: Path) -> str:
    """The results file of a smoke run; there is a figure beside it."""
    command = [sys.executable, str(BENCHMARKS / f"{study}.py"), "--smoke", "--out", str(out)]
    quick = {"OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # mostly compilation
    environment = {**os.environ, **quick, "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=out.parent, env=environment, timeout=900
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    figure = (out / f"{study}.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 20_000
    assert json.loads((out / f"{study}.json").read_text(encoding="utf-8")), "what docs/make_figures.py draws from"
    return (out / f"{study}.md").read_text(encoding="utf-8")


def table(document: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of the table under a title that starts like this, by row and column; of equal columns the first."""
    _, _, rest = document.partition(f"## {title}")
    assert rest, f"no table '{title}'"
    lines = [line for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(reversed(list(zip(header[1:], row[1:], strict=True)))) for row in rows}


def number(cell: str) -> float:
    return float(NUMBER.search(cell)[0].replace(",", "").replace("−", "-"))


def check_finite(document: str) -> None:
    assert not re.search(r"\b(nan|inf)\b", document, flags=re.IGNORECASE)
    found = [float(x.replace(",", "").replace("−", "-")) for x in NUMBER.findall(document)]
    assert len(found) > 30
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_one_bit(tmp_path: Path) -> None:
    document = smoke("toy_bernoulli", tmp_path / "with a space")
    check_finite(document)
    noise = table(document, "Variance of one gradient")
    variance = {name: number(row["t = 0.499"]) for name, row in noise.items()}
    assert variance["Enumerate()"] < 1e-15
    assert variance["ARMS(3)"] < variance["DisARM()"] < variance[RLOO] < 1e-3 * variance["Reinforce()"]
    for name in ("Reinforce()", RLOO, "ARM()", "DisARM()"):
        assert number(noise[name]["t = 0.45"]) == pytest.approx(number(noise[name]["exact"]), rel=0.5)
    assert {name: number(noise[name]["evaluations"]) for name in ("Reinforce()", RLOO, "DisARM()", "ARMS(3)")} == {
        "Reinforce()": 1, RLOO: 2, "DisARM()": 2, "ARMS(3)": 3,
    }  # fmt: skip
    loss = table(document, "True expected loss")
    assert number(loss["Enumerate()"]["t = 0.45, 200 steps"]) < number(loss["Reinforce()"]["t = 0.45, 200 steps"])


@pytest.mark.slow
def test_two_hundred_bits(tmp_path: Path) -> None:
    document = smoke("quadratic_200", tmp_path / "with a space")
    check_finite(document)
    start = table(document, "Variance of one gradient at θ = 0")
    variance = {name: number(row["variance ± standard error"]) for name, row in start.items()}
    assert variance["Enumerate()"] == 0
    assert number(start["Enumerate()"]["evaluations"]) == 1 + 13 * 16  # 200 other values, in chunks of one size
    assert variance["DisARM()"] < 1e-3 * variance["Reinforce(), 2 particles"]
    for name in (RLOO, "DisARM()", "Reinforce(), 2 particles", "BitFlip()"):
        assert variance[name] == pytest.approx(number(start[name]["reference"]), rel=0.2)
    assert variance["DoubleControlVariate(), 2 particles"] == pytest.approx(variance[RLOO], rel=0.2)
    assert len(table(document, "Training")) >= 4


@pytest.mark.slow
def test_noisy_bars(tmp_path: Path) -> None:
    document = smoke("noisy_bars", tmp_path / "with a space")
    check_finite(document)
    for title in ("Early", "Late"):
        rows = table(document, title)
        variance = {name: number(row["variance"]) for name, row in rows.items()}
        assert variance["Enumerate()"] < variance["DisARM()"] < variance["Reinforce(MovingAverage())"]
        assert variance[RLOO] < variance["Reinforce(MovingAverage())"]
        assert number(rows["Enumerate()"]["evaluations"]) == 33
        assert number(rows["ReinMax() (biased)"]["bias"]) >= 0


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_committed_results(study: str) -> None:
    document = (BENCHMARKS / "results" / f"{study}.md").read_text(encoding="utf-8")
    check_finite(document)
    assert f"python benchmarks/{study}.py" in document
    assert (BENCHMARKS.parent / "docs" / "figures" / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    assert f"`{study}.py`" in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
