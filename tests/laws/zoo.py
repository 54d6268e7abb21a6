"""The zoo: a tiny model and guide per law, written once for both libraries, beside the exact ELBO.

A program is a function of `ppl` (see `languages.py`: sample, param, plate, dist, scale, mask, ...)
and of its initial parameters, so the Pyro model and its NumPyro twin are the same text. The exact
ELBO beside it is an explicit sum over states in NumPy that shares no code with either library.

Conventions: z, k are discrete latents, w, u are continuous ones, x, y are observed. All parameters
are unconstrained. Everything is asymmetric and logits keep away from zero on purpose, except where
zero is the point.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
from oracle import (
    Array,
    Params,
    bernoulli,
    bits,
    categorical,
    expectation,
    gradient,
    hermite,
    normal,
    sigmoid,
    value,
)

Program = Callable[[Any, Params], tuple[Callable[[], None], Callable[[], None]]]


@dataclass(frozen=True)
class Case:
    """A program, its parameters, and its ELBO as an explicit sum.

    table: for programs with finitely many states, θ ↦ (log q(state), f(state)): minus f is what the
        loss of one particle can be. Else None.
    elbo: θ ↦ E_q[f], a holomorphic function of θ.
    rows: the laws (L1 to L12) and stock defects (B1 to B17) it is for.
    minibatches: a partition of the data; the mean over its parts is the mean over all minibatches.
    nesting: the plate nesting to declare to Pyro where it can't be guessed.
    strict: whether Pyro's shape validation accepts the program.
    """

    name: str
    rows: tuple[str, ...]
    program: Program
    params: Mapping[str, Array]
    elbo: Callable[[Params], Array]
    table: Callable[[Params], tuple[Array, Array]] | None = None
    minibatches: tuple[tuple[int, ...], ...] = ()
    nesting: int | None = None
    strict: bool = True

    def exact_elbo(self) -> float:
        return value(self.elbo, self.params)

    def exact_gradient(self) -> dict[str, Array]:
        """Of the loss, that is of −ELBO."""
        return {k: -v for k, v in gradient(self.elbo, self.params).items()}


CASES: dict[str, Case] = {}


def finite(
    name: str,
    rows: str,
    program: Program,
    params: Mapping[str, Any],
    states: Callable[[Params], list[tuple[Array, Array]]],
    **options: Any,
) -> Case:
    """A case with finitely many states, given as a list of (log q, f)."""

    def table(theta: Params) -> tuple[Array, Array]:
        log_q, f = zip(*states(theta), strict=True)
        return np.array(log_q), np.array(f)

    return case(name, rows, program, params, lambda t: expectation(*table(t)), table=table, **options)


def case(
    name: str,
    rows: str,
    program: Program,
    params: Mapping[str, Any],
    elbo: Callable[[Params], Array],
    **options: Any,
) -> Case:
    values = {k: np.asarray(v, dtype=float) for k, v in params.items()}
    CASES[name] = Case(name, tuple(rows.split()), program, values, elbo, **options)
    return CASES[name]


# One Bernoulli site.


def single(ppl, init):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def single_states(p):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        yield log_q, bernoulli(z, p["t"]) + normal(0.8, 1.5 * z - 0.5) - log_q


finite("single", "L1 L6 L8", single, {"a": 0.7, "t": -0.4}, single_states)
finite("single_zero", "B5", single, {"a": 0.0, "t": -0.4}, single_states)
finite("single_zero_model", "B5", single, {"a": 0.7, "t": 0.0}, single_states)


# Two dependent Bernoulli sites: a counterfactual z1 must draw z2 afresh.


def chain(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        u, v = ppl.param("u", init), ppl.param("v", init)
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=u + v * z1))
        ppl.sample("x", ppl.dist.Normal(1.5 * z1 - z2 + 2.0 * z1 * z2, 1.0), obs=ppl.array(2.6))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b, c = ppl.param("b", init), ppl.param("c", init)
        ppl.sample("z2", ppl.dist.Bernoulli(logits=b + c * z1))

    return model, guide


def chain_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"] + p["c"] * z1)
        log_p = bernoulli(z1, p["t"]) + bernoulli(z2, p["u"] + p["v"] * z1)
        yield log_q, log_p + normal(2.6, 1.5 * z1 - z2 + 2 * z1 * z2) - log_q


CHAIN = {"a": 0.7, "b": 0.6, "c": -1.9, "t": -0.4, "u": 0.3, "v": -0.8}
finite("chain", "L1 L4 L5 L8", chain, CHAIN, chain_states)


# The same under handlers.scale: the cost is scaled, the score is not.


def scaled(ppl, init):
    model, guide = chain(ppl, init)

    def scaled_model():
        with ppl.scale(0.1):
            model()

    def scaled_guide():
        with ppl.scale(0.1):
            guide()

    return scaled_model, scaled_guide


def scaled_states(p):
    for log_q, f in chain_states(p):
        yield log_q, 0.1 * f


finite("scaled", "L2 B1", scaled, CHAIN, scaled_states)


# Three dependent Bernoulli sites.


def chain3(ppl, init):
    def run(a, b, c, obs):
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=a))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=b[0] + b[1] * z1))
        z3 = ppl.sample("z3", ppl.dist.Bernoulli(logits=c[0] + c[1] * z2 + c[2] * z1 * z2))
        if obs is not None:
            loc = z1 - 1.5 * z2 + 2.0 * z3 - 0.5 * z1 * z3
            ppl.sample("x", ppl.dist.Normal(loc, 0.8), obs=ppl.array(obs))

    def model():
        run(*[ppl.array(v) for v in (-0.4, [0.3, -0.8], [0.2, 0.5, 0.0])], 1.3)

    def guide():
        run(*[ppl.param(name, init) for name in "abc"], None)

    return model, guide


def chain3_states(p):
    for z1, z2, z3 in bits(3):

        def log_density(a, b, c, z1=z1, z2=z2, z3=z3):
            return bernoulli(z1, a) + bernoulli(z2, b[0] + b[1] * z1) + bernoulli(z3, c[0] + c[1] * z2 + c[2] * z1 * z2)

        log_q = log_density(p["a"], p["b"], p["c"])
        log_p = log_density(-0.4, [0.3, -0.8], [0.2, 0.5, 0.0])
        yield log_q, log_p + normal(1.3, z1 - 1.5 * z2 + 2 * z3 - 0.5 * z1 * z3, 0.8) - log_q


CHAIN3 = {"a": 0.7, "b": [-1.1, 2.3], "c": [0.6, -1.4, 1.9]}
finite("chain3", "L4 L5", chain3, CHAIN3, chain3_states)


# Discrete, continuous, discrete: λ of the last site depends on a pathwise sample.


def mixed(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        w = ppl.sample("w", ppl.dist.Normal(0.5 * z1, 1.0))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=0.3 * w - 0.2))
        ppl.sample("x", ppl.dist.Normal(w + 1.3 * z2 - z1, 1.0), obs=ppl.array(1.1))

    def guide():
        p = {name: ppl.param(name, init) for name in "amnsbc"}
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=p["a"]))
        w = ppl.sample("w", ppl.dist.Normal(p["m"] + p["n"] * z1, ppl.exp(p["s"])))
        ppl.sample("z2", ppl.dist.Bernoulli(logits=p["b"] + p["c"] * w))

    return model, guide


def mixed_grid(p):
    """A (log weight, f) for each z1, Gauss-Hermite node of w, and z2."""
    weights, values = [], []
    for z1, z2 in bits(2):
        loc, scale = p["m"] + p["n"] * z1, np.exp(p["s"])
        w, weight = hermite(loc, scale, order=40)
        log_q2 = bernoulli(z2, p["b"] + p["c"] * w)
        log_q = bernoulli(z1, p["a"]) + normal(w, loc, scale) + log_q2
        log_p = bernoulli(z1, p["t"]) + normal(w, 0.5 * z1) + bernoulli(z2, 0.3 * w - 0.2)
        weights.append(np.log(weight) + bernoulli(z1, p["a"]) + log_q2)
        values.append(log_p + normal(1.1, w + 1.3 * z2 - z1) - log_q)
    return np.concatenate(weights), np.concatenate(values)


def mixed_elbo(p):
    return expectation(*mixed_grid(p))


MIXED = {"a": 0.7, "m": 0.4, "n": -0.9, "s": -0.5, "b": -0.6, "c": 1.2, "t": -0.4}
case("mixed", "L4 L8", mixed, MIXED, mixed_elbo)


# A point estimate of a continuous site above a discrete one.


def delta(ppl, init):
    def model():
        w = ppl.sample("w", ppl.dist.Normal(0.5, 1.0))
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=0.3 * w - 0.2))
        ppl.sample("x", ppl.dist.Normal(w * (1 + z), 1.0), obs=ppl.array(1.1))

    def guide():
        m, b, c = (ppl.param(name, init) for name in "mbc")
        w = ppl.sample("w", ppl.dist.Delta(m))
        ppl.sample("z", ppl.dist.Bernoulli(logits=b + c * w))

    return model, guide


def delta_states(p):
    w = p["m"]
    for z in (0, 1):
        log_q = bernoulli(z, p["b"] + p["c"] * w)
        log_p = normal(w, 0.5) + bernoulli(z, 0.3 * w - 0.2) + normal(1.1, w * (1 + z))
        yield log_q, log_p - log_q


finite("delta", "L8", delta, {"m": 0.8, "b": -0.6, "c": 1.2}, delta_states)


# Subsampling: a global bit, and a local bit for each of four data points, two at a time.

DATA = np.array([-1.2, 0.3, 2.1, 1.7])
COVARIATE = np.array([0.5, -1.0, 1.5, -0.7])


def subsample(ppl, init):
    def model():
        s = ppl.sample("z_global", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = ppl.param("u", init) + 0.8 * s
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=logits))
            x = ppl.array(DATA)[index]
            ppl.sample("x", ppl.dist.Normal(1.2 * z - s + 0.4 * z * s, 1.0), obs=x)

    def guide():
        s = ppl.sample("z_global", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b, c, d = (ppl.param(name, init) for name in "bcd")
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = b + c * ppl.array(COVARIATE)[index] + d * s
            ppl.sample("z", ppl.dist.Bernoulli(logits=logits))

    return model, guide


def subsample_elbo(p):
    total = 0.0
    for s in (0, 1):
        log_q = bernoulli(s, p["a"])
        f = bernoulli(s, p["t"]) - log_q
        for x, covariate in zip(DATA, COVARIATE, strict=True):
            for z in (0, 1):
                local = bernoulli(z, p["b"] + p["c"] * covariate + p["d"] * s)
                cost = bernoulli(z, p["u"] + 0.8 * s) - local
                cost = cost + normal(x, 1.2 * z - s + 0.4 * z * s)
                f = f + np.exp(local) * cost
        total = total + np.exp(log_q) * f
    return total


SUBSAMPLE = {"a": 0.7, "t": -0.4, "b": -0.8, "c": 1.1, "d": 0.9, "u": 0.3}
case(
    "subsample",
    "L2 L9 B1 B3",
    subsample,
    SUBSAMPLE,
    subsample_elbo,
    minibatches=((0, 3), (1, 2)),
)


# A guide that looks at its data point: only the minibatch that it saw tells whether it is right.

AMORTISED_X = np.array([-1.2, 1.5, -0.9, 1.1])


def amortised(ppl, init, infer=None):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(0.3)), infer=infer or {})
            x = ppl.array(AMORTISED_X)[index]
            ppl.sample("x", ppl.dist.Normal(2.0 * z - 1.0, 0.7), obs=x)

    def guide():
        c = ppl.param("c", init)
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = c * ppl.array(AMORTISED_X)[index]
            ppl.sample("z", ppl.dist.Bernoulli(logits=logits), infer=infer or {})

    return model, guide


def amortised_elbo(p):
    total = 0.0
    for x in AMORTISED_X:
        for z in (0, 1):
            log_q = bernoulli(z, p["c"] * x)
            f = bernoulli(z, 0.3) + normal(x, 2 * z - 1.0, 0.7) - log_q
            total = total + np.exp(log_q) * f
    return total


case("amortised", "L9 B3", amortised, {"c": 0.8}, amortised_elbo, minibatches=((0, 3), (1, 2)))


# Masks: the log-probabilities of masked latents are gone, their influence on others is not.

MASK = np.array([True, False, True])
SEEN = np.array([True, True, False])
MASKED_X = np.array([1.1, -0.7, 0.4])


def masked(ppl, init, mask_latents, mask_observed):
    """z_0 and z_2 have a prior; all three act on x; the last x is not seen."""

    def model():
        with ppl.plate("plate", 3):
            z = mask_latents("z", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
            mask_observed("x", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(MASKED_X))

    def guide():
        with ppl.plate("plate", 3):
            mask_latents("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def masked_by_handler(ppl, init):
    def under(mask):
        def sample(name, fn, **kwargs):
            with ppl.mask(ppl.array(mask)):
                return ppl.sample(name, fn, **kwargs)

        return sample

    return masked(ppl, init, under(MASK), under(SEEN))


def masked_by_distribution(ppl, init):
    def under(mask):
        return lambda name, fn, **kwargs: ppl.sample(name, fn.mask(ppl.array(mask)), **kwargs)

    return masked(ppl, init, under(MASK), under(SEEN))


def masked_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"])
        prior = (bernoulli(z, p["t"]) - log_q)[MASK].sum()
        yield log_q.sum(), prior + normal(MASKED_X, 2 * z - 0.3)[SEEN].sum()


MASKED = {"a": [0.7, -0.9, 1.4], "t": -0.4}
finite("masked_by_handler", "L2 B4", masked_by_handler, MASKED, masked_states)
finite("masked_by_distribution", "L2 B4", masked_by_distribution, MASKED, masked_states)


# Three bits that no plate declares independent, each acting on everything.

JOINT_X = np.array([1.2, -0.6, 0.9])
JOINT_MATRIX = np.array([[1.0, 2.0, -1.5], [-0.5, 1.5, 1.0], [2.0, -1.0, 0.7]])


def undeclared(ppl, init):
    """A batch dimension without a plate, in the guide, the prior and the likelihood."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array([0.4, -0.5, 0.3])))
        loc = ppl.mix(ppl.array(JOINT_MATRIX), z)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(JOINT_X))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def event(ppl, init):
    """The same, declared as events."""

    def model():
        prior = ppl.dist.Bernoulli(logits=ppl.array([0.4, -0.5, 0.3])).to_event(1)
        z = ppl.sample("z", prior)
        loc = ppl.mix(ppl.array(JOINT_MATRIX), z)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0).to_event(1), obs=ppl.array(JOINT_X))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)).to_event(1))

    return model, guide


