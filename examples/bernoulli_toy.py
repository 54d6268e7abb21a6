"""The classic toy of discrete gradients, min over θ of E[(b − t)²] with b ~ Bernoulli(σ(θ)), under every estimator.

The optimum is b = 0, and the closer t comes to ½ the less the two costs differ, t² against (1 − t)²: at t = 0.499 the
gradient is 31 times smaller than the noise of plain score function. Curves show how much of the possible improvement
is still to come; below them is the variance of one gradient estimate in θ, at the parameters that training has
reached, with everything that the estimator has learned by then. With p = σ(θ), q = 1 − p, f the cost and
Δ = f(1) − f(0), some of these are known exactly:

    Reinforce()                  p q (q f(1) + p f(0))²
    LeaveOneOut(), two draws     p q Δ² (½ − p q)
    DisARM()                     p q Δ² (½ max(p, q) − p q)
    Enumerate()                  0

The best constant baseline is q f(1) + p f(0), not the mean cost p f(1) + q f(0): it makes a single draw exact.
`OptimalConstant` finds it from past steps. For REBAR the relaxed cost says nothing here: (b − t)² between 0 and 1 is
lower than at either end.

The cost alone is the objective: under `mask(False)` the densities of b cost nothing (the score is never masked), and
a factor adds −(b − t)².

    python examples/bernoulli_toy.py --backend pyro
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import (
    BLUE,
    GREEN,
    GREY,
    LIBRARIES,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    YELLOW,
    arguments,
    axes,
    heading,
    progress,
    save,
    table,
)

from ppl_estimators import (
    REBAR,
    RELAX,
    DisARM,
    Enumerate,
    EstimatorWarning,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Reinforce,
)

TARGETS = (0.45, 0.49, 0.499)
LEARNING_RATE = 0.01  # Adam


@dataclass(frozen=True)
class Method:
    label: str
    estimator: Any
    evaluations: int  # of the model, per step
    colour: str
    exact: Callable[[Any, float], Any] | None = None  # variance, given p and t

    @property
    def draws(self) -> int:
        return 2 if self.estimator == Reinforce(LeaveOneOut()) else 1


def _reinforce(p: Any, t: float) -> Any:
    return p * (1 - p) * ((1 - p) * (1 - t) ** 2 + p * t**2) ** 2


def _leave_one_out(p: Any, t: float) -> Any:
    return p * (1 - p) * (1 - 2 * t) ** 2 * (0.5 - p * (1 - p))


def _disarm(p: Any, t: float) -> Any:
    return p * (1 - p) * (1 - 2 * t) ** 2 * (0.5 * np.maximum(p, 1 - p) - p * (1 - p))


METHODS = [
    Method("Reinforce()", Reinforce(), 1, GREY, _reinforce),
    Method("Reinforce(MovingAverage())", Reinforce(MovingAverage()), 1, ORANGE),
    Method("Reinforce(OptimalConstant(PastSteps(0.99)))", Reinforce(OptimalConstant(PastSteps(0.99))), 1, YELLOW),
    Method("RELAX()", RELAX(), 1, PINK),
    Method("REBAR()", REBAR(), 3, RED),
    Method("Reinforce(LeaveOneOut())", Reinforce(LeaveOneOut()), 2, SKY, _leave_one_out),
    Method("DisARM()", DisARM(), 2, BLUE, _disarm),
    Method("Enumerate()", Enumerate(), 2, GREEN, lambda p, t: 0.0 * p),
]


@dataclass(frozen=True)
class Checkpoint:
    """After some steps, for each run: its θ, and independent gradient estimates there."""

    logits: np.ndarray  # [targets, seeds]
    estimates: np.ndarray  # [targets, seeds, n]


# ---- the program and its training, in both libraries ---------------------------------------------------------------


def train_in_numpyro(
    method: Method, seeds: int, steps: int, every: int, n: int, report: Callable[[int], None]
) -> Iterator[Checkpoint]:
    """All targets and seeds at once: the whole of SVI, its state included, under `vmap`."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.infer import SVI

    from ppl_estimators.numpyro import EstimatorELBO, with_estimators

    def model(t: Any) -> None:
        with handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.factor("cost", -((b - t) ** 2))

    def guide(t: Any) -> None:
        logit = numpyro.param("logit", jnp.zeros(()))
        with handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=logit))

    elbo = EstimatorELBO(num_particles=method.draws)
    guide = with_estimators(guide, {"b": method.estimator})  # declares what the estimator keeps
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), elbo)

    def estimate(key: Any, state: Any, t: Any) -> Any:
        kept = {**svi.get_params(state), **(state.mutable_state or {})}
        return jax.grad(lambda x: elbo.loss(key, {**kept, "logit": x}, model, guide, t))(kept["logit"])

    @jax.jit
    @jax.vmap
    def look(key: Any, state: Any, t: Any) -> Any:
        keys = jax.random.split(key, n)
        return svi.get_params(state)["logit"], jax.vmap(estimate, (0, None, None))(keys, state, t)

    @jax.jit
    @jax.vmap
    def several(state: Any, t: Any) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, t), state, length=every)[0]

    runs = len(TARGETS) * seeds
    targets = jnp.repeat(jnp.asarray(TARGETS), seeds)
    state = jax.vmap(svi.init)(jax.random.split(jax.random.key(0), runs), targets)
    for i in range(1 + steps // every):
        if i:
            state = several(state, targets)
            report(every * runs)
        logits, estimates = look(jax.random.split(jax.random.key(i), runs), state, targets)
        shape = (len(TARGETS), seeds)
        yield Checkpoint(np.reshape(logits, shape), np.reshape(estimates, (*shape, n)).astype(float))


def train_in_pyro(
    method: Method, seeds: int, steps: int, every: int, n: int, report: Callable[[int], None]
) -> Iterator[Checkpoint]:
    """One run after the other. Gradient estimates are taken in a plate of n independent copies of the site."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro import poutine
    from pyro.infer import SVI
    from pyro.optim import Adam

    from ppl_estimators.pyro import EstimatorELBO

    def model(t: float, logits: Any = None) -> None:
        with pyro.plate("copies", 1 if logits is None else len(logits)):
            with poutine.mask(mask=False):
                b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.factor("cost", -((b - t) ** 2))

    def guide(t: float, logits: Any = None) -> None:
        if logits is None:
            logits = pyro.param("logit", torch.zeros(1))
        with pyro.plate("copies", len(logits)), poutine.mask(mask=False):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    def new_elbo() -> Any:
        return EstimatorELBO({"b": method.estimator}, num_particles=method.draws)

    store = pyro.get_param_store()

    def look(t: float, elbo: Any) -> tuple[float, np.ndarray]:
        logit = pyro.param("logit", torch.zeros(1)).item()
        logits = torch.full((n,), logit, requires_grad=True)
        with store.scope(copy.deepcopy(store.get_state())):  # so that looking changes nothing
            elbo.loss_and_grads(model, guide, t, logits)
        return logit, logits.grad.double().numpy()

    found = []
    for t in TARGETS:
        for seed in range(seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            svi = SVI(model, guide, Adam({"lr": LEARNING_RATE}), new_elbo())
            observer = new_elbo()
            points = [look(t, observer)]
            for step in range(steps):
                svi.step(t)
                if (step + 1) % every == 0:
                    points.append(look(t, observer))
                    report(every)
            found.append(points)
    for i in range(1 + steps // every):
        shape = (len(TARGETS), seeds)
        logits = np.reshape([points[i][0] for points in found], shape)
        yield Checkpoint(logits, np.reshape([points[i][1] for points in found], (*shape, n)))


TRAIN = {"numpyro": train_in_numpyro, "pyro": train_in_pyro}


# ---- the comparison ------------------------------------------------------------------------------------------------


def expected_cost(p: Any, t: float) -> Any:
    return p * (1 - t) ** 2 + (1 - p) * t**2


def excess(logits: np.ndarray, t: float) -> np.ndarray:
    """How much of the improvement from θ = 0 to the optimum is still to come."""
    best = t**2
    return (expected_cost(1 / (1 + np.exp(-logits)), t) - best) / (expected_cost(0.5, t) - best)


def main() -> None:
    args = arguments(__file__, __doc__)
    seeds, steps, every, n = {
        ("numpyro", False): (24, 3000, 100, 400),
        ("pyro", False): (2, 1000, 50, 4000),
        ("numpyro", True): (3, 60, 30, 50),
        ("pyro", True): (1, 40, 20, 100),
    }[args.backend, args.smoke]
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function is what we came to see
    results: dict[str, list[Checkpoint]] = {}
    with progress(len(METHODS) * len(TARGETS) * seeds * steps) as report:
        for m in METHODS:
            report(m.label)
            results[m.label] = list(TRAIN[args.backend](m, seeds, steps, every, n, report))

    numbers: dict[str, Any] = {"targets": TARGETS, "seeds": seeds, "steps": steps, "every": every}
    for key in ("expected_cost", "excess", "variance", "exact_variance"):
        numbers[key] = {}
    for m in METHODS:
        points = results[m.label]
        logits = np.array([c.logits for c in points])  # [checkpoints, targets, seeds]
        p = 1 / (1 + np.exp(-logits))
        per_target = [(p[:, i], logits[:, i], t) for i, t in enumerate(TARGETS)]
        numbers["expected_cost"][m.label] = [expected_cost(p_t, t).mean(-1) for p_t, _, t in per_target]
        numbers["excess"][m.label] = [excess(x, t) for _, x, t in per_target]
        spread = np.array([np.median(c.estimates.var(-1, ddof=1), -1) for c in points])
        numbers["variance"][m.label] = spread.T  # [targets, checkpoints]
        if m.exact is not None:
            numbers["exact_variance"][m.label] = [np.median(m.exact(p_t, t), -1) for p_t, _, t in per_target]

    rows = []
    for m in METHODS:
        ends = [f"{x[-1].mean():.2f}" for x in numbers["excess"][m.label]]
        measured = numbers["variance"][m.label][1][-1]
        exact = f"{numbers['exact_variance'][m.label][1][-1]:.1e}" if m.exact is not None else ""
        rows.append([m.label, str(m.evaluations), *ends, f"{measured:.1e}", exact])
    table(
        f"Improvement still to come in {LIBRARIES[args.backend]}; {steps:,} steps, mean of {seeds} runs",
        ["\nestimator", "model\nevals", *(f"t =\n{t}" for t in TARGETS), f"variance,\nt = {TARGETS[1]}", "\nexact"],
        rows,
    )

    figure, panels = axes(len(TARGETS), rows=2)
    x = np.arange(1 + steps // every) * every
    for i, t in enumerate(TARGETS):
        top, bottom = panels[:, i]
        for m in METHODS:
            curve = numbers["excess"][m.label][i]
            middle, half = curve.mean(-1), curve.std(-1)
            top.fill_between(x, middle - half, middle + half, color=m.colour, alpha=0.12, linewidth=0)
            top.plot(x, middle, color=m.colour, linewidth=1.8, label=m.label)
            if m.exact is None:
                bottom.plot(x, _positive(numbers["variance"][m.label][i]), color=m.colour, linewidth=1.5)
            else:
                bottom.plot(x, _positive(numbers["exact_variance"][m.label][i]), color=m.colour, linewidth=1.5)
                bottom.plot(x, _positive(numbers["variance"][m.label][i]), "o", color=m.colour, markersize=3)
        top.set(xlabel="step", ylabel="improvement still to come (share)", ylim=(0, 1.1))
        heading(top, f"{LIBRARIES[args.backend]}: t = {t}")
        bottom.set(xlabel="step", ylabel="variance of one gradient estimate", yscale="log")
        heading(bottom, "gradient noise, median of the runs")
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[1, 0].text(
        0.98,
        0.01,
        "lines with dots: exact, measured. Enumerate(): exactly 0",
        transform=panels[1, 0].transAxes,
        ha="right",
        color=PALE,
        fontsize=8,
    )
    save(args, figure, numbers)


def _positive(x: Any) -> np.ndarray:
    """Zeros have no place on a logarithmic axis."""
    x = np.asarray(x, dtype=float)
    return np.where(x > 1e-16, x, np.nan)


if __name__ == "__main__":
    main()
