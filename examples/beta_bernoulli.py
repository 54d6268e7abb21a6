"""Is the coin fair? Steps that a score-function guide needs, with and without a baseline.

The last example of Pyro's third tutorial on stochastic variational inference: a Beta(10, 10) prior on the fairness of
a coin, ten tosses with six heads, a Beta guide that starts at Beta(15, 15). The posterior is Beta(16, 14). The guide
is trained by score function (the Beta is reparameterisable, but a guide that is not would do as well) until both
parameters are within 0.8 of the posterior's. The tutorial compares no baseline with a decaying average of past costs;
here are more, and many runs of each.

In Pyro the moving average is chosen as in the tutorial, by the site's ``infer={"baseline": {...}}`` dictionary.

    python examples/beta_bernoulli.py --backend pyro
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import (
    BLUE,
    GREEN,
    LIBRARIES,
    ORANGE,
    PALE,
    RED,
    arguments,
    axes,
    heading,
    progress,
    save,
    table,
)

from ppl_estimators import EstimatorWarning, LeaveOneOut, MovingAverage, Pathwise, Reinforce

PRIOR = (10.0, 10.0)
TOSSES = np.array([1.0] * 6 + [0.0] * 4)
START = (15.0, 15.0)
POSTERIOR = (PRIOR[0] + TOSSES.sum(), PRIOR[1] + (1 - TOSSES).sum())
TOLERANCE = 0.8
ADAM = {"lr": 0.0005, "betas": (0.93, 0.999)}


@dataclass(frozen=True)
class Method:
    label: str
    estimator: Any
    colour: str
    draws: int = 1
    baseline: dict[str, Any] | None = None  # Pyro's dictionary that says the same


METHODS = [
    Method("no baseline", Reinforce(), RED),
    Method(
        "moving average",
        Reinforce(MovingAverage(0.9)),
        ORANGE,
        baseline={"use_decaying_avg_baseline": True, "baseline_beta": 0.9},
    ),
    Method("leave-one-out, 2 draws", Reinforce(LeaveOneOut()), GREEN, draws=2),
    Method("pathwise", Pathwise(), BLUE),
]


# ---- the program and its training, in both libraries: parameters after each step, [runs, steps, 2] -----------------


def train_in_numpyro(method: Method, runs: int, steps: int, report: Callable[[int], None]) -> np.ndarray:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints
    from numpyro.infer import SVI

    from ppl_estimators.numpyro import EstimatorELBO, with_estimators

    tosses = jnp.asarray(TOSSES, dtype=float)

    def model() -> None:
        fairness = numpyro.sample("fairness", dist.Beta(*PRIOR))
        with numpyro.plate("tosses", len(tosses)):
            numpyro.sample("heads", dist.Bernoulli(fairness), obs=tosses)

    def guide() -> None:
        alpha = numpyro.param("alpha", START[0], constraint=constraints.positive)
        beta = numpyro.param("beta", START[1], constraint=constraints.positive)
        numpyro.sample("fairness", dist.Beta(alpha, beta))

    guide = with_estimators(guide, {"fairness": method.estimator})
    optimizer = numpyro.optim.Adam(ADAM["lr"], *ADAM["betas"])
    svi = SVI(model, guide, optimizer, EstimatorELBO(num_particles=method.draws))
    every = min(500, steps)

    def step(state: Any, _: Any) -> tuple[Any, Any]:
        state, _ = svi.update(state)
        found = svi.get_params(state)
        return state, jnp.stack([found["alpha"], found["beta"]])

    several = jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, length=every)))
    state = jax.vmap(lambda key: svi.init(key))(jax.random.split(jax.random.key(0), runs))
    paths = []
    for _ in range(steps // every):
        state, path = several(state)
        paths.append(np.asarray(path))
        report(every * runs)
    return np.concatenate(paths, axis=1)


def train_in_pyro(method: Method, runs: int, steps: int, report: Callable[[int], None]) -> np.ndarray:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam
    from torch.distributions import constraints

    from ppl_estimators.pyro import EstimatorELBO

    tosses = torch.as_tensor(TOSSES, dtype=torch.float)
    infer = {"baseline": method.baseline} if method.baseline else {"estimator": method.estimator}

    def model() -> None:
        fairness = pyro.sample("fairness", dist.Beta(*PRIOR))
        with pyro.plate("tosses", len(tosses)):
            pyro.sample("heads", dist.Bernoulli(fairness), obs=tosses)

    def guide() -> None:
        alpha = pyro.param("alpha", torch.tensor(START[0]), constraint=constraints.positive)
        beta = pyro.param("beta", torch.tensor(START[1]), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(alpha, beta), infer=infer)

    paths = np.empty((runs, steps, 2))
    for run in range(runs):
        pyro.clear_param_store()
        pyro.set_rng_seed(run)
        svi = SVI(model, guide, Adam(ADAM), EstimatorELBO(num_particles=method.draws))
        for step in range(steps):
            svi.step()
            paths[run, step] = pyro.param("alpha").item(), pyro.param("beta").item()
            report(1)
    return paths


TRAIN = {"numpyro": train_in_numpyro, "pyro": train_in_pyro}


# ---- the comparison ------------------------------------------------------------------------------------------------


def error(paths: np.ndarray) -> np.ndarray:
    """The greater distance of the two parameters from the posterior's, for parameters ``[..., 2]``."""
    return np.abs(paths - np.array(POSTERIOR)).max(-1)


