"""Both libraries on whatever device they find, a GPU if there is one: a step of the belief network, 784-200-784, and in
Pyro one of a chain of 50 bits.

Each library is held against the same estimators written by hand on the same device, in one run. Times are by the clock,
until the device has answered; on two idle cores without a card it takes three minutes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import compiled_speed as in_torch
import jax
import numpyro
import numpyro_speed as in_jax
import pyro
import torch
from _harness import Report, Times, arguments, milliseconds, ratio, take_turns, verdict
from kernels import PARTICLES, leave_one_out

from ppl_estimators import DisARM, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.pyro import EstimatorELBO as PyroELBO

CARD = torch.cuda.is_available()


def pyro_steps(batch: int) -> dict[str, Callable[[], object]]:
    x = (torch.rand(batch, in_torch.PIXELS) < 0.3).float()
    steps = {"Trace_ELBO": in_torch.network(pyro.infer.Trace_ELBO(), "stock", x)}
    for estimator, hand in ((Reinforce(), in_torch.reinforce), (DisARM(), in_torch.disarm)):
        name = type(estimator).__name__
        steps[f"{name}() by hand"] = in_torch.by_hand(hand, x)
        steps[f"{name}()"] = in_torch.network(PyroELBO(estimator), f"{name} eager", x)
        steps[f"{name}(), compiled"] = in_torch.network(PyroELBO(estimator, compile=True), f"{name} compiled", x)
    return steps


def chain_steps() -> dict[str, Callable[[], object]]:
    y = torch.randn(in_torch.SITES)
    losses = {
        "Trace_ELBO": pyro.infer.Trace_ELBO(),
        "Reinforce()": PyroELBO(default=Reinforce()),
        "Reinforce(), compiled": PyroELBO(default=Reinforce(), compile=True),
    }
    return {n: in_torch.svi(in_torch.chain_model, in_torch.chain_guide, loss, y) for n, loss in losses.items()}


def numpyro_steps(batch: int) -> dict[str, Callable[[], object]]:
    """Each a compiled loop of `in_jax.LOOP` updates."""
    x = (jax.random.uniform(jax.random.key(2), (batch, in_jax.PIXELS)) < 0.3).astype(float)
    losses: dict[str, Any] = {
        "Reinforce()": (NumPyroELBO(Reinforce()), in_jax.reinforce),
        "DisARM()": (NumPyroELBO(DisARM()), in_jax.disarm),
        "leave-one-out": (NumPyroELBO(Reinforce(LeaveOneOut()), num_particles=PARTICLES), leave_one_out),
    }
    steps = {}
    for name, (loss, hand) in losses.items():
        steps[name] = in_jax.looped(*in_jax.by_svi(loss, x))
        steps[f"{name} by hand"] = in_jax.looped(*in_jax.by_hand(hand, x))
    for loss in (numpyro.infer.TraceGraph_ELBO(), numpyro.infer.Trace_ELBO()):
        steps[type(loss).__name__] = in_jax.looped(*in_jax.by_svi(loss, x))
    return steps


def rows(times: Times, loop: int, targets: Mapping[str, float], other: str = "") -> list[tuple[str, ...]]:
    """Of each contestant its time a step and, of ours, the ratio to ``other``, or to the same by hand."""
    found: list[tuple[str, ...]] = []
    for name in times:
        theirs = other or f"{name.partition(',')[0]} by hand"
        text, value = ratio(times, name, theirs) if theirs in times and name != other else ("", 0.0)
        target = verdict(value, targets[name]) if name in targets else ""
        found.append((name, f"{1e3 * float(milliseconds(times, name)) / loop:.0f}", text, target))
    return found


def main() -> None:
    options = arguments(__doc__, rounds=20)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = torch.cuda.get_device_name() if CARD else "cpu", jax.devices()[0].device_kind
    report = Report("on_device", f"Steps on a device: Pyro on {names[0]}, NumPyro on {names[1]}")
    columns = ("contestant", "µs a step", "against by hand (quartiles)", "target")
    for batch, rounds, bar in ((50, options.rounds, 0.0), (2000, max(2, options.rounds // 4), 1.05)):
        pyro.clear_param_store()
        with torch.device("cuda" if CARD else "cpu"):
            steps = pyro_steps(batch)
        times = take_turns("Pyro", steps, rounds, warmup=15)  # after these steps the notes run
        compiled = {n: 1.0 for n in times if CARD and n.endswith("compiled")}
        report.table(f"Pyro on {names[0]}, batch {batch}", columns, rows(times, 1, compiled))
        times = take_turns("NumPyro", numpyro_steps(batch), rounds)
        ours = {n: bar for n in times if bar and f"{n} by hand" in times}
        report.table(f"NumPyro on {names[1]}, batch {batch}", columns, rows(times, in_jax.LOOP, ours))
    pyro.clear_param_store()
    with torch.device("cuda" if CARD else "cpu"):
        steps = chain_steps()
    times = take_turns("chain", steps, options.rounds, warmup=15)
    heads = (*columns[:2], "against Trace_ELBO (quartiles)", columns[3])
    report.table(f"Pyro on {names[0]}, chain of {in_torch.SITES} bits", heads, rows(times, 1, {}, "Trace_ELBO"))
    report.write()


if __name__ == "__main__":
    main()
