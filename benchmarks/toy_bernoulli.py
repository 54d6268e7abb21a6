"""One bit: min over θ of E[(b − t)²], b ~ Bernoulli(σ(θ)), under every estimator that takes a Bernoulli site.

The toy of REBAR (t = 0.45) and RELAX (t = 0.499), in NumPyro's own `SVI` with Adam at 0.01, θ = 0 at the start. Two
measurements: the gradient's variance and bias at a fixed θ, after steps in which only the estimator learned; and the
true expected loss along training. "Re-run" are figures of an independent, hand-written implementation of the same
set-up, 100 seeds too. Do not rank estimators by this toy: with one bit the exact gradient costs two evaluations.

    python benchmarks/toy_bernoulli.py
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report
from _study import (
    BERNOULLI,
    Contestant,
    Tally,
    keep,
    key,
    numbered,
    options,
    progress,
    scientific,
)
from numpyro import handlers
from numpyro.infer import SVI

from ppl_estimators import EstimatorWarning
from ppl_estimators.figures import BLUE, BROWN, GREEN, INK, OLIVE, ORANGE, PINK, SKY, VERMILLION, heading, panels
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

TARGETS = (0.45, 0.49, 0.499)
LEARNING_RATE = 0.01
P = 0.3  # where the variance is measured
EVERY = 100
FLOOR = 1e-12  # of variances in the figure: below it is rounding
#: target, steps: mean loss and its standard deviation over seeds, by name
RERUN = {
    (0.45, 300): {"exact": (0.21142, 0), "Reinforce()": (0.23878, 0.0036), "RLOO": (0.21735, 0.0009),
                  "DisARM()": (0.21384, 0.0006), "REBAR()": (0.23986, 0.0036), "RELAX": (0.22526, 0.0049)},
    (0.45, 3000): {"exact": (0.20268, 0), "Reinforce()": (0.20702, 0.0011), "RLOO": (0.20304, 0.0001),
                   "DisARM()": (0.20295, 0.0001), "REBAR()": (0.20714, 0.0011), "RELAX": (0.20322, 0.0002)},
    (0.49, 1000): {"exact": (0.24038, 0), "Reinforce()": (0.24836, 0.0016), "RLOO": (0.24073, 0.0001),
                   "DisARM()": (0.24060, 0.00004), "REBAR()": (0.24839, 0.0016), "RELAX": (0.24347, 0.0011)},
    (0.49, 10000): {"exact": (0.24010, 0), "Reinforce()": (0.24157, 0.0008), "RLOO": (0.24011, 0),
                    "DisARM()": (0.24011, 0), "REBAR()": (0.24158, 0.0008), "RELAX": (0.24020, 0.0001)},
    (0.499, 1000): {"exact": (0.249029, 0), "Reinforce()": (0.249987, 0.00017), "RLOO": (0.249064, 0.00001),
                    "DisARM()": (0.249051, 0.000004), "REBAR()": (0.249986, 0.00016), "RELAX": (0.249885, 0.00007)},
    (0.499, 10000): {"exact": (0.249001, 0), "Reinforce()": (0.249877, 0.0004), "RLOO": (0.249002, 0),
                     "DisARM()": (0.249002, 0), "REBAR()": (0.249877, 0.0004), "RELAX": (0.249091, 0.00004)},
}  # fmt: skip
RERUN_NAMES = {
    "Enumerate()": "exact",
    "Reinforce(LeaveOneOut()), 2 particles": "RLOO",
    "RELAX()": "RELAX",
    "RELAX(baseline=None)": "RELAX",
}
CURVES = {
    "Reinforce()": INK,
    "Reinforce(MovingAverage())": ORANGE,
    "Reinforce(OptimalConstant(PastSteps()))": OLIVE,
    "RELAX()": PINK,
    "REBAR()": VERMILLION,
    "Reinforce(LeaveOneOut()), 2 particles": SKY,
    "DisARM()": BLUE,
    "ARMS(3)": BROWN,
    "Enumerate()": GREEN,
}
#: what a smoke run measures
SMOKE = {
    "Reinforce()",
    "Reinforce(LeaveOneOut()), 2 particles",
    "ARM()",
    "DisARM()",
    "ARMS(3)",
    "Enumerate()",
    "RELAX()",
}


# ---- what is known exactly -------------------------------------------------------------------------------------------


def expected_loss(p: Any, t: float) -> Any:
    return p * (1 - t) ** 2 + (1 - p) * t**2


def exact_gradient(p: float, t: float) -> float:
    return p * (1 - p) * (1 - 2 * t)


def exact_variance(c: Contestant, p: float, t: float) -> float | None:
    """In θ; with q = 1 − p and Δ = f(1) − f(0)."""
    q, delta = 1 - p, 1 - 2 * t
    known: dict[str, Callable[[], float]] = {
        "Reinforce()": lambda: p * q * (q * (1 - t) ** 2 + p * t**2) ** 2,
        "Reinforce(LeaveOneOut()), 2 particles": lambda: p * q * delta**2 * (0.5 - p * q),
        "ARM()": lambda: delta**2 * 2 / 3 * (1 / 8 - (0.5 - min(p, q)) ** 3) - (p * q * delta) ** 2,
        "DisARM()": lambda: p * q * delta**2 * (0.5 * max(p, q) - p * q),
        "Enumerate()": lambda: 0.0,
    }
    return known[c.name]() if c.name in known else None


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """SVI with one estimator. The cost alone is the objective: under `mask(False)` densities cost nothing."""

    contestant: Contestant
    tally: Tally | None = None

    def __post_init__(self) -> None:
        self.elbo = EstimatorELBO(num_particles=self.contestant.particles)
        self.estimated_guide = with_estimators(self.guide, {"b": self.contestant.estimator})
        self.svi = SVI(self.model, self.estimated_guide, numpyro.optim.Adam(LEARNING_RATE), self.elbo)

    def model(self, t: Any, logit: Any = None) -> None:
        with handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
        if self.tally is not None:
            self.tally(b)
        numpyro.factor("cost", -((b - t) ** 2))

    def guide(self, t: Any, logit: Any = None) -> None:
        """With a ``logit`` θ is held there, and only what the estimator keeps is trained."""
        if logit is None:
            logit = numpyro.param("logit", jnp.zeros(()))
        with handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=logit))

    def gradient(self, key: Any, state: Any, t: Any, logit: Any) -> Any:
        kept = {**self.svi.get_params(state), **(state.mutable_state or {})}
        return jax.grad(lambda x: self.elbo.loss(key, kept, self.model, self.estimated_guide, t, x))(logit)


def evaluations(contestant: Contestant) -> float:
    """Runs of the model per step, counted."""
    tally = Tally()
    toy = Toy(contestant, tally)
    state = toy.svi.init(jax.random.key(0), 0.45, 0.0)
    step = jax.jit(lambda logit: toy.gradient(jax.random.key(0), state, 0.45, logit))
    return tally.per_call(lambda: step(0.0))


def estimates(contestant: Contestant, seeds: int, steps: int, n: int) -> np.ndarray:
    """Gradient estimates at p = P, ``[targets, seeds, n]``, after ``steps`` of the estimator's own learning."""
    toy = Toy(contestant)
    logit = jnp.asarray(math.log(P / (1 - P)))

    def one(key: Any, t: Any) -> Any:
        first, key = jax.random.split(key)
        state = toy.svi.init(first, t, logit)
        if state.mutable_state or any("$" in name for name in toy.svi.get_params(state)):  # it learns
            state = jax.lax.scan(lambda s, _: (toy.svi.update(s, t, logit)[0], None), state, length=steps)[0]
        return jax.vmap(lambda k: toy.gradient(k, state, t, logit))(jax.random.split(key, n))

    keys = jax.random.split(jax.random.key(1), (len(TARGETS), seeds))
    found = jax.jit(jax.vmap(jax.vmap(one, (0, None))))(keys, jnp.asarray(TARGETS))
    return np.asarray(found, dtype=float)


