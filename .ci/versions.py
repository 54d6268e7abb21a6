"""A small set of tests by the lowest and by the newest versions of JAX and NumPyro that `pyproject.toml` allows.

python .ci/versions.py [lowest | newest ...]

"newest" is what the package index has for the newest Python that is here. Environments are made afresh in
build/versions. Only NumPyro: of torch the index has one build without gigabytes of CUDA, and `make test` runs that.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parent.parent
#: what the tests below need beside JAX and NumPyro
BESIDE = ("pytest", "scipy", "optax", "flax", "equinox", "funsor")
#: programs of every structure (scan, cond, while), use through SVI, posteriors, private names: what needs no Pyro
TESTS = (
    "tests/test_posteriors_numpyro.py",
    "tests/test_use_numpyro.py",
    "tests/test_wild_numpyro.py",
    "tests/test_specs.py::test_private_names_of_the_libraries_are_there[numpyro]",
)


def lowest() -> list[str]:
    """The requirements with the versions that they name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.sub(">=", "==", need) for need in project["optional-dependencies"]["numpyro"]]


def newest() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"]["numpyro"])


def python(names: tuple[str, ...]) -> str:
    """The first of them that starts, on the PATH or among those that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (p for name in names for p in (which(name), *map(str, kept.glob(f"*/bin/{name}"))) if p):
        if not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    raise SystemExit(f"versions: none of {', '.join(names)} is on the PATH")


ENVIRONMENTS = {
    "lowest": (lowest, ("python3.11",)),
    "newest": (newest, ("python3.14", "python3.13", "python3.12", "python3.11")),
}


def run(name: str) -> bool:
    requirements, pythons = ENVIRONMENTS[name]
    folder = ROOT / "build" / "versions" / name
    subprocess.run([python(pythons), "-m", "venv", "--clear", folder], check=True)
    own = folder / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "-q", *requirements(), *BESIDE], check=True)
    print(f"== {name}", flush=True)
    subprocess.run([own, "-c", SAY], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


SAY = """
import sys
from importlib.metadata import version
print("Python", sys.version.split()[0], *(f"{n} {version(n)}" for n in ("jax", "jaxlib", "numpyro", "numpy")), sep=", ")
"""

if __name__ == "__main__":
    results = {name: run(name) for name in sys.argv[1:] or ENVIRONMENTS}
    sys.exit(not all(results.values()))
