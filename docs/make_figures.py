"""Draws the figures of the docs again, from the numbers in `benchmarks/results`: nothing is measured.

    python docs/make_figures.py [FOLDER]

The studies draw their own figure when they run; this is for a change of style.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from ppl_estimators.demo.experiment import read

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
STUDIES = ("toy_bernoulli", "quadratic_200", "noisy_bars", "growth")


def main(folder: Path = DOCS / "figures") -> None:
    sys.path.insert(0, str(BENCHMARKS))
    for study in STUDIES:
        shown = json.loads((BENCHMARKS / "results" / f"{study}.json").read_text(encoding="utf-8"))
        importlib.import_module(study).draw(shown, folder / f"{study}.png")
    read(BENCHMARKS / "results" / "demo.json").plot().savefig(folder / "demo.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
