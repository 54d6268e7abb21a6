"""Does a test see a mistake? Applies each mutation of `mutations.md` to a copy of the package and runs its test.

    python tests/mutate.py [WORD ...]      only the mutations whose heading has one of the words

Prints a line for each: killed (the test fails), SURVIVED, or stale (its text is not in the file any more). The exit
status is the number of those that are not killed. Not part of the suite, which must pass for this to mean anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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


def passes(package: Path, test: tuple[str, ...]) -> bool:
    """Does the test pass with the package that lies in this folder?"""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    words = [str(TESTS / word) if word.endswith(".py") else word.strip('"') for word in test]
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += [*words, "-n", "0", "-p", "no:cacheprovider", "-x", "-q", "-m", "not slow"]
    run = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)
    assert run.returncode in (0, 1), f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}"
    return run.returncode == 0


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