def joint_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"]).sum()
        log_p = bernoulli(z, np.array([0.4, -0.5, 0.3])).sum()
        yield log_q, log_p + normal(JOINT_X, JOINT_MATRIX @ z).sum() - log_q


JOINT = {"a": [0.7, -0.9, 1.4]}
finite("undeclared", "L3 B15", undeclared, JOINT, joint_states, nesting=1, strict=False)
finite("event", "L3", event, JOINT, joint_states)


# Two plates that cross.

CROSSED_X = np.array([[1.0, -0.5], [0.3, 1.8], [-1.1, 0.6]])


def crossed(ppl, init):
    def model():
        columns, rows = ppl.plate("columns", 2, dim=-1), ppl.plate("rows", 3, dim=-2)
        with columns:
            z = ppl.sample("z_column", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        with rows:
            k = ppl.sample("z_row", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        with columns, rows:
            loc = 1.5 * z * k + 0.7 * z - k
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(CROSSED_X))

    def guide():
        columns, rows = ppl.plate("columns", 2, dim=-1), ppl.plate("rows", 3, dim=-2)
        with columns:
            ppl.sample("z_column", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        with rows:
            ppl.sample("z_row", ppl.dist.Bernoulli(logits=ppl.param("b", init)))

    return model, guide


def crossed_states(p):
    for state in bits(5):
        z, k = np.array(state[:2]), np.array(state[2:])[:, None]
        log_q = bernoulli(z, p["a"]).sum() + bernoulli(k, p["b"]).sum()
        log_p = bernoulli(z, -0.4).sum() + bernoulli(k, 0.3).sum()
        yield log_q, log_p + normal(CROSSED_X, 1.5 * z * k + 0.7 * z - k).sum() - log_q


CROSSED = {"a": [0.7, -0.9], "b": [[0.5], [-1.2], [0.9]]}
finite("crossed", "L3", crossed, CROSSED, crossed_states)


# Nested plates, with a cost of the outer plate that sees all of the inner one.

NESTED_X = np.array([[1.0, -0.5, 0.4], [0.3, 1.8, -0.9]])
NESTED_Y = np.array([[1.4], [0.2]])


def nested(ppl, init):
    def model():
        with ppl.plate("outer", 2, dim=-2):
            z = ppl.sample("z_outer", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            with ppl.plate("inner", 3, dim=-1):
                k = ppl.sample("z_inner", ppl.dist.Bernoulli(logits=0.5 - 0.9 * z))
                ppl.sample("x", ppl.dist.Normal(k - 1.2 * z * k, 1.0), obs=ppl.array(NESTED_X))
            loc = 0.8 * ppl.total(k) - z
            ppl.sample("y", ppl.dist.Normal(loc, 1.0), obs=ppl.array(NESTED_Y))

    def guide():
        with ppl.plate("outer", 2, dim=-2):
            z = ppl.sample("z_outer", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
            with ppl.plate("inner", 3, dim=-1):
                logits = ppl.param("b", init) + ppl.param("c", init) * z
                ppl.sample("z_inner", ppl.dist.Bernoulli(logits=logits))

    return model, guide


def nested_elbo(p):
    total = 0.0
    for o in range(2):
        for state in bits(4):
            z, k = state[0], np.array(state[1:])
            log_q = bernoulli(z, p["a"][o, 0]) + bernoulli(k, p["b"][o] + p["c"] * z).sum()
            log_p = bernoulli(z, -0.4) + bernoulli(k, 0.5 - 0.9 * z).sum()
            log_p = log_p + normal(NESTED_X[o], k - 1.2 * z * k).sum()
            log_p = log_p + normal(NESTED_Y[o, 0], 0.8 * k.sum() - z)
            total = total + np.exp(log_q) * (log_p - log_q)
    return total


NESTED = {"a": [[0.7], [-0.9]], "b": [[0.5, -1.2, 0.9], [-0.6, 0.8, 1.3]], "c": 0.7}
case("nested", "L3", nested, NESTED, nested_elbo)


# Out of a plate and in again: z_e reaches x_e' through w.

REENTERED_X = np.array([1.5, -0.4, 0.7])


def reentered(ppl, init, same_plate=False):
    weights = ppl.array([1.5, -2.0, 1.0])

    def plates():
        plate = ppl.plate("plate", 3, dim=-1)
        return plate, plate if same_plate else ppl.plate("again", 3, dim=-1)

    def model():
        plate, again = plates()
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.3)))
        w = ppl.sample("z_total", ppl.dist.Bernoulli(logits=ppl.total(0.4 * z)))
        with again:
            k = ppl.sample("z_again", ppl.dist.Bernoulli(logits=0.5 * w - 0.2))
            ppl.sample("x", ppl.dist.Normal(2.0 * w * k - k + w, 0.7), obs=ppl.array(REENTERED_X))

    def guide():
        plate, again = plates()
        b, c = ppl.param("b", init), ppl.param("c", init)
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        w = ppl.sample("z_total", ppl.dist.Bernoulli(logits=b + ppl.total(weights * z)))
        with again:
            ppl.sample("z_again", ppl.dist.Bernoulli(logits=c[0] + c[1] * z + c[2] * w))

    return model, guide


def reentered_same_plate(ppl, init):
    """The same with one plate, entered twice."""
    return reentered(ppl, init, same_plate=True)


def reentered_states(p):
    c = p["c"]
    for state in bits(7):
        z, w, k = np.array(state[:3]), state[3], np.array(state[4:])
        log_q = bernoulli(z, p["a"]).sum()
        log_q = log_q + bernoulli(w, p["b"] + (np.array([1.5, -2.0, 1.0]) * z).sum())
        log_q = log_q + bernoulli(k, c[0] + c[1] * z + c[2] * w).sum()
        log_p = bernoulli(z, -0.3).sum() + bernoulli(w, 0.4 * z.sum())
        log_p = log_p + bernoulli(k, 0.5 * w - 0.2).sum()
        yield log_q, log_p + normal(REENTERED_X, 2 * w * k - k + w, 0.7).sum() - log_q


REENTERED = {"a": [0.7, -0.9, 1.1], "b": 0.4, "c": [-0.6, 1.3, 0.8]}
finite("reentered", "L3", reentered, REENTERED, reentered_states)
finite("reentered_same_plate", "L3", reentered_same_plate, REENTERED, reentered_states)


# The same influence without a site on the way: the total is taken by plain arithmetic.


def summed(ppl, init):
    def model():
        plate = ppl.plate("plate", 3, dim=-1)
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.3)))
        total = ppl.total(ppl.array([1.5, -2.0, 1.0]) * z)
        with plate:
            ppl.sample("x", ppl.dist.Normal(total - z, 0.7), obs=ppl.array(REENTERED_X))

    def guide():
        with ppl.plate("plate", 3, dim=-1):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def summed_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"]).sum()
        log_p = bernoulli(z, -0.3).sum()
        total = (np.array([1.5, -2.0, 1.0]) * z).sum()
        yield log_q, log_p + normal(REENTERED_X, total - z, 0.7).sum() - log_q


