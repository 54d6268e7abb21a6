"""``python -m programs [--cells 300] [--first 0]``: many random programs, a line each; failures shrunk and as code."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter

from xla import QUICK_COMPILATION, known

os.environ["XLA_FLAGS"] = " ".join([*known(QUICK_COMPILATION), os.environ.get("XLA_FLAGS", "")])

import jax

from .check import MAX_DRAWS, cell, shrunk, summed
from .description import code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m programs", description=__doc__)
    parser.add_argument("--cells", type=int, default=300, help="how many programs (300)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--draws", type=int, default=MAX_DRAWS, help=f"at most so many a cell ({MAX_DRAWS:,})")
    parser.add_argument("--shrink", type=float, default=120.0, help="seconds to spend on each failure (120)")
    jax.config.update("jax_disable_most_optimizations", True)
    parser.add_argument("--sums", type=int, default=40, help="how many with sums; as many draw nothing beside (40)")
    given = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    count: Counter[str] = Counter()
    began = time.monotonic()
    kinds = {
        "": (given.cells, lambda seed: cell(seed, given.draws)),
        "with sums, ": (given.sums, lambda seed: cell(seed, given.draws, sums=True)),
        "sums only, ": (given.sums, summed),
    }
    for kind, (cells, made) in kinds.items():
        for seed in range(given.first, given.first + cells):
            found = made(seed)
            count["estimators refused"] += len(found.refusals)
            failures = [v for v in found.verdicts.values() if v.failed]
            print(f"{kind}seed {seed}: " + "; ".join(map(str, found.verdicts.values())), flush=True)
            for v in found.verdicts.values():
                count["failed" if v.failed else v.kind] += 1
                if v.kind == "refused":
                    print(code(found.programs[v.library]), flush=True)
            for failure in failures:
                small, verdict = shrunk(found.programs[failure.library], failure, given.shrink)
                print(f"--- {kind}seed {seed}, shrunk. {verdict}\n{code(small)}\n---", flush=True)
            if seed % 20 == 19:
                jax.clear_caches()
    cells = given.cells + 2 * given.sums
    print(f"{cells} programs, each in both libraries, {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{n} {kind}" for kind, n in sorted(count.items())))  # fmt: skip
    return min(count["failed"], 1)


if __name__ == "__main__":
    raise SystemExit(main())
