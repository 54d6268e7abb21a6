"""NumPyro: what the default leaves of a gradient's variance, against every choice that needs no state.

Each program at one point of its parameters: the total variance of one gradient, times the runs of guide and model that
step takes. The best choice is sought among estimators that keep nothing, each at every site that has no
reparameterisation: within three evaluations, which is what the default may spend, and at any price.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report
from numpyro.handlers import mask
from numpyro.infer import TraceEnum_ELBO

from ppl_estimators import DisARM, DisARMTree, Enumerate, LeaveOneOut, Reinforce, StochasticTriple, UnorderedSet
from ppl_estimators.backends import Library
from ppl_estimators.diagnostics.moments import Moments
from ppl_estimators.numpyro import EstimatorELBO
from ppl_estimators.numpyro.gradients import Gradients

MOST, BAR = 3, 1.5
Program = tuple[Callable[[], Any], Callable[[], Any]]
sample, param, plate = numpyro.sample, numpyro.param, numpyro.plate


def normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


def bit(name: str, logit: Any) -> Any:
    return sample(name, dist.Bernoulli(logits=logit))


def seen(loc: Any, at: Any = 0.4, scale: float = 1.0, name: str = "x") -> None:
    sample(name, dist.Normal(loc, scale), obs=jnp.asarray(at))


def bits(count: int) -> Program:
    """Independent ones, of which one cost sees the sum."""

    def guide() -> Any:
        a = param("a", jnp.linspace(-1.0, 1.0, count))
        return sum(bit(f"b{i}", a[i]) for i in range(count))

    return lambda: seen(sum(bit(f"b{i}", 0.3) for i in range(count)), count / 2), guide


def plate_of_bits(coupled: bool, beside: bool = False, count: int = 6) -> Program:
    logits = jnp.linspace(-1.0, 1.0, count)

    def draw(logits: Any, other: Any) -> tuple[Any, Any]:
        with plate("data", count):
            b = bit("b", logits)
        return b, bit("c", other) if beside else 0.0

    def model() -> None:
        b, c = draw(jnp.full(count, 0.3), 0.3)
        if coupled:
            return seen(b.sum() + 2.0 * c, 2.5)
        with plate("data", count):
            seen(2.0 * b + c, jnp.linspace(-0.5, 2.0, count))

    return model, lambda: draw(param("a", logits), param("o", 0.2))


def vector(layers: int, width: int = 8) -> Program:
    """Layers of bits, each given the one before: a sigmoid belief network."""

    def draw(first: Any, weights: Any) -> Any:
        z = first
        for i in range(layers):
            z = sample(f"b{i}", dist.Bernoulli(logits=z if i == 0 else weights[i] @ z - 0.5).to_event(1))
        return z

    def model() -> None:
        z = draw(jnp.full(width, 0.3), normal((layers, width, width), 1, 0.5))
        seen(normal((10, width), 2) @ z, normal((10,), 3), name="x")

    return model, lambda: draw(param("a", normal((width,), 4)), param("w", normal((layers, width, width), 5, 0.3)))


def chain(count: int) -> Program:
    def draw(a: Any, observe: bool) -> None:
        z: Any = 0.0
        for i in range(count):
            z = bit(f"b{i}", a[i] + z)
            if observe:
                seen(z, 0.2 + 0.1 * (i % 5), name=f"x{i}")

    return lambda: draw(jnp.full(count, 0.1), True), lambda: draw(param("a", jnp.linspace(-1.0, 1.0, count)), False)


def hidden_markov(count: int = 20, states: int = 3) -> Program:
    """A loop; the guide draws a state given the one before and what is seen."""
    y = 1.0 + normal((count,), 6)
    log_a, loc = normal((states, states), 7), jnp.arange(states) - 1.0

    def model() -> None:
        z = 0
        for t in range(count):
            z = sample(f"z{t}", dist.Categorical(logits=log_a[z]))
            seen(loc[z], y[t], 0.7, name=f"y{t}")

    def guide() -> None:
        w, v, z = param("w", normal((states, states), 8, 0.3)), param("v", normal((states,), 9, 0.3)), 0
        for t in range(count):
            z = sample(f"z{t}", dist.Categorical(logits=w[z] + v * y[t]))

    return model, guide


def spike_and_slab(count: int = 10) -> Program:
    """Variable selection; inclusion bits given those before them, coefficients pathwise."""
    x = normal((30, count), 10)
    y = x @ jnp.where(jnp.arange(count) < 3, 1.5, 0.0) + 0.5 * normal((30,), 11)

    def model() -> None:
        s = jnp.stack([bit(f"s{i}", -1.0) for i in range(count)])
        w = sample("w", dist.Normal(jnp.zeros(count), 1.5).to_event(1))
        sample("y", dist.Normal(x @ (s * w), 0.5).to_event(1), obs=y)

    def guide() -> None:
        a, u = param("a", jnp.where(jnp.arange(count) < 3, 1.0, -1.0)), param("u", normal((count, count), 12, 0.3))
        before: list[Any] = []
        for i in range(count):
            before.append(bit(f"s{i}", a[i] + sum(u[i, j] * s for j, s in enumerate(before))))
        scale = param("scale", jnp.full(count, 0.3), constraint=dist.constraints.positive)
        sample("w", dist.Normal(param("loc", jnp.where(jnp.arange(count) < 3, 1.2, 0.0)), scale).to_event(1))

    return model, guide


def attend_infer_repeat(steps: int = 3, pixels: int = 16) -> Program:
    """Up to three objects, of a row of pixels: is there one more, where, and what; no baselines."""
    grid = jnp.linspace(-2.0, 2.0, pixels)
    image = jnp.exp(-8 * (grid - 0.9) ** 2) + jnp.exp(-8 * (grid + 0.7) ** 2)

    def draw(logits: Any, where: Any, what: Any) -> Any:
        canvas, present = jnp.zeros(pixels), 1.0
        for t in range(steps):
            present = present * sample(f"present{t}", dist.Bernoulli(probs=jax.nn.sigmoid(logits[t]) * present))
            with mask(mask=present > 0):
                place = sample(f"where{t}", dist.Normal(where[t], 0.5))
                height = sample(f"what{t}", dist.Normal(what[t], 0.3))
            canvas = canvas + present * height * jnp.exp(-8 * (grid - place) ** 2)
        return canvas

    def model() -> None:
        canvas = draw(jnp.full(steps, -0.5), jnp.zeros(steps), jnp.ones(steps))
        sample("image", dist.Normal(canvas, 0.3).to_event(1), obs=image)

    def guide() -> None:
        draw(
            param("a", jnp.array([1.0, 0.5, -0.5])),
            param("where", jnp.array([0.7, -0.5, 0.0])),
            param("what", jnp.ones(steps)),
        )

    return model, guide


def labels(count: int, categories: int) -> Program:
    table = normal((count, categories), 13, 1.5)

    def guide() -> None:
        a = param("a", normal((count, categories), 14))
        for i in range(count):
            sample(f"k{i}", dist.Categorical(logits=a[i]))

    def model() -> None:
        ks = [sample(f"k{i}", dist.Categorical(logits=jnp.zeros(categories))) for i in range(count)]
        seen(sum(table[i, k] for i, k in enumerate(ks)), 0.8)

    return model, guide


def digits(supervised: bool, batch: int = 20, code: int = 5) -> Program:
    """A semi-supervised autoencoder, M2: a label of ten classes and a continuous code. As in Pyro's example every other
    image has its label if ``supervised``."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = jnp.asarray(data.data[:batch] > 8, float), jnp.asarray(data.target[:batch])
    known = batch // 2 if supervised else 0

    def both(guide: bool, enumerate_: bool = False) -> None:
        net = {n: param(n, normal(s, i, 0.2)) for i, (n, s) in enumerate(SHAPES.items()) if (n[0] == "q") == guide}
        for name, images, given in (("unlabelled", x[known:], None), ("labelled", x[:known], y[:known])):
            if not len(images):
                continue
            with plate(name, len(images)):
                logits = images @ net["q label"] if guide else jnp.zeros((len(images), 10))
                if given is None:
                    k = sample(f"k {name}", dist.Categorical(logits=logits))
                elif not guide:
                    k = sample(f"k {name}", dist.Categorical(logits=logits), obs=given)
                else:
                    k = given
                onehot = jax.nn.one_hot(k, 10)
                if guide:
                    sample(
                        f"z {name}",
                        dist.Normal(images @ net["q code"] + onehot @ net["q code of label"], 0.5).to_event(1),
                    )
                else:
                    z = sample(f"z {name}", dist.Normal(jnp.zeros((len(images), code)), 1.0).to_event(1))
                    logits = jnp.tanh(z @ net["p code"] + onehot @ net["p label"]) @ net["p pixels"]
                    sample(f"x {name}", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    return lambda: both(False), lambda: both(True)


SHAPES = {
    "q label": (64, 10), "q code": (64, 5), "q code of label": (10, 5), "p code": (5, 20), "p label": (10, 20),
    "p pixels": (20, 64),
}  # fmt: skip


def counts(count: int, beside: bool) -> Program:
    def draw(rates: Any, logit: Any) -> Any:
        with plate("data", count):
            n = sample("n", dist.Poisson(rates))
        return n, bit("b", logit) if beside else 0.0

    def model() -> None:
        n, b = draw(jnp.full(count, 2.0), 0.3)
        with plate("data", count):
            seen(n + 2.0 * b, jnp.linspace(1.0, 4.0, count))

    positive = dist.constraints.positive
    rates = jnp.linspace(1.0, 3.0, count)
    return model, lambda: draw(param("rates", rates, constraint=positive), param("o", 0.2))


#: the first eight are those of users' models, the others are small
PROGRAMS: dict[str, Callable[[], Program]] = {
    "semi-supervised digits": lambda: digits(False),
    "the same, half of the labels known": lambda: digits(True),
    "hidden Markov model of 20 steps": hidden_markov,
    "autoregressive spike and slab": spike_and_slab,
    "attend, infer, repeat": attend_infer_repeat,
    "a plate of bits": lambda: plate_of_bits(False),
    "six identical sites": lambda: bits(6),
    "two layers of 8 bits": lambda: vector(2),
    "a coupled plate": lambda: plate_of_bits(True),
    "a coupled plate and a bit": lambda: plate_of_bits(True, True),
    "a vector of 8 bits": lambda: vector(1),
    "three layers of 8 bits": lambda: vector(3),
    "a chain of 20 bits": lambda: chain(20),
    "a label of 10": lambda: labels(1, 10),
    "three labels of 10": lambda: labels(3, 10),
    "a plate of counts": lambda: counts(5, False),
    "a plate of counts and a bit": lambda: counts(5, True),
}
#: which of them fit is seen when they are tried
CHOICES: dict[str, tuple[Any, int]] = {
    "Enumerate()": (Enumerate(), 1),
    "DisARM()": (DisARM(), 1),
    "UnorderedSet(3)": (UnorderedSet(3), 1),
    "DisARMTree()": (DisARMTree(), 1),
    "StochasticTriple()": (StochasticTriple(), 1),
    **{f"Reinforce(LeaveOneOut()), {n} particles": (Reinforce(LeaveOneOut()), n) for n in (2, 3, 4)},
}
#: more would be compiled for minutes
MOST_COMPILED = 40


def measured(elbo: Any, program: Program, draws: int) -> tuple[float, float, int | None, str]:
    """The variance of one draw, its standard error, evaluations a step, and what runs where."""
    gradients = Gradients(elbo, *program)
    plan, evaluations, chosen = gradients.plan(), None, ""
    if plan is not None:
        evaluations = plan.particles * (1 + sum(g.alternatives + g.relaxations for g in plan.groups))
        chosen = ", ".join(dict.fromkeys(f"`{e!r}`" for e in plan.estimators.values()))
        if evaluations > MOST_COMPILED:
            raise ValueError(f"{evaluations} evaluations")
    moments, variances = Moments(), []
    for losses, found in gradients.draws(draws):
        part = Moments()
        for one in (moments, part):
            one.add(losses, found)
        variances.append(part.total_variance)
    error = float(np.std(variances, ddof=1) / len(variances) ** 0.5) if len(variances) > 1 else float("nan")
    return moments.total_variance, error, evaluations, chosen


def contest(name: str, draws: int) -> tuple[str, ...]:
    program = PROGRAMS[name]()
    default = measured(EstimatorELBO(), program, draws)
    plan, found = Gradients(EstimatorELBO(), *program).plan(), {}
    for label, (estimator, particles) in CHOICES.items():
        mapping = {n: estimator for n, s in plan.sites.items() if not s.reparameterised}
        try:
            variance, _, evaluations, _ = measured(EstimatorELBO(mapping, num_particles=particles), program, draws)
        except ValueError:  # it refuses a site, or asks for too much
            continue
        found[label] = variance * evaluations, evaluations
    if "digits" in name or "labels known" in name:
        stock = measured(TraceEnum_ELBO(), (program[0], Library.numpyro.part("look").summed_out(program[1])), draws)
        found["TraceEnum_ELBO"] = stock[0] * 10, 10
    ours, runs = default[0] * default[2], default[2]
    cheap = min((n for n in found if found[n][1] <= MOST), key=lambda n: found[n][0], default=None)
    any_price = min(found, key=lambda n: found[n][0])
    floor = 1e-9 * max(v for v, _ in found.values())
    ratio = (ours + floor) / (min(found[cheap][0] if cheap else np.inf, ours) + floor)
    verdict = f"{ratio:.2f}" + ("" if ratio <= BAR else " MISSED")
    best = f"{found[any_price][0]:.3g} (`{any_price}`, {found[any_price][1]})"
    near = f"{found[cheap][0]:.3g} (`{cheap}`)" if cheap else "–"
    return name, default[3], str(runs), f"{ours:.3g}", near, verdict, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--program", action="append", choices=list(PROGRAMS), help="one of them; all by default")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report("defaults", "The default against the best choice that needs no state")
    columns = (
        "program", "the default", "evaluations", "its variance × evaluations", "best within three", "ratio",
        "best at any price (evaluations)",
    )  # fmt: skip
    rows = []
    for name in options.program or PROGRAMS:
        rows.append(contest(name, options.draws))
        print(*rows[-1], sep=" | ", flush=True)
    report.table(f"Variance × evaluations, {options.draws:,} draws", columns, rows)
    if options.program is None:
        report.write()


if __name__ == "__main__":
    main()