finite("summed", "L3", summed, {"a": [0.7, -0.9, 1.1]}, summed_states)


# A guide-only site.


def auxiliary(ppl, init):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5, 1.0), obs=ppl.array(0.8))

    def guide():
        fn = ppl.dist.Bernoulli(logits=ppl.param("a", init))
        aux = ppl.sample("z_aux", fn, infer={"is_auxiliary": True})
        logits = ppl.param("b", init) + ppl.param("c", init) * aux
        ppl.sample("z", ppl.dist.Bernoulli(logits=logits))

    return model, guide


def auxiliary_states(p):
    for aux, z in bits(2):
        log_q = bernoulli(aux, p["a"]) + bernoulli(z, p["b"] + p["c"] * aux)
        yield log_q, bernoulli(z, -0.4) + normal(0.8, 1.5 * z - 0.5) - log_q


finite("auxiliary", "L12 B7", auxiliary, {"a": 0.9, "b": -1.1, "c": 2.3}, auxiliary_states)


# A continuous site that can't be reparameterised.


def mixture(ppl, init):
    def model():
        w = ppl.sample("w", ppl.dist.Normal(0.5, 1.2))
        ppl.sample("x", ppl.dist.Normal(0.5 * w**2, 1.0), obs=ppl.array(1.4))

    def guide():
        a, m, s = (ppl.param(name, init) for name in "ams")
        parts = ppl.dist.Normal(m, ppl.exp(s))
        ppl.sample("w", ppl.dist.MixtureSameFamily(ppl.dist.Categorical(logits=a), parts))

    return model, guide


