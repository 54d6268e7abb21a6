"""A step on several devices is the step on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def started(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(text.splitlines()[-1])


def test_numpyro_over_data_and_over_particles():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    found = answer(started("devices_numpyro.py", XLA_FLAGS=flags))
    assert found.pop("devices") == 8
    assert len(found) == 5
    assert max(found.values()) < 1e-6, found


@pytest.mark.slow
def test_pyro_in_two_processes(tmp_path):
    """Gradients are those of the whole batch; running averages agree where they are averaged after each step, networks
    and temperatures anyway; a checkpoint goes on in one process."""
    both = [answer(p) for p in [started("devices_pyro.py", str(i), str(tmp_path / "meet")) for i in (0, 1)]]
    for compile in (False, True):
        for found in both:
            whole = found[f"whole {compile}"]["gradient"]
            assert found[f"exact {compile}"]["gradient"] == pytest.approx(whole, rel=1e-5, abs=1e-5)
        states = [found[f"state {compile}"] for found in both]
        assert states[0] == states[1]
        assert states[0]["state"].keys() == {"z$state.mean", "z$state.started"}
        networks = [found[f"kept {compile}"] for found in both]
        assert networks[0]["kept"] == networks[1]["kept"]
        assert {"z$log_temperature", "z$control.w1"} <= networks[0]["kept"].keys()
        for found in networks:
            goes_on, alone = found["goes on"]
            assert goes_on == alone
