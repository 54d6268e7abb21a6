"""Flags of XLA that make the suite quick, where this XLA has them."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence

#: XLA's older emitters compile in half the time or less, and what they make runs as fast where arrays are small
QUICK_COMPILATION = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def known(flags: Iterable[str]) -> list[str]:
    """Those of ``flags`` that this XLA has: an unknown one aborts the process, so another one tries them."""

    def runs(several: Sequence[str]) -> bool:
        environment = {**os.environ, "XLA_FLAGS": " ".join(several)}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    flags = list(flags)
    return flags if runs(flags) else [flag for flag in flags if runs([flag])]


def compile_quickly() -> None:
    """In this process and those that it starts, which find it done. Read when JAX first runs something. Flags that
    stand there come last, so whoever sets XLA_FLAGS overrides this."""
    given = os.environ.get("XLA_FLAGS", "")
    if not any(flag in given for flag in QUICK_COMPILATION):
        os.environ["XLA_FLAGS"] = " ".join([*known(QUICK_COMPILATION), given])