def mixture_elbo(p):
    log_a, scale = categorical(p["a"]), np.exp(p["s"])
    total = 0.0
    for j in range(2):
        w, weight = hermite(p["m"][j], scale[j], order=120)
        density = sum(np.exp(log_a[i] + normal(w, p["m"][i], scale[i])) for i in range(2))
        f = normal(w, 0.5, 1.2) + normal(1.4, 0.5 * w**2) - np.log(density)
        total = total + np.exp(log_a[j]) * (weight * f).sum()
    return total


MIXTURE = {"a": [0.4, -0.3], "m": [-0.9, 1.3], "s": [-0.4, -0.7]}
case("mixture", "B14", mixture, MIXTURE, mixture_elbo)


# Score functions through expand, to_event, mask and a transformed distribution.


def wrapped(ppl, init):
    def model():
        u = ppl.sample("u", ppl.dist.LogNormal(0.0, 0.7))
        v = ppl.sample("v", ppl.dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        k = ppl.sample("k", ppl.dist.Normal(0.0, 1.0).mask(False))
        loc = u * v[..., 0] + v[..., 1] + k
        ppl.sample("x", ppl.dist.Normal(loc, 2.0), obs=ppl.array(0.9))

    def guide():
        m, n, r = (ppl.param(name, init) for name in "mnr")
        ppl.sample("u", ppl.dist.LogNormal(m, 0.5))
        ppl.sample("v", ppl.dist.Normal(n, 0.8).expand([2]).to_event(1))
        ppl.sample("k", ppl.dist.Normal(r, 0.6).mask(False))

    return model, guide


def wrapped_elbo(p):
    """All moments are in closed form: the log-likelihood is quadratic, u is LogNormal."""
    m, n, r = p["m"], p["n"], p["r"]
    u1, u2 = np.exp(m + 0.125), np.exp(2 * m + 0.5)  # E u, E u²
    kl_u = np.log(0.7 / 0.5) + (0.25 + m**2) / 0.98 - 0.5
    kl_v = 2 * (-np.log(0.8) + (0.64 + n**2) / 2 - 0.5)
    mean = u1 * n + n + r
    variance = u2 * (0.64 + n**2) - (u1 * n) ** 2 + 0.64 + 0.36
    residual = (0.9 - mean) ** 2 + variance
    return -0.5 * residual / 4 - np.log(2.0) - 0.5 * np.log(2 * np.pi) - kl_u - kl_v


case("wrapped", "B10 L2", wrapped, {"m": -0.3, "n": 0.8, "r": -0.7}, wrapped_elbo)


# Integer and one-hot categoricals, one under the other, in a plate.

CATEGORY_X = np.array([1.3, -0.8])


def categories(ppl, init):
    def model():
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
            logits = ppl.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]])[k]
            z = ppl.sample("z", ppl.one_hot(logits))
            loc = ppl.array([-1.0, 0.5, 2.0])[k] + ppl.dot(z, ppl.array([1.2, -0.7, 0.4]))
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(CATEGORY_X))

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=a))
            ppl.sample("z", ppl.one_hot(b[k]))

    return model, guide


