"""Weak scaling: as many data for each device, on 1, 2, 4 and 8 of them.

NumPyro: the data of a 784-200-784 belief network are sharded over devices of the host, each with one thread; ours
beside the stock ELBO. Pyro: the same network under `DistributedDataParallel`, one process a device. A step of n
devices on c cores should take as long as one of one device while n ≤ c, and n / c times as long beyond.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _harness import Report, arguments

LATENTS, PIXELS, EACH = 200, 784, 500
DEVICES = (1, 2, 4, 8)
STEPS = 30
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds, the median."""
    for _ in range(3):
        step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def in_numpyro(devices: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from numpyro.infer import SVI, TraceGraph_ELBO

    from ppl_estimators import DisARM
    from ppl_estimators.numpyro import EstimatorELBO

    size = EACH * devices
    assert len(jax.devices()) == devices
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    x = jax.device_put(
        (np.random.default_rng(0).random((size, PIXELS)) < 0.3).astype("f"),
        NamedSharding(mesh, PartitionSpec("devices")),
    )

    def model(x: Any) -> None:
        v = numpyro.param("v", jnp.zeros((LATENTS, PIXELS)))
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Bernoulli(jnp.full(LATENTS, 0.5)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=z @ v).to_event(1), obs=x)

    def guide(x: Any) -> None:
        w = numpyro.param("w", jnp.zeros((PIXELS, LATENTS)))
        with numpyro.plate("data", size):
            numpyro.sample("z", dist.Bernoulli(logits=x @ w).to_event(1))

    found = {}
    for name, elbo in (("ours", EstimatorELBO({"z": DisARM()})), ("stock", TraceGraph_ELBO())):
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), elbo)
        state, update = svi.init(jax.random.key(0), x), jax.jit(svi.update)
        found[name] = timed(lambda update=update, state=state: jax.block_until_ready(update(state, x)))
    return found


def in_pyro(rank: int, devices: int, file: str) -> dict[str, float]:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO

    from ppl_estimators import DisARM
    from ppl_estimators.pyro import EstimatorELBO

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=devices)
    x = (torch.rand(EACH, PIXELS, generator=torch.Generator().manual_seed(rank)) < 0.3).float()

    class Program(torch.nn.Module):
        def __init__(self, elbo: Any):
            super().__init__()
            self.encode, self.decode = torch.nn.Linear(PIXELS, LATENTS), torch.nn.Linear(LATENTS, PIXELS)
            self.elbo = elbo

        def model(self, x: Any) -> None:
            with pyro.plate("data", EACH * devices, subsample=torch.arange(EACH)):
                z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(LATENTS)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

        def guide(self, x: Any) -> None:
            with pyro.plate("data", EACH * devices, subsample=torch.arange(EACH)):
                pyro.sample("z", dist.Bernoulli(logits=self.encode(x)).to_event(1))

        def forward(self, x: Any) -> Any:
            return self.elbo.differentiable_loss(self.model, self.guide, x)

    found = {}
    for name, elbo in (("ours", EstimatorELBO({"z": DisARM()})), ("stock", Trace_ELBO())):
        module = Program(elbo)
        spread = torch.nn.parallel.DistributedDataParallel(module)
        optim = torch.optim.Adam(module.parameters(), lr=1e-3)

        def step(spread: Any = spread, optim: Any = optim) -> None:
            optim.zero_grad()
            spread(x).backward()
            optim.step()

        found[name] = timed(step)
    torch.distributed.destroy_process_group()
    return found


def processes(count: int, *arguments: str, **environment: str) -> list[dict[str, float]]:
    commands = [
        [sys.executable, "-W", "ignore", __file__, *arguments[:1], str(i), *arguments[1:]] for i in range(count)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    started = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
    return [json.loads(p.communicate()[0].splitlines()[-1]) for p in started]


def main() -> None:
    arguments(__doc__)
    report = Report("weak_scaling", f"Weak scaling: {EACH} data a device, DisARM() at {LATENTS} bits")
    numpyro, pyro = {}, {}
    for n in DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n} {ONE_THREAD}"
        numpyro[n] = processes(1, "numpyro", str(n), XLA_FLAGS=flags)[0]
        with tempfile.TemporaryDirectory() as folder:
            found = processes(n, "pyro", str(n), os.path.join(folder, "meet"))
        pyro[n] = {name: max(f[name] for f in found) for name in found[0]}
    rows = []
    for n in DEVICES:
        row = [(found, name) for found in (numpyro, pyro) for name in ("ours", "stock")]
        rows.append((str(n), *(f"{f[n][name]:.1f} ({f[n][name] / f[1][name]:.2f})" for f, name in row)))
    columns = ("devices", "NumPyro, DisARM()", "TraceGraph_ELBO", "Pyro, DisARM()", "Trace_ELBO")
    report.table("Milliseconds a step, in brackets in steps of one device", columns, rows)
    report.remark(
        f"{os.cpu_count()} cores: of more devices some wait. Devices of JAX on one host share its threads; a process "
        "of Pyro has one, and does the optimiser's work for itself."
    )
    report.write()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["numpyro", _, n]:
            print(json.dumps(in_numpyro(int(n))))
        case ["pyro", rank, n, file]:
            print(json.dumps(in_pyro(int(rank), int(n), file)))
        case _:
            main()
