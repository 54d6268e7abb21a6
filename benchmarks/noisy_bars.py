"""Noisy bars: what an estimator's noise costs in time, early and late in the training of a small VAE.

Images of 8 x 8 pixels: each of the 16 rows and columns is drawn with probability 1/8, then 2% of all pixels flip. A
VAE with 32 Bernoulli latents and one hidden layer of 64 tanh units on either side, Adam at 0.001, batches of 50,
NumPyro. One run, leave-one-out with four particles, is stopped early and late; there every estimator is measured
on one fixed batch: the variance of the batch-mean ELBO's gradient, summed over the encoder's parameters. Whatever an
estimator learns was trained there for some steps first, with the VAE held. Times are of full updates, by turns.

The "reference" is an independent implementation of a benchmark of the same description whose data and scale of the
gradient are not known in detail: compare ratios to leave-one-out with two particles, not numbers.

    python benchmarks/noisy_bars.py
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report, take_turns
from _study import (
    BIASED,
    COLOURS,
    COUPLED,
    FAMILIES,
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
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpyro.infer import SVI
from numpyro.optim import Adam

from ppl_estimators import (
    ARMS,
    REBAR,
    RELAX,
    UGC,
    BitFlip,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    EstimatorWarning,
    GumbelSoftmax,
    Learned,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    Reinforce,
    ReinMax,
    Stein,
    StochasticTriple,
    StraightThrough,
)
from ppl_estimators.figures import FAINT, INK, heading, panels
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

SIDE, LATENTS, HIDDEN, IMAGES, BATCH = 8, 32, 64, 4000, 50
PIXELS = SIDE * SIDE
CHUNK = 25  # gradients side by side
CONTESTANTS = (
    Contestant(Reinforce(MovingAverage()), SCORE),
    Contestant(Reinforce(MovingAverage() + Learned()), SCORE),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=2),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=3),
    Contestant(Reinforce(LeaveOneOut()), SCORE, particles=4),
    Contestant(DisARM(), COUPLED),
    Contestant(ARMS(3), COUPLED),
    Contestant(ARMS(4), COUPLED),
    Contestant(UGC(), COUPLED),
    Contestant(BitFlip(3), LOCAL),
    Contestant(StochasticTriple(), LOCAL),
    Contestant(Enumerate(), LOCAL),
    Contestant(MuProp(), SLOPES, slope=True),
    Contestant(DoubleControlVariate(), SLOPES, particles=2, slope=True),
    Contestant(Stein(), SLOPES, particles=2, slope=True),
    Contestant(RELAX(), SLOPES),
    Contestant(REBAR(), SLOPES, slope=True),
    Contestant(ReinMax(), BIASED, slope=True),
    Contestant(ReinMax(), BIASED, particles=2, slope=True),
    Contestant(StraightThrough(), BIASED, slope=True),
    Contestant(GumbelSoftmax(0.5), BIASED, slope=True),
)
ENUMERATE, RLOO = "Enumerate()", "Reinforce(LeaveOneOut()), 2 particles"
#: variance early and late
REFERENCE = {
    "Reinforce(MovingAverage())": (298, 127),
    RLOO: (40.9, 7.22),
    "Reinforce(LeaveOneOut()), 3 particles": (20.8, 3.84),
    "Reinforce(LeaveOneOut()), 4 particles": (13.9, 2.66),
    "DisARM()": (29.5, 6.21),
    "ARMS(3)": (16.7, 3.58),
    "ARMS(4)": (11.6, 2.49),
    "BitFlip(3)": (30.2, 3.19),
    ENUMERATE: (2.23, 0.131),
    "MuProp()": (292, None),
    "DoubleControlVariate(), 2 particles": (39.2, 8.27),
    "REBAR()": (38.0, 5.91),
    "ReinMax()": (7.5, 3.2),
    "ReinMax(), 2 particles": (3.7, 1.7),
    "StraightThrough()": (4.1, 0.64),
    "GumbelSoftmax()": (4.1, 1.4),
}
Array = Any
Params = dict[str, Any]


def bars(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noisy images ``[n, PIXELS]`` of zeros and ones."""
    rows, columns = rng.random((2, n, SIDE)) < 1 / 8
    clean = rows[:, :, None] | columns[:, None, :]
    return (clean ^ (rng.random((n, SIDE, SIDE)) < 0.02)).reshape(n, PIXELS).astype(np.float32)