def categories_elbo(p):
    prior = categorical(np.array([0.2, -0.3, 0.4]))
    rows = categorical(np.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]]))
    loc_k, loc_z = np.array([-1.0, 0.5, 2.0]), np.array([1.2, -0.7, 0.4])
    total = 0.0
    for e in range(2):
        for k in range(3):
            for z in range(3):
                log_q = categorical(p["a"][e])[k] + categorical(p["b"][k])[z]
                log_p = prior[k] + rows[k, z] + normal(CATEGORY_X[e], loc_k[k] + loc_z[z])
                total = total + np.exp(log_q) * (log_p - log_q)
    return total


CATEGORIES = {
    "a": [[0.6, -0.4, 0.2], [-0.7, 0.5, 0.9]],
    "b": [[0.8, -0.6, 0.3], [-0.2, 0.9, -0.5], [0.4, 0.1, -1.0]],
}
case("categories", "L3 L4", categories, CATEGORIES, categories_elbo)


# Chains inside a subsampled plate: two bits; an integer categorical and a one-hot one.


def subsampled_bits(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            k = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.param("t", init) - 1.5 * z))
            x = ppl.array(DATA)[index]
            ppl.sample("x", ppl.dist.Normal(1.2 * z - k + 2.0 * z * k, 1.0), obs=x)

    def guide():
        a, b, c = (ppl.param(name, init) for name in "abc")
        with ppl.plate("data", 4, subsample_size=2) as index:
            covariate = ppl.array(COVARIATE)[index]
            z = ppl.sample("z1", ppl.dist.Bernoulli(logits=a + 0.8 * covariate))
            ppl.sample("z2", ppl.dist.Bernoulli(logits=b + c * z - 0.5 * covariate))

    return model, guide