def train(contestant: Contestant, seeds: int, steps: int, report: Callable[[int], None]) -> np.ndarray:
    """θ after every EVERY steps, ``[1 + steps / EVERY, targets, seeds]``."""
    toy = Toy(contestant)
    targets = jnp.repeat(jnp.asarray(TARGETS), seeds)
    state = jax.jit(jax.vmap(toy.svi.init))(jax.random.split(jax.random.key(2), len(targets)), targets)

    @jax.jit
    @jax.vmap
    def several(state: Any, t: Any) -> Any:
        return jax.lax.scan(lambda s, _: (toy.svi.update(s, t)[0], None), state, length=EVERY)[0]

    logits = [np.zeros(len(targets))]
    for _ in range(steps // EVERY):
        state = several(state, targets)
        logits.append(np.asarray(toy.svi.get_params(state)["logit"], dtype=float))
        report(EVERY)
    return np.stack(logits).reshape(-1, len(TARGETS), seeds)


# ---- the study -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = options(__doc__, seeds=100, steps=10_000, draws=400)
    if args.smoke:
        args.seeds, args.steps, args.draws = 4, 200, 100
    contestants = [c for c in BERNOULLI if not args.smoke or c.name in SMOKE]
    warmup = min(1000, args.steps)
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function and biased ones are what we came to see
    cost, noise, paths = {}, {}, {}
    with progress(len(contestants) * (args.steps + warmup)) as bar:
        for c in contestants:
            bar(c.name)
            cost[c.name] = evaluations(c)
            noise[c.name] = estimates(c, args.seeds, warmup, args.draws)
            bar(warmup)
            paths[c.name] = train(c, args.seeds, args.steps, bar)

    report = Report("toy_bernoulli", "One bit: every estimator on min E[(b − t)²]")
    report.remark(
        f"b ~ Bernoulli(σ(θ)), NumPyro, float32, {args.seeds} seeds side by side, Adam {LEARNING_RATE} for θ and for "
        "whatever an estimator learns. Evaluations are counted while a compiled step runs, slopes and relaxed values "
        "included."
    )
    variance, rows = {}, []
    for c in contestants:
        g = noise[c.name]  # [targets, seeds, n]
        variance[c.name] = g.var(-1, ddof=1).mean(-1)
        row = [c.label, f"{cost[c.name]:g}"]
        for i, t in enumerate(TARGETS):
            exact = exact_variance(c, P, t)
            row += [scientific(variance[c.name][i]), "" if exact is None else scientific(exact)]
        mean, truth = g[-1].mean(), exact_gradient(P, TARGETS[-1])
        error = g[-1].mean(-1).std(ddof=1) / math.sqrt(args.seeds)
        row.append(f"{mean / truth:.3f} ± {error / truth:.3f}")
        rows.append(row)
    report.table(
        f"Variance of one gradient in θ at p = {P}, after {warmup:,} steps of the estimator's own learning",
        ["estimator", "evaluations", *(x for t in TARGETS for x in (f"t = {t}", "exact")), "mean / true, t = .499"],
        rows,
    )
    report.remark(
        f"{args.draws:,} draws per seed, variances averaged over seeds. The last column is 1 for an unbiased "
        "estimator, up to the noise that follows ± (one standard error). NVIL divides by a running deviation: its "
        "scale is not the gradient's."
    )

    ends = [(i, t, s) for i, t in enumerate(TARGETS) for s in sorted({k[1] for k in RERUN if k[0] == t})]
    ends = [e for e in ends if e[2] <= args.steps] or [(i, t, args.steps) for i, t in enumerate(TARGETS)]
    loss = {  # [1 + steps / EVERY, targets, seeds]
        name: np.stack([expected_loss(1 / (1 + np.exp(-x[:, i])), t) for i, t in enumerate(TARGETS)], 1)
        for name, x in paths.items()
    }

    def shown(name: str, i: int, steps: int) -> str:
        x = loss[name][steps // EVERY, i]
        return f"{x.mean():.6f} ± {x.std(ddof=1):.6f}"

    report.table(
        "True expected loss, mean ± standard deviation over seeds",
        ["estimator", *(f"t = {t}, {s:,} steps" for _, t, s in ends)],
        [
            ["at the start", *(f"{expected_loss(0.5, t):.6f}" for _, t, _ in ends)],
            ["optimum", *(f"{t**2:.6f}" for _, t, _ in ends)],
            *([c.label, *(shown(c.name, i, s) for i, t, s in ends)] for c in contestants),
        ],
    )
    compared = []
    for c in contestants:
        label = RERUN_NAMES.get(c.name, c.name)
        for i, t, s in ends:
            if label in (theirs := RERUN.get((t, s), {})):
                mean, sd = theirs[label]
                x = loss[c.name][s // EVERY, i]
                error = math.hypot(x.std(ddof=1), sd) / math.sqrt(args.seeds)
                apart = abs(x.mean() - mean)
                # what was printed is rounded: half a unit of its last digit is no difference
                apart = max(0.0, apart - (5e-6 if t < 0.499 else 5e-7))
                z = "0" if apart == 0 else f"{apart / error:.1f}" if error else "∞"
                compared.append([c.name, f"{t}", f"{s:,}", shown(c.name, i, s), f"{mean:g} ± {sd:g}", z])
    if compared:
        report.table(
            "Beside the re-run",
            ["estimator", "t", "steps", "ours", "re-run", "apart, standard errors"],
            compared,
        )
        report.remark(
            "The re-run's RELAX has a network and no baseline: `RELAX(baseline=None)` is nearest, with a network of "
            "another size that starts at 0."
        )
    report.write(args.results)
    last, t = len(TARGETS) - 1, TARGETS[-1]
    start, best = expected_loss(0.5, t), t**2
    shown = {
        "seeds": args.seeds,
        "evaluations": cost,
        "variance": {name: v[last] for name, v in variance.items()},
        # after EVERY, 2 EVERY, ... steps
        "still to come": {n: (x[1:, last].mean(-1) - best) / (start - best) for n, x in loss.items() if n in CURVES},
    }
    draw(keep(args, "toy_bernoulli", shown), args.figures / "toy_bernoulli.png")


def draw(shown: dict[str, Any], path: Path) -> None:
    figure, (left, right) = panels(2)
    cost, variance = shown["evaluations"], shown["variance"]
    unbiased = [c for c in BERNOULLI if c.name in variance and not c.biased]
    numbered(left, unbiased, [cost[c.name] for c in unbiased], [variance[c.name] for c in unbiased], floor=FLOOR)
    left.set(xlabel="model evaluations per step", ylabel="variance of one gradient in θ (cost²)")
    left.set_xticks([1, 2, 3, 4], ["1", "2", "3", "4"])
    left.minorticks_off()

    def least(evaluations: int) -> str:
        noise = {c.name: variance[c.name] for c in unbiased if cost[c.name] == evaluations}
        exact = [n for n, v in noise.items() if v < FLOOR]
        return f"{' and '.join(exact)} (exact)" if exact else min(noise, key=lambda n: noise[n])

    heading(left, f"p = {P}, t = {TARGETS[-1]}: least noise at one evaluation:\n{least(1)};\nat two: {least(2)}")

    ends = {}
    for name, colour in CURVES.items():
        if name in shown["still to come"]:
            share = shown["still to come"][name]
            ends[name] = share[-1]
            x = np.arange(1, 1 + len(share)) * EVERY * cost[name]
            right.plot(x, share, color=colour, linewidth=1.8, label=name)
    right.set(xscale="log", yscale="log", xlabel="model evaluations spent", ylabel="improvement still to come (share)")
    right.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower left")
    first = min(ends, key=lambda n: ends[n])
    heading(right, f"training at t = {TARGETS[-1]}, mean of {shown['seeds']} runs:\n{first} ends lowest")
    key(figure, unbiased)
    figure.savefig(path)


if __name__ == "__main__":
    main()
