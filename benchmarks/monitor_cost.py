"""What `GradientMonitor` adds to a step: the belief networks of the speed benchmarks, watched and not, side by side."""

from __future__ import annotations

import warnings

import jax
import numpyro_speed
import pyro
import pyro_speed
import torch
from _harness import Report, arguments, milliseconds, ratio, take_turns
from numpyro import infer, optim
from pyro.infer import SVI
from pyro.optim import Adam

from ppl_estimators import DisARM, EstimatorWarning, Reinforce
from ppl_estimators import numpyro as in_numpyro
from ppl_estimators import pyro as in_pyro
from ppl_estimators.diagnostics import GradientMonitor

ESTIMATORS = {"Reinforce()": Reinforce(), "DisARM()": DisARM()}
LOOP = numpyro_speed.LOOP


def main() -> None:
    options = arguments(__doc__, rounds=100, threads=1)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", EstimatorWarning)
    report, rows = Report("monitor_cost", "What GradientMonitor adds to a step"), []

    x = (jax.random.uniform(jax.random.key(2), (numpyro_speed.BATCH, numpyro_speed.PIXELS)) < 0.3).astype(float)
    for name, estimator in ESTIMATORS.items():
        svi = infer.SVI(
            numpyro_speed.model, numpyro_speed.guide, optim.Adam(1e-3), in_numpyro.EstimatorELBO({"z": estimator})
        )
        both = {"watched": GradientMonitor().watch(svi), "not": svi}
        loops = {
            n: numpyro_speed.looped(s.init(jax.random.key(1), x), lambda state, s=s: s.update(state, x))
            for n, s in both.items()
        }
        times = take_turns(f"NumPyro {name}", loops, options.rounds // 3, repeats=3)
        times = {n: [t / LOOP for t in ts] for n, ts in times.items()}
        rows.append(("NumPyro, compiled loop", name, *(milliseconds(times, n) for n in both), ratio(times, *both)[0]))

    network, images = pyro_speed.Network(), (torch.rand(pyro_speed.BATCH, pyro_speed.PIXELS) < 0.3).float()
    for name, estimator in ESTIMATORS.items():
        pyro.clear_param_store()
        svi = SVI(network.model, network.guide, Adam({"lr": 1e-5}), in_pyro.EstimatorELBO({"z": estimator}))
        both = {"watched": GradientMonitor().watch(svi), "not": svi}
        steps = {n: lambda s=s: s.step(images) for n, s in both.items()}
        times = take_turns(f"Pyro {name}", steps, options.rounds, repeats=3)
        rows.append(("Pyro", name, *(milliseconds(times, n) for n in both), ratio(times, *both)[0]))

    columns = ("library", "estimator", "watched, ms", "not, ms", "ratio (quartiles)")
    title = f"{pyro_speed.PIXELS}-{pyro_speed.HIDDEN}-{pyro_speed.PIXELS} sigmoid belief network, batch "
    report.table(title + str(pyro_speed.BATCH), columns, rows)
    report.write()


if __name__ == "__main__":
    main()