def subsampled_bits_elbo(p):
    total = 0.0
    for x, covariate in zip(DATA, COVARIATE, strict=True):
        for z, k in bits(2):
            log_q = bernoulli(z, p["a"] + 0.8 * covariate) + bernoulli(k, p["b"] + p["c"] * z - 0.5 * covariate)
            log_p = bernoulli(z, -0.4) + bernoulli(k, p["t"] - 1.5 * z) + normal(x, 1.2 * z - k + 2.0 * z * k)
            total = total + np.exp(log_q) * (log_p - log_q)
    return total


SUBSAMPLED_BITS = {"a": 0.9, "b": -0.7, "c": 1.6, "t": 0.5}
case(
    "subsampled_bits", "L2 L4 L9", subsampled_bits, SUBSAMPLED_BITS, subsampled_bits_elbo, minibatches=((0, 3), (1, 2))
)

PRIOR_K = [0.2, -0.3, 0.4, 0.0]
PRIOR_Z = [[0.5, -0.2, 0.1, 0.4], [-0.4, 0.6, 0.0, 0.3], [0.3, 0.3, -0.9, 0.0], [0.1, -0.5, 0.7, 0.2]]
LOC_K, LOC_Z = [-1.0, 0.5, 2.0, -0.3], [1.2, -0.7, 0.4, 2.1]


def subsampled_categories(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array(PRIOR_K)))
            z = ppl.sample("z", ppl.one_hot(ppl.array(PRIOR_Z)[k]))
            loc = ppl.array(LOC_K)[k] * ppl.dot(z, ppl.array(LOC_Z))
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(DATA)[index])

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        with ppl.plate("data", 4, subsample_size=2) as index:
            k = ppl.sample("k", ppl.dist.Categorical(logits=a * (1.0 + 0.3 * ppl.array(COVARIATE)[index][:, None])))
            ppl.sample("z", ppl.one_hot(b[k]))

    return model, guide


def subsampled_categories_elbo(p):
    prior, rows = categorical(np.array(PRIOR_K)), categorical(np.array(PRIOR_Z))
    total = 0.0
    for x, covariate in zip(DATA, COVARIATE, strict=True):
        for k in range(4):
            for z in range(4):
                log_q = categorical(p["a"] * (1 + 0.3 * covariate))[k] + categorical(p["b"][k])[z]
                log_p = prior[k] + rows[k, z] + normal(x, LOC_K[k] * LOC_Z[z])
                total = total + np.exp(log_q) * (log_p - log_q)
    return total


SUBSAMPLED_CATEGORIES = {
    "a": [0.6, -0.9, 0.2, 1.1],
    "b": [[0.8, -0.6, 0.3, 0.0], [-0.2, 0.9, -0.5, 0.4], [0.4, 0.1, -1.0, 0.7], [-0.3, 0.2, 1.2, -0.8]],
}
case(
    "subsampled_categories",
    "L2 L4 L9",
    subsampled_categories,
    SUBSAMPLED_CATEGORIES,
    subsampled_categories_elbo,
    minibatches=((0, 3), (1, 2)),
)


# Categoricals in a plate whose elements one later cost sees together.


def coupled_categories(ppl, init):
    def model():
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
            z = ppl.sample("z", ppl.one_hot(ppl.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]])[k]))
        total = ppl.total(
            ppl.array([1.5, -1.0]) * ppl.array([-1.0, 0.5, 2.0])[k] * ppl.dot(z, ppl.array([1.2, -0.7, 0.4]))
        )
        ppl.sample("y", ppl.dist.Normal(total, 1.0), obs=ppl.array([0.9]))

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=a))
            ppl.sample("z", ppl.one_hot(b[k]))

    return model, guide


def coupled_categories_elbo(p):
    prior = categorical(np.array([0.2, -0.3, 0.4]))
    rows = categorical(np.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]]))
    loc_k, loc_z = np.array([-1.0, 0.5, 2.0]), np.array([1.2, -0.7, 0.4])
    total = 0.0
    for k0, z0, k1, z1 in product(range(3), repeat=4):
        log_q = categorical(p["a"][0])[k0] + categorical(p["b"][k0])[z0]
        log_q = log_q + categorical(p["a"][1])[k1] + categorical(p["b"][k1])[z1]
        log_p = prior[k0] + rows[k0, z0] + prior[k1] + rows[k1, z1]
        log_p = log_p + normal(0.9, 1.5 * loc_k[k0] * loc_z[z0] - 1.0 * loc_k[k1] * loc_z[z1])
        total = total + np.exp(log_q) * (log_p - log_q)
    return total


case("coupled_categories", "L3 L4", coupled_categories, CATEGORIES, coupled_categories_elbo)


# Control flow that turns a sampled value into a branch. `ppl.branch` is a Python `if` on a number
# taken out of the tensor in Pyro, and lax.cond in NumPyro.


