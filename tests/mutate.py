"""Does a test see a mistake? Applies each mutation of `mutations.md` to a copy of the package and runs its test.

    python tests/mutate.py [WORD ...]      only the mutations whose heading has one of the words

Prints a line for each: killed (the test fails), SURVIVED, or stale (its text is not in the file any more). The exit
status is the number of those that are not killed. Not part of the suite, which must pass for this to mean anything.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
from xla import compile_quickly

TESTS = Path(__file__).resolve().parent
ROOT, PACKAGE, LIST = TESTS.parent, "ppl_estimators", TESTS / "mutations.md"


@dataclass(frozen=True)
class Mutation:
    """``before`` becomes ``after`` where it first stands in ``file``; ``test``: arguments of pytest."""

    title: str
    file: str
    before: str
    after: str
    test: tuple[str, ...]


def listed(text: str) -> list[Mutation]:
    """A heading with the file in backticks, a diff, and the test in backticks."""
    pattern = r"^### (`(\S+)`.*)\n\n```diff\n((?:.*\n)*?)```\n\n`(.+)`$"
    found = []
    for title, file, diff, test in re.findall(pattern, text, flags=re.MULTILINE):
        lines = diff.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+")
        found.append(Mutation(title, file, before, after, tuple(re.findall(r'"[^"]*"|\S+', test))))
    assert len(found) == text.count("\n### "), "a mutation does not read as one"
    return found


#: what every test imports: once here rather than for each mutation, which runs in a fork of this process
LIBRARIES = ("jax", "numpyro.contrib.control_flow", "numpyro.infer", "pyro.infer", "scipy.stats", "torch")


def passes(package: Path, test: tuple[str, ...]) -> bool:
    """Does the test pass with the package that lies in this folder?"""
    words = [str(TESTS / word) if word.endswith(".py") else word.strip('"') for word in test]
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *"-n 0 -p no:cacheprovider -x -q".split()]
    process = get_context("fork").Process(target=run, args=(package, [*options, *words, "-m", "not slow"]))
    process.start()
    process.join()
    printed = (package / "printed").read_text(encoding="utf-8")
    assert process.exitcode in (0, 1), f"pytest ended with {process.exitcode}:\n{printed}"
    return process.exitcode == 0


def run(package: Path, arguments: list[str]) -> NoReturn:
    """pytest, in a process of its own."""
    os.chdir(package)
    with open("printed", "wb", buffering=0) as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ["PYTHONPATH"] = sys.path[0] = str(package)
    sys.exit(int(pytest.main(arguments)))


def verdict(mutation: Mutation) -> str:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / PACKAGE, Path(folder) / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / PACKAGE / mutation.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if mutation.before not in text:
            return "stale"
        path.write_text(text.replace(mutation.before, mutation.after, 1), encoding="utf-8")
        return "SURVIVED" if passes(Path(folder), mutation.test) else "killed"


def main(words: list[str]) -> int:
    mutations = [m for m in listed(LIST.read_text(encoding="utf-8")) if not words or any(w in m.title for w in words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    compile_quickly()
    for library in LIBRARIES:
        import_module(library)
    assert PACKAGE not in sys.modules
    wrong = 0
    for mutation in mutations:
        start = time.perf_counter()
        found = verdict(mutation)
        wrong += found != "killed"
        print(f"{found:9} {time.perf_counter() - start:4.0f} s  {mutation.title}", flush=True)
    print(f"{len(mutations) - wrong} of {len(mutations)} killed")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
