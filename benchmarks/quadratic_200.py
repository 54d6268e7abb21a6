"""Two hundred bits: max over θ of E[|b − t|² / D], b_i ~ Bernoulli(σ(θ_i)), D = 200, t = 0.499.

The toy of double control variates (Titsias & Shi, 2022), in float64 and NumPyro's own `SVI`: two draws a step, θ = 0 at
the start, RMSprop at 0.01 for θ and at 0.0005 for what an estimator learns, 2,000 steps. Variances are means over the
coordinates of θ. "Reference" are figures of an independent, hand-written implementation of the same set-up, except for
the objective after 2,000 steps and the late variances, read off the paper's plots.

    python benchmarks/quadratic_200.py
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _harness import Report
from _study import (
    BIASED,
    COUPLED,
    LOCAL,
    SCORE,
    SLOPES,
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

from ppl_estimators import (
    ARM,
    ARMS,
    REBAR,
    RELAX,
    UGC,
    BitFlip,
    Constant,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    EstimatorWarning,
    LeaveOneOut,
    MuProp,
    Reinforce,
    ReinMax,
    Stein,
    StochasticTriple,
    StraightThrough,
)
from ppl_estimators.figures import BLUE, GREEN, INK, OLIVE, ORANGE, PINK, SKY, VERMILLION, heading, panels
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

D, T = 200, 0.499
EVERY = 100
MEAN = 0.5 * (1 - T) ** 2 + 0.5 * T**2  # of the objective, at θ = 0
CONTESTANTS = (
    Contestant(Reinforce(), SCORE, particles=2),
    Contestant(Reinforce(Constant(MEAN)), SCORE, particles=2),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=2),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=3),
    Contestant(ARM(), COUPLED),
    Contestant(DisARM(), COUPLED),
    Contestant(ARMS(3), COUPLED),
    Contestant(UGC(), COUPLED),
    Contestant(BitFlip(), LOCAL),
    Contestant(StochasticTriple(), LOCAL),
    Contestant(Enumerate(), LOCAL),
    Contestant(MuProp(), SLOPES, particles=2, slope=True),
    Contestant(DoubleControlVariate(), SLOPES, particles=2, slope=True),
    Contestant(Stein(), SLOPES, particles=2, slope=True),
    Contestant(RELAX(), SLOPES, particles=2),
    Contestant(REBAR(), SLOPES, slope=True),
    Contestant(ReinMax(), BIASED, particles=2, slope=True),
    Contestant(StraightThrough(), BIASED, particles=2, slope=True),
)
NAMED = {c.name: c for c in CONTESTANTS}
RLOO, R_STAR, MUPROP = (f"{e!r}, 2 particles" for e in (Reinforce(LeaveOneOut()), Reinforce(Constant(MEAN)), MuProp()))
DCV, STEIN, PLAIN = (f"{e!r}, 2 particles" for e in (DoubleControlVariate(), Stein(), Reinforce()))
#: variance at θ = 0
REFERENCE = {PLAIN: 7.81e-3, MUPROP: 7.81e-3, RLOO: 1.249e-9, "DisARM()": 1.236e-9, R_STAR: 6.20e-10,
             "BitFlip()": 1.244e-9, "Enumerate()": 0.0, "ReinMax(), 2 particles": 7.81e-7}  # fmt: skip
#: objective and variance after 2,000 steps
PUBLISHED = {RLOO: (0.25053, 0.6e-9), "DisARM()": (0.25057, 0.6e-9), DCV: (0.2510, 0.0),
             PLAIN: (0.2500, None), MUPROP: (0.2500, None)}  # fmt: skip
TRAINED = dict(
    zip(
        (PLAIN, MUPROP, RLOO, "DisARM()", R_STAR, DCV, STEIN, "Enumerate()"),
        (INK, OLIVE, SKY, BLUE, ORANGE, VERMILLION, PINK, GREEN),
        strict=True,
    )
)
#: what a smoke run measures
SMOKE = {PLAIN, RLOO, "DisARM()", "BitFlip()", DCV, "Enumerate()"}


def rmsprop(learning_rate: float) -> Any:
    """Keras' RMSprop, which the paper used: g / (√v + 1e-7). With ε under the root it would hardly move here."""
    return optax.rmsprop(learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=False)


def roles(params: dict[str, Any]) -> dict[str, str]:
    return {n: "guide" if n == "logits" else "estimator" for n in params}