def branching(ppl, init):
    """y comes after the branch and does not use z's tensor; still it depends on it."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        loc = ppl.branch(z, 1.7, -1.9)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def branching_states(p):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        yield log_q, bernoulli(z, -0.4) + normal(0.8, 1.7 if z else -1.9) - log_q


finite("branching", "L10 B16", branching, {"a": 0.7}, branching_states)


SWITCH = [1.7, -0.6, 0.4]


def switching(ppl, init):
    """Three branches: several counterfactual values, each its own way."""

    def model():
        k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
        loc = ppl.switch(k, SWITCH)
        ppl.sample("x", ppl.dist.Normal(loc, 0.7), obs=ppl.array(0.8))

    def guide():
        ppl.sample("k", ppl.dist.Categorical(logits=ppl.param("a", init)))

    return model, guide


def switching_states(p):
    log_q, log_p = categorical(p["a"]), categorical(np.array([0.2, -0.3, 0.4]))
    for k in range(3):
        yield log_q[k], log_p[k] + normal(0.8, SWITCH[k], 0.7) - log_q[k]


finite("switching", "L10 B16", switching, {"a": [0.6, -0.4, 0.1]}, switching_states)


def branching_guide(ppl, init):
    """The branch is in the guide: z2's parameters are chosen by z1's value."""

    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(2.5 * z1 - 0.6 * z2, 0.7), obs=ppl.array(1.9))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b = ppl.param("b", init)
        ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.branch(z1, b[1], b[0])))

    return model, guide


def branching_guide_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"][z1])
        log_p = bernoulli(z1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(1.9, 2.5 * z1 - 0.6 * z2, 0.7) - log_q


finite(
    "branching_guide",
    "L10 B16",
    branching_guide,
    {"a": 0.7, "b": [-1.1, 1.2]},
    branching_guide_states,
)


# A site that is there in one branch only. Pyro alone can say this.


def dynamic(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        loc = -0.9
        if z1.item():
            loc = 2.1 - 0.8 * ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(loc, 0.8), obs=ppl.array(1.2))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b = ppl.param("b", init)
        if z1.item():
            ppl.sample("z2", ppl.dist.Bernoulli(logits=b))

    return model, guide


def dynamic_states(p):
    log_q = bernoulli(0, p["a"])
    yield log_q, bernoulli(0, -0.4) + normal(1.2, -0.9, 0.8) - log_q
    for z2 in (0, 1):
        log_q = bernoulli(1, p["a"]) + bernoulli(z2, p["b"])
        log_p = bernoulli(1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(1.2, 2.1 - 0.8 * z2, 0.8) - log_q


finite("dynamic", "L10 B16", dynamic, {"a": 0.7, "b": -1.1}, dynamic_states)


# Time: a Markov guide, as `scan` in NumPyro and as a loop in Pyro.

TIME_X = np.array([1.2, -0.9, 0.7])


def over_time(ppl, init):
    def model():
        def step(z, x):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=0.9 * z - 0.3))
            ppl.sample("x", ppl.dist.Normal(1.8 * z - 0.4, 0.8), obs=x)
            return z

        ppl.scan(step, ppl.array(0.0), ppl.array(TIME_X))

    def guide():
        c = ppl.param("c", init)

        def step(z, logit):
            return ppl.sample("z", ppl.dist.Bernoulli(logits=logit + c * z))

        ppl.scan(step, ppl.array(0.0), ppl.param("a", init))

    return model, guide


def over_time_states(p):
    for state in bits(3):
        log_q = log_p = before = 0.0
        for t, z in enumerate(state):
            log_q = log_q + bernoulli(z, p["a"][t] + p["c"] * before)
            log_p = log_p + bernoulli(z, 0.9 * before - 0.3) + normal(TIME_X[t], 1.8 * z - 0.4, 0.8)
            before = z
        yield log_q, log_p - log_q


finite("over_time", "L3 B2", over_time, {"a": [0.7, -0.6, 0.9], "c": 1.6}, over_time_states)


# Independent elements in a plate: Rao-Blackwellisation leaves each its own cost.

LOCAL_X = np.array([1.1, -0.7, 0.4])


def local(ppl, init):
    def model():
        with ppl.plate("plate", 3):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            ppl.sample("x", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(LOCAL_X))

    def guide():
        with ppl.plate("plate", 3):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def local_costs(z, a):
    """The downstream cost of each element at z [3]."""
    return bernoulli(z, -0.4) + normal(LOCAL_X, 2 * z - 0.3) - bernoulli(z, a)


def local_states(p):
    for state in bits(3):
        z = np.array(state)
        yield bernoulli(z, p["a"]).sum(), local_costs(z, p["a"]).sum()


finite("local", "L3 B11", local, {"a": [0.7, -0.9, 1.4]}, local_states)


# Forty sites that have nothing to do with each other.


def many_local(ppl, init):
    def model():
        for i in range(40):
            z = ppl.sample(f"z_{i}", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            ppl.sample(f"x_{i}", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(0.9))

    def guide():
        a = ppl.param("a", init)
        for i in range(40):
            ppl.sample(f"z_{i}", ppl.dist.Bernoulli(logits=a[i]))

    return model, guide


def many_local_elbo(p):
    total = 0.0
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        f = bernoulli(z, -0.4) + normal(0.9, 2 * z - 0.3) - log_q
        total = total + (np.exp(log_q) * f).sum()
    return total


case("many_local", "B11", many_local, {"a": np.full(40, 0.7)}, many_local_elbo)


# Minibatches told apart by what they cost: no two pairs of BATCH_X have the same sum.

BATCH_X = np.array([0.3, 1.1, -2.3, 4.6, -8.2, 13.7])
BATCH_LOGIT = 0.8


def minibatch_local(ppl, init, slope=1.0):
    """Subsampling in model and guide. The guide is at the prior: only the data costs."""

    def model():
        with ppl.plate("data", 6, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(BATCH_LOGIT)))
            x = ppl.array(BATCH_X)[index]
            ppl.sample("x", ppl.dist.Normal(slope * z, 1.0), obs=x)

    def guide():
        with ppl.plate("data", 6, subsample_size=2):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def minibatch_global(ppl, init, slope=1.0):
    """Subsampling in the model only."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(BATCH_LOGIT)))
        with ppl.plate("data", 6, subsample_size=2) as index:
            x = ppl.array(BATCH_X)[index]
            ppl.sample("x", ppl.dist.Normal(slope * z, 1.0), obs=x)

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def minibatch_elbo(p):
    z_terms = 0.0
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        f = bernoulli(z, BATCH_LOGIT) - log_q + normal(BATCH_X, z).sum()
        z_terms = z_terms + np.exp(log_q) * f
    return z_terms