def weights() -> Params:
    k = jax.random.split(jax.random.key(0), 4)
    shapes = {
        "e1": (PIXELS, HIDDEN),
        "e2": (HIDDEN, LATENTS),
        "d1": (LATENTS, HIDDEN),
        "d2": (HIDDEN, PIXELS),
    }
    p = {n: jax.random.normal(key, s) / math.sqrt(s[0]) for key, (n, s) in zip(k, shapes.items(), strict=True)}
    p |= {f"{n} bias": jnp.zeros(s[1]) for n, s in shapes.items()}
    return {**p, "prior": jnp.zeros(LATENTS)}


@dataclass
class Vae:
    """SVI with one estimator. Given ``p`` the network is held, and only what the estimator keeps is trained."""

    contestant: Contestant
    images: Any
    tally: Tally | None = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        self.elbo = EstimatorELBO(num_particles=self.contestant.particles)
        self.estimated_guide = with_estimators(self.guide, {"z": self.contestant.estimator})
        self.svi = SVI(self.model, self.estimated_guide, Adam(self.learning_rate), self.elbo)

    @cached_property
    def start(self) -> Params:
        return weights()

    def layer(self, p: Params | None, name: str, x: Array) -> Array:
        w, b = (self.start if p is None else p)[name], (self.start if p is None else p)[f"{name} bias"]
        if p is None:
            w, b = numpyro.param(name, w), numpyro.param(f"{name} bias", b)
        return x @ w + b

    def model(self, x: Array, p: Params | None = None) -> None:
        prior = numpyro.param("prior", self.start["prior"]) if p is None else p["prior"]
        with numpyro.plate("batch", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
            if self.tally is not None:
                self.tally(z)
            logits = self.layer(p, "d2", jnp.tanh(self.layer(p, "d1", z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Array, p: Params | None = None) -> None:
        logits = self.layer(p, "e2", jnp.tanh(self.layer(p, "e1", x)))
        with numpyro.plate("batch", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    def loss(self, key: Any, state: Any, x: Array, p: Params) -> Array:
        """Per image."""
        kept = {**self.svi.get_params(state), **(state.mutable_state or {})}
        return self.elbo.loss(key, kept, self.model, self.estimated_guide, x, p) / len(x)

    def train(self, state: Any, steps: int) -> Any:
        """On fresh batches, in one compiled loop."""

        def step(state: Any, key: Any) -> tuple[Any, None]:
            x = self.images[jax.random.randint(key, (BATCH,), 0, len(self.images))]
            return self.svi.update(state, x)[0], None

        return jax.lax.scan(step, state, jax.random.split(jax.random.fold_in(state.rng_key, 1), steps))[0]


def trajectory(images: Any, early: int, late: int) -> dict[str, Params]:
    """The network at two moments of one run."""
    vae = Vae(Contestant(Reinforce(LeaveOneOut()), SCORE, particles=4), images)
    state = vae.svi.init(jax.random.key(1), images[:BATCH])
    run = jax.jit(lambda s, n: jax.lax.fori_loop(0, n, lambda _, s: vae.train(s, 1), s))
    first = run(state, early)
    return {"early": vae.svi.get_params(first), "late": vae.svi.get_params(run(first, late - early))}


def mean_elbo(images: Any, p: Params) -> float:
    """Of the training images, in nats per image; one draw each."""
    vae = Vae(Contestant(Reinforce(), SCORE), images)
    state = vae.svi.init(jax.random.key(7), images, p)
    return -float(vae.loss(jax.random.key(8), state, images, p))


@dataclass(frozen=True)
class Noise:
    variance: float  # summed over the encoder's parameters
    mean: np.ndarray
    draws: int


class Measured:
    """One contestant: evaluations, gradient noise at both moments, and a compiled update to be timed."""

    def __init__(self, contestant: Contestant, images: Any, points: dict[str, Params], n: int, learn: int):
        x = images[:BATCH]
        tally = Tally()
        counted = Vae(contestant, images, tally)
        state = counted.svi.init(jax.random.key(2), x, points["early"])
        forward = jax.jit(lambda key: counted.loss(key, state, x, points["early"]))
        self.evaluations = tally.per_call(lambda: forward(jax.random.key(3)))

        vae = Vae(contestant, images, learning_rate=1e-2)

        @jax.jit
        def prepared(p: Params) -> Any:
            state = vae.svi.init(jax.random.key(4), x, p)
            if state.mutable_state or any("$" in name for name in vae.svi.get_params(state)):  # it learns
                state = jax.lax.scan(lambda s, _: (vae.svi.update(s, x, p)[0], None), state, length=learn)[0]
            return state

        def one(key: Any, state: Any, p: Params) -> Array:
            encoder = {n: v for n, v in p.items() if n.startswith("e")}
            g = jax.grad(lambda e: vae.loss(key, state, x, {**p, **e}))(encoder)
            return jnp.concatenate([v.ravel() for v in g.values()])

        several = jax.jit(jax.vmap(one, (0, None, None)))
        self.noise = {}
        for name, p in points.items():
            state = prepared(p)
            keys = jax.random.split(jax.random.key(5), (n // CHUNK, CHUNK))
            g = np.concatenate([np.asarray(several(k, state, p), dtype=float) for k in keys])
            self.noise[name] = Noise(float(g.var(0, ddof=1).sum()), g.mean(0), len(g))

    def bias(self, truth: Measured, at: str) -> tuple[float, float]:
        """|mean − true mean| and |true mean|; the noise of both means is taken off their squares."""
        mine, exact = self.noise[at], truth.noise[at]
        noise = mine.variance / mine.draws + exact.variance / exact.draws
        squared = float(((mine.mean - exact.mean) ** 2).sum()) - noise
        size = float((exact.mean**2).sum()) - exact.variance / exact.draws
        return math.sqrt(max(0.0, squared)), math.sqrt(max(0.0, size))


def update_of(contestant: Contestant, images: Any, length: int) -> Callable[[], object]:
    """`length` full updates in one compiled loop."""
    vae = Vae(contestant, images)
    state = jax.jit(lambda: vae.svi.init(jax.random.key(6), images[:BATCH]))()
    run = jax.jit(lambda s: vae.train(s, length))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(run(state))

    return step


def main() -> None:
    args = options(__doc__, early=500, late=6000, draws=500, learn=300, rounds=20)
    loop = 10
    if args.smoke:
        args.early, args.late, args.draws, args.learn, args.rounds, loop = 20, 60, 50, 10, 4, 2
    contestants = [c for c in CONTESTANTS if not args.smoke or c.name in SMOKE]
    warnings.simplefilter("ignore", EstimatorWarning)  # biased ones are among what we came to see
    images = jnp.asarray(bars(np.random.default_rng(0), IMAGES))
    measured: dict[str, Measured] = {}
    updates: dict[str, Callable[[], object]] = {}
    with progress(1 + 2 * len(contestants)) as bar:
        bar("training")
        points = trajectory(images, args.early, args.late)
        bar(1)
        for c in contestants:
            bar(c.name)
            measured[c.name] = Measured(c, images, points, args.draws, args.learn)
            bar(1)
            updates[c.name] = update_of(c, images, loop)
            updates[c.name]()
            bar(1)
    times = take_turns("times", updates, args.rounds)
    ms = {n: 1e3 / loop * statistics.median(t) for n, t in times.items()}
    price = {n: statistics.median(a / b for a, b in zip(t, times[RLOO], strict=True)) for n, t in times.items()}

    report = Report("noisy_bars", "Noisy bars: the noise of every estimator, and what a step costs")
    report.remark(
        f"VAE with {LATENTS} Bernoulli latents on {SIDE} x {SIDE} bars, batch {BATCH}, NumPyro, float32. Variance of "
        f"the batch-mean ELBO's gradient over the encoder's parameters, one fixed batch, {args.draws} draws. "
        f"What an estimator learns was trained for {args.learn} steps at each of the two points. Evaluations are "
        f"counted while a compiled loss runs. Milliseconds are medians of {args.rounds} rounds by turns, full updates "
        'in a compiled loop; "time" is the median of the rounds\' ratios to leave-one-out with two particles.'
    )
    for at, steps in (("early", args.early), ("late", args.late)):
        i = ("early", "late").index(at)
        base = measured[RLOO].noise[at].variance
        rows = []
        for c in contestants:
            m, known = measured[c.name], REFERENCE.get(c.name, (None, None))[i]
            v = m.noise[at].variance
            off, size = m.bias(measured[ENUMERATE], at)
            rows.append(
                [
                    c.label,
                    f"{m.evaluations:g}",
                    f"{ms[c.name]:.2f}",
                    f"{price[c.name]:.2f}",
                    scientific(v, 2),
                    f"{v / base:.3f}",
                    "" if known is None else f"{known / REFERENCE[RLOO][i]:.3f}",
                    f"{v / base * price[c.name]:.3f}",
                    f"{off / size:.2f}" if c.biased else "",
                ]
            )
        report.table(
            f"{at.capitalize()}: step {steps:,}",
            ["estimator", "evaluations", "ms", "time", "variance", "to RLOO-2", "reference", "variance x time", "bias"],
            rows,
        )
        report.remark(
            f"Training ELBO {mean_elbo(images, points[at]):.2f}, |gradient| {size:.3g}. Bias: |mean − true mean| / "
            '|true mean|, truth from Enumerate(). "variance x time" is relative to leave-one-out with two particles: '
            "below 1 is a better bargain."
        )
    early, late = (measured[RLOO].noise[at].variance for at in ("early", "late"))
    report.remark(
        "Where ratios differ from the reference (late above all), the run differs too: the reference's data are not "
        "known in detail, its runs end at a training ELBO near -14, and its variance of leave-one-out changes by a "
        f"factor of {REFERENCE[RLOO][1] / REFERENCE[RLOO][0]:.2f} from early to late; here that is {late / early:.2f}."
    )
    report.write(args.results)
    shown = {
        "evaluations": {name: m.evaluations for name, m in measured.items()},
        "milliseconds": ms,
        "variance": {
            f"{at}, step {steps:,}": {name: m.noise[at].variance for name, m in measured.items()}
            for at, steps in (("early", args.early), ("late", args.late))
        },
    }
    draw(keep(args, "noisy_bars", shown), args.figures / "noisy_bars.png")


#: what a smoke run measures
SMOKE = ("Reinforce(MovingAverage())", RLOO, "DisARM()", ENUMERATE, "ReinMax()")


def draw(shown: dict[str, Any], path: Path) -> None:
    figure, axes = panels(2)
    cost, ms = shown["evaluations"], shown["milliseconds"]
    contestants = [c for c in CONTESTANTS if c.name in ms]
    unbiased = [c.name for c in contestants if not c.biased]
    for axis, (when, noise) in zip(axes, shown["variance"].items(), strict=True):
        numbered(axis, contestants, [ms[c.name] for c in contestants], [noise[c.name] for c in contestants])
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        for level in np.geomspace(low * left, high * right, 9)[1:-1]:
            axis.plot([left, right], [level / left, level / right], color=FAINT, linewidth=1, zorder=1)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlim=(left, right), ylim=(low, high), xlabel="milliseconds per update")
        axis.set_ylabel("gradient variance (nats per image)²")
        best = min(unbiased, key=lambda name: noise[name] * ms[name])
        cheap = min((name for name in unbiased if cost[name] <= 2), key=lambda name: noise[name])
        heading(axis, f"{when}\nleast variance × time: {best};\nof up to two evaluations: {cheap}")
    present = [f for f in FAMILIES if any(c.family == f for c in contestants)]
    for i, family in enumerate(present):
        axes[0].text(
            0.98, 0.98 - 0.035 * i, family, transform=axes[0].transAxes, color=COLOURS[family], ha="right", size=8
        )
    axes[1].text(
        0.99, 0.98, "slanted lines: equal variance × time", transform=axes[1].transAxes, ha="right", color=INK, size=8
    )
    key(figure, contestants)
    figure.savefig(path)


if __name__ == "__main__":
    main()
