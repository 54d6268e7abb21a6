"""The lowest and the newest versions that `pyproject.toml` promises: an environment for each, and a small set of tests.

python .ci/versions.py [NAME ...]

Environments live in build/versions/NAME and are made once. Of torch the package index has one build for the CPU that is not
gigabytes large, so Pyro is tested with that one only, by the ordinary suite.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: name: (pythons, the first that is found is taken, and what is installed)
NUMPYRO = ("numpy", "scipy", "pytest", "optax", "flax", "equinox", "rich", "matplotlib")
ENVIRONMENTS = {
    "lowest": (("python3.11",), ("numpyro==0.22.0", "jax==0.10.0", "jaxlib==0.10.0", *NUMPYRO)),
    "newest": (("python3.13", "python3.12", "python3.11"), ("numpyro", "jax", *NUMPYRO)),
}