case("minibatch_global", "L9", minibatch_global, {"a": BATCH_LOGIT}, minibatch_elbo)
# at a = BATCH_LOGIT the six priors and entropies cancel one by one, as the single one does
case("minibatch_local", "L9", minibatch_local, {"a": BATCH_LOGIT}, minibatch_elbo)


def minibatch_sums(of):
    """3 (of_i + of_j) for every pair of data points."""
    return np.array([3.0 * (of[i] + of[j]) for i, j in combinations(range(6), 2)])


def minibatch_gradients():
    """∂loss/∂a by enumeration, for every minibatch: −p (1 − p) (f(1) − f(0))."""
    p = sigmoid(BATCH_LOGIT)
    return minibatch_sums(-p * (1 - p) * (BATCH_X - 0.5))


def minibatch_losses():
    """The loss for every minibatch where z does not act (slope 0)."""
    return minibatch_sums(-normal(BATCH_X, 0.0))


# One site and an argument that spoils the cost of a step.


def spoiled(ppl, init):
    def model(shift):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5 + shift, 1.0), obs=ppl.array(0.8))

    def guide(shift):
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def spoiled_states(p):
    yield from single_states({**p, "t": -0.4})


finite("spoiled", "L11", spoiled, {"a": 0.7}, spoiled_states)


# A latent of the model that the guide forgets.


def forgotten(ppl, init, infer=None):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        k = ppl.sample("z_forgotten", ppl.dist.Bernoulli(logits=0.6 - z), infer=infer or {})
        ppl.sample("x", ppl.dist.Normal(1.5 * z - k, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def forgotten_states(p):
    """With the forgotten site summed out."""
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        likelihood = sum(np.exp(bernoulli(k, 0.6 - z) + normal(0.8, 1.5 * z - k)) for k in (0, 1))
        yield log_q, bernoulli(z, -0.4) + np.log(likelihood) - log_q


finite("forgotten", "L12 B17", forgotten, {"a": 0.7}, forgotten_states)


# A guide site that asks to be enumerated, above one that is sampled.


def enumerated(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z1 - z2, 1.0), obs=ppl.array(0.8))

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=a), infer={"enumerate": "parallel"})
        ppl.sample("z2", ppl.dist.Bernoulli(logits=b[0] + b[1] * z1))

    return model, guide


def enumerated_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"][0] + p["b"][1] * z1)
        log_p = bernoulli(z1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(0.8, 1.5 * z1 - z2) - log_q


finite("enumerated", "L12", enumerated, {"a": 0.7, "b": [-1.1, 2.3]}, enumerated_states)


# The importance-weighted and Rényi bounds.


def bound(base: Case, particles: int, alpha: float) -> Case:
    """The case with E log[ (1/K) Σ_k exp((1−α) f_k) ] / (1−α) in place of E f.

    Its states are all K-tuples of states; f = log p − log q keeps its own dependence on the guide's
    parameters. α = 0 is the importance-weighted bound.
    """

    def table(theta: Params) -> tuple[Array, Array]:
        log_q, f = base.table(theta)
        tuples = np.indices([len(f)] * particles).reshape(particles, -1)
        inner = np.log(np.exp((1 - alpha) * f[tuples]).mean(0)) / (1 - alpha)
        return log_q[tuples].sum(0), inner

    name = f"{base.name}_bound_{particles}_{alpha}"
    return replace(base, name=name, table=table, elbo=lambda theta: expectation(*table(theta)))


def particles(base: Case, number: int) -> Case:
    """The same ELBO with the mean over `number` particles: its states are all tuples of states."""

    def table(theta: Params) -> tuple[Array, Array]:
        log_q, f = base.table(theta)
        tuples = np.indices([len(f)] * number).reshape(number, -1)
        return log_q[tuples].sum(0), f[tuples].mean(0)

    return replace(base, name=f"{base.name}_{number}", table=table)


def copies(base: Case, number: int) -> Case:
    """The case `number` times over in a plate: gradients are sums over independent copies."""

    def program(ppl: Any, init: Params) -> tuple[Callable[[], None], Callable[[], None]]:
        model, guide = base.program(ppl, init)

        def plated(inner: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                with ppl.plate("copies", number):
                    inner()

            return run

        return plated(model), plated(guide)

    def elbo(theta: Params) -> Array:
        return number * base.elbo(theta)

    return replace(base, name=f"{base.name}_copies", program=program, elbo=elbo, table=None)