def steps_needed(paths: np.ndarray) -> np.ndarray:
    """The first step after which a run is close, ``[runs]``; NaN for a run that never is."""
    close = error(paths) < TOLERANCE
    return np.where(close.any(-1), 1.0 + close.argmax(-1), np.nan)


def main() -> None:
    args = arguments(__file__, __doc__)
    runs, steps = {
        ("numpyro", False): (40, 3000),
        ("pyro", False): (5, 1500),
        ("numpyro", True): (4, 200),
        ("pyro", True): (1, 100),
    }[args.backend, args.smoke]
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function is what we came to see
    paths = {}
    with progress(len(METHODS) * runs * steps) as report:
        for m in METHODS:
            report(m.label)
            paths[m.label] = TRAIN[args.backend](m, runs, steps, report)
    needed = {label: steps_needed(path) for label, path in paths.items()}

    def quantile(x: np.ndarray, level: float) -> str:
        """Of the runs' steps; a run that never came close counts as infinitely long."""
        value = np.quantile(np.where(np.isnan(x), np.inf, x), level, method="nearest")
        return f"{value:,.0f}" if np.isfinite(value) else f"> {steps:,}"

    table(
        f"Steps until α and β are within {TOLERANCE} of the posterior's: {LIBRARIES[args.backend]}, {runs} runs",
        ["estimator", "median", "10%", "90%", "runs that arrived"],
        [
            [
                m.label,
                *(quantile(needed[m.label], level) for level in (0.5, 0.1, 0.9)),
                f"{np.isfinite(needed[m.label]).sum()} of {runs}",
            ]
            for m in METHODS
        ],
    )

    figure, ((left, right),) = axes(2)
    x = np.arange(1, steps + 1)
    for row, m in enumerate(METHODS):
        low, middle, high = np.quantile(error(paths[m.label]), [0.1, 0.5, 0.9], axis=0)
        left.fill_between(x, low, high, color=m.colour, alpha=0.15, linewidth=0)
        left.plot(x, middle, color=m.colour, linewidth=1.8, label=m.label)
        spread = row + np.linspace(-0.2, 0.2, runs)
        right.plot(needed[m.label], spread, "o", color=m.colour, markersize=4)
        if np.isfinite(needed[m.label]).any():
            right.plot([np.nanmedian(needed[m.label])] * 2, [row - 0.35, row + 0.35], color=m.colour, linewidth=2)
    left.axhline(TOLERANCE, color=PALE, linewidth=1, linestyle="--")
    left.text(steps, TOLERANCE, "tolerance ", color=PALE, fontsize=8, ha="right", va="bottom")
    left.set(xlabel="step", ylabel="greater error of α and β", xlim=(0, steps), ylim=(0, None))
    left.legend(frameon=False, fontsize=8.5)
    heading(left, f"{LIBRARIES[args.backend]}: median and 10–90% of {runs} runs")
    right.set(xlabel="steps (dots: runs; bar: median)", xlim=(0, None))
    right.set_yticks(range(len(METHODS)), [m.label for m in METHODS])
    right.invert_yaxis()
    right.grid(False)
    heading(right, "steps until both are within the tolerance")
    numbers = {"posterior": POSTERIOR, "tolerance": TOLERANCE, "runs": runs, "steps": steps, "steps_needed": needed}
    numbers["median_error_every_10_steps"] = {k: np.median(error(path), 0)[::10] for k, path in paths.items()}
    save(args, figure, numbers)


if __name__ == "__main__":
    main()