@dataclass
class Toy:
    """SVI with one estimator. The cost alone is the objective: under `mask(False)` densities cost nothing."""

    contestant: Contestant
    tally: Tally | None = None

    def __post_init__(self) -> None:
        self.elbo = EstimatorELBO(num_particles=self.contestant.particles)
        self.estimated_guide = with_estimators(self.guide, {"b": self.contestant.estimator})
        optimiser = optax.multi_transform({"guide": rmsprop(0.01), "estimator": rmsprop(5e-4)}, roles)
        self.svi = SVI(self.model, self.estimated_guide, numpyro.optim.optax_to_numpyro(optimiser), self.elbo)

    def model(self) -> None:
        with handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(0.5 * jnp.ones(D)).to_event(1))
        if self.tally is not None:
            self.tally(b)
        numpyro.factor("objective", jnp.mean((b - T) ** 2))

    def guide(self) -> None:
        logits = numpyro.param("logits", jnp.zeros(D))
        with handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    def gradients(self, key: Any, state: Any, n: int) -> Any:
        """Estimates of the objective's gradient, ``[n, D]``."""
        kept = {**self.svi.get_params(state), **(state.mutable_state or {})}

        def one(key: Any) -> Any:
            loss = lambda x: self.elbo.loss(key, {**kept, "logits": x}, self.model, self.estimated_guide)  # noqa: E731
            return -jax.grad(loss)(kept["logits"])

        return jax.vmap(one)(jax.random.split(key, n))


def at_the_start(contestant: Contestant, n: int) -> tuple[float, float, float, float]:
    """Evaluations per step; variance, its standard error, and mean over truth, at θ = 0."""
    tally = Tally()
    counted = Toy(contestant, tally)
    first = counted.svi.init(jax.random.key(0))
    step = jax.jit(lambda key: counted.gradients(key, first, 1))
    evaluations = tally.per_call(lambda: step(jax.random.key(1)))

    toy = Toy(contestant)
    first = toy.svi.init(jax.random.key(0))
    draw = jax.jit(lambda key: toy.gradients(key, first, n // 20))
    g = np.stack([draw(k) for k in jax.random.split(jax.random.key(2), 20)])  # [20, n / 20, D]
    mean = g.mean((0, 1))
    variances = ((g - mean) ** 2).mean((1, 2)) * n / (n - 1)
    truth = 0.25 * ((1 - T) ** 2 - T**2) / D
    return evaluations, variances.mean(), variances.std(ddof=1) / math.sqrt(20), mean.mean() / truth


def train(contestant: Contestant, seeds: int, steps: int, n: int, report: Any) -> tuple[np.ndarray, np.ndarray]:
    """The true objective and the variance after every EVERY steps, ``[1 + steps / EVERY, seeds]``."""
    toy = Toy(contestant)
    every = min(EVERY, steps)

    @jax.jit
    @jax.vmap
    def look(key: Any, state: Any) -> Any:
        p = jax.nn.sigmoid(toy.svi.get_params(state)["logits"])
        variance = toy.gradients(key, state, n).var(0, ddof=1).mean()
        return jnp.mean(p * (1 - T) ** 2 + (1 - p) * T**2), variance

    @jax.jit
    @jax.vmap
    def several(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (toy.svi.update(s)[0], None), state, length=every)[0]

    state = jax.jit(jax.vmap(toy.svi.init))(jax.random.split(jax.random.key(3), seeds))
    points = [look(jax.random.split(jax.random.key(4), seeds), state)]
    for i in range(steps // every):
        state = several(state)
        points.append(look(jax.random.split(jax.random.key(5 + i), seeds), state))
        report(every)
    objective, variance = zip(*points, strict=True)
    return np.asarray(objective), np.asarray(variance)


def main() -> None:
    args = options(__doc__, draws=20_000, seeds=3, steps=2000, looks=400)
    if args.smoke:
        args.draws, args.seeds, args.steps, args.looks = 400, 2, 40, 20
    contestants = [c for c in CONTESTANTS if not args.smoke or c.name in SMOKE]
    trained = [n for n in TRAINED if not args.smoke or n in SMOKE]
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function and biased ones are what we came to see
    start: dict[str, tuple[float, float, float, float]] = {}
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    each = args.steps // 4  # what a variance counts for on the bar
    with progress(each * len(contestants) + args.steps * len(trained)) as bar:
        for c in contestants:
            bar(f"variance: {c.name}")
            exact = c.name == "Enumerate()"
            start[c.name] = at_the_start(c, args.draws // 20 if exact else args.draws)
            bar(each)
        for name in trained:
            bar(f"training: {name}")
            curves[name] = train(NAMED[name], args.seeds, args.steps, 20 if name == "Enumerate()" else args.looks, bar)

    report = Report("quadratic_200", f"{D} bits: gradient variance and training on E[|b − {T}|² / {D}]")
    rows = []
    for c in contestants:
        evaluations, variance, error, ratio = start[c.name]
        known = REFERENCE.get(c.name)
        apart = "" if not known else f"{100 * (variance / known - 1):+.1f}%"
        shown = "0" if variance < 1e-25 else f"{scientific(variance, 3)} ± {error:.0e}"
        reference = "" if known is None else scientific(known, 3)
        rows.append([c.label, f"{evaluations:g}", shown, reference, apart, f"{ratio:.3g}"])
    report.table(
        "Variance of one gradient at θ = 0, mean over coordinates",
        ["estimator", "evaluations", "variance ± standard error", "reference", "apart", "mean / true"],
        rows,
    )
    report.remark(
        f"{args.draws:,} draws ({args.draws // 20:,} for Enumerate(), which has no noise here), nothing learned yet: "
        f"`DoubleControlVariate()` and `Stein()` start as leave-one-out. `Reinforce(Constant({MEAN:.6f}))` is the "
        "exact mean as baseline, R* in the paper there. Evaluations are counted while a compiled step runs, slopes and "
        "relaxed values included, and those that fill the last of the 13 chunks of 16 in which `Enumerate()` runs its "
        "200 other values; the true gradient of a component is "
        f'{scientific(0.25 * (1 - 2 * T) / D)}. In "mean / true" the mean is over draws and coordinates.'
    )
    rows = []
    for name in trained:
        objective, variance = curves[name]
        published = PUBLISHED.get(name, (None, None)) if args.steps == 2000 else (None, None)
        middle = len(objective) // 2
        rows.append(
            [
                name,
                f"{start[name][0]:g}",
                f"{objective[-1].mean():.5f} ± {objective[-1].std(ddof=1):.5f}",
                "" if published[0] is None else f"{published[0]:g}",
                *("0" if v < 1e-25 else scientific(v) for v in (variance[i].mean() for i in (0, middle, -1))),
                "" if published[1] is None else "→ 0" if published[1] == 0 else scientific(published[1], 1),
            ]
        )
    ends = [f"variance at {s:,}" for s in (0, args.steps // 2, args.steps)]
    report.table(
        f"Training: true objective after {args.steps:,} steps, mean ± standard deviation of {args.seeds} seeds",
        ["estimator", "evaluations", "objective", "published", *ends, "published"],
        rows,
    )
    report.remark(
        f"Optimum {(1 - T) ** 2:.6f}, start {MEAN:.6f}. Variances along each estimator's own run, {args.looks} draws "
        "per seed. Published: single runs, read off the paper's figures. "
        f"`Reinforce(Constant({MEAN:.6f}))` goes stale as θ moves; the paper's R* follows the exact mean, and ends at "
        "0.25071."
    )
    report.write(args.results)
    shown = {
        "steps": args.steps,
        "start": {name: numbers[:2] for name, numbers in start.items()},
        "objective": {name: objective.mean(-1) for name, (objective, _) in curves.items()},
        "variance": {name: variance.mean(-1) for name, (_, variance) in curves.items()},
    }
    draw(keep(args, "quadratic_200", shown), args.figures / "quadratic_200.png")


def draw(shown: dict[str, Any], path: Path) -> None:
    figure, (left, right, middle, aside) = panels(2, rows=2, height=4.2)
    cost, variance = ({name: numbers[i] for name, numbers in shown["start"].items()} for i in (0, 1))
    # without Enumerate(), which stands far to the right
    points = [c for c in CONTESTANTS if c.name in cost and not c.biased and c.name != "Enumerate()"]
    numbered(left, points, [cost[c.name] for c in points], [variance[c.name] for c in points])
    left.set(xlabel="model evaluations per step", ylabel="variance of one gradient at θ = 0 (objective²)")
    left.set_xticks([2, 3, 4], ["2", "3", "4"])
    left.minorticks_off()
    note = f"Enumerate(): no noise at {cost['Enumerate()']:g} evaluations"
    left.text(0.99, 0.5, note, transform=left.transAxes, ha="right", va="center", color=INK, size=8.5)
    two = min((c.name for c in points if cost[c.name] == 2), key=lambda name: variance[name])
    heading(left, f"{D} bits: least noise at two evaluations:\n{two}")
    for name, objective in shown["objective"].items():
        colour, noise = TRAINED[name], np.array(shown["variance"][name])
        steps = np.linspace(0, shown["steps"], len(objective))
        middle.plot(steps, np.where(noise > 1e-25, noise, np.nan), color=colour, linewidth=1.8, label=name)
        right.plot(steps, objective, color=colour, linewidth=1.8)
    middle.set(xlabel="step", ylabel="variance of one gradient (objective²)", yscale="log")
    heading(middle, "the same along training")
    right.axhline((1 - T) ** 2, color=INK, linewidth=1, linestyle=":", zorder=1)
    right.set(xlabel="step", ylabel="true objective (dotted: optimum)")
    ends = {name: objective[-1] for name, objective in shown["objective"].items() if name != "Enumerate()"}
    heading(right, f"training: beside the exact gradient wins\n{max(ends, key=lambda name: ends[name])}")
    aside.set_axis_off()
    aside.legend(*middle.get_legend_handles_labels(), loc="upper left", frameon=False, fontsize=8.5, labelcolor=INK)
    key(figure, points)
    figure.savefig(path)


if __name__ == "__main__":
    main()
