"""Any estimator under any bound: the exact mean over its noise is the gradient of the bound of K particles, which is
summed here over every K-tuple of states."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as td
import pytest
import torch
from injected import InjectedJax, cells, columns, grid, jax_gradients, legendre

from ppl_estimators import (
    ARMS,
    REBAR,
    RELAX,
    UGC,
    VIMCO,
    BitFlip,
    Constant,
    DisARM,
    Enumerate,
    ImportanceWeighted,
    LeaveOneOut,
    MeasureValued,
    Reinforce,
    RELAXWithModel,
    Renyi,
    Repeat,
    StochasticTriple,
    SumAndSample,
    UnorderedSet,
    WakeSleep,
)
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.testing import assert_unbiased, exact_gradient

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]


def sigmoid(a):
    return 1 / (1 + np.exp(-np.asarray(a)))


def bernoulli(a, b):
    return b * a - jax.nn.softplus(a)


def bound(log_q, log_w, k, alpha):
    """E Σ_e (1 − α)⁻¹ log 1/K Σ_k w_{k,e}^{1−α}, from log q ``[S]`` and log w ``[S, E]`` of every state."""
    states = np.array(list(itertools.product(range(log_q.shape[0]), repeat=k)))
    inner = jax.nn.logsumexp((1 - alpha) * log_w[states], axis=1) - jnp.log(k)
    return jnp.sum(jnp.exp(log_q[states].sum(1)) * inner.sum(-1)) / (1 - alpha)


@dataclass(frozen=True)
class Program:
    """``states(a, t)``: log q and log w of every state, by hand. ``widths``: for each site the probabilities that its
    uniform noise is compared with, an entry for each element; ``shape`` of its values."""

    model: Any
    guide: Any
    a: np.ndarray
    states: Any
    sites: dict[str, tuple[tuple[int, ...], list[list[float]]]]


# ---- one bit --------------------------------------------------------------------------------------------------------

T = 0.4  # a parameter of the model


def f(x, y, t):
    return 1.3 * x - 0.7 * y + t * 2.1 * x * y + 0.4 * jnp.sin(3 * x + y)


def single():
    def model():
        z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
        numpyro.factor("f", f(z, 0.5, numpyro.param("t", T)))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.zeros(1))[0]))

    def states(a, t):
        z = np.array([0.0, 1.0])
        log_q = bernoulli(a[0], z)
        return log_q, (bernoulli(0.3, z) + f(z, 0.5, t) - log_q)[:, None]

    a = np.array([-0.7])
    return Program(model, guide, a, states, {"z": ((), [[sigmoid(a[0])]])})


# ---- two dependent bits ---------------------------------------------------------------------------------------------


def chain():
    def model():
        x = numpyro.sample("x", dist.Bernoulli(logits=0.3))
        y = numpyro.sample("y", dist.Bernoulli(logits=0.5 - x))
        numpyro.factor("f", f(x, y, numpyro.param("t", T)))

    def guide():
        a = numpyro.param("a", jnp.zeros(3))
        x = numpyro.sample("x", dist.Bernoulli(logits=a[0]))
        numpyro.sample("y", dist.Bernoulli(logits=a[1] + a[2] * x))

    def states(a, t):
        x, y = np.array(list(itertools.product([0.0, 1.0], repeat=2))).T
        log_q = bernoulli(a[0], x) + bernoulli(a[1] + a[2] * x, y)
        return log_q, (bernoulli(0.3, x) + bernoulli(0.5 - x, y) + f(x, y, t) - log_q)[:, None]

    a = np.array([0.4, -0.6, 1.1])
    return Program(model, guide, a, states, {
        "x": ((), [[sigmoid(a[0])]]), "y": ((), [list(sigmoid(a[1] + a[2] * np.array([0.0, 1.0])))]),
    })  # fmt: skip


# ---- two bits beside each other, which one cost sees and another does not --------------------------------------------


def pair():
    def model():
        x = numpyro.sample("x", dist.Bernoulli(logits=0.3))
        y = numpyro.sample("y", dist.Bernoulli(logits=-0.5))
        numpyro.factor("f", f(x, y, numpyro.param("t", T)))
        numpyro.factor("g", -1.1 * x)

    def guide():
        a = numpyro.param("a", jnp.zeros(2))
        numpyro.sample("x", dist.Bernoulli(logits=a[0]))
        numpyro.sample("y", dist.Bernoulli(logits=a[1]))

    def states(a, t):
        x, y = np.array(list(itertools.product([0.0, 1.0], repeat=2))).T
        log_q = bernoulli(a[0], x) + bernoulli(a[1], y)
        log_p = bernoulli(0.3, x) + bernoulli(-0.5, y)
        return log_q, (log_p + f(x, y, t) - 1.1 * x - log_q)[:, None]

    a = np.array([0.4, -0.6])
    return Program(model, guide, a, states, {"x": ((), [[sigmoid(a[0])]]), "y": ((), [[sigmoid(a[1])]])})


# ---- plates ---------------------------------------------------------------------------------------------------------


def plated(subsample=None, prior=0.0):
    """A bit for each datum, all terms inside: a bound for each. ``prior``: of a parameter, and in another plate, which
    no latent moves."""
    size, n = (2, 2) if subsample is None else (4, subsample)
    data = np.array([0.2, 0.9]) if subsample is None else np.full(4, 0.7)

    def model():
        with numpyro.plate("data", size, subsample_size=n) as i:
            z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
            numpyro.factor("f", f(z, jnp.asarray(data)[i], numpyro.param("t", T)))
        if prior:
            numpyro.factor("prior", prior * numpyro.param("t", T) ** 2)
            with numpyro.plate("more", 4, subsample_size=2, dim=-2):
                numpyro.factor("other", jnp.full((2, 1), prior * jnp.sin(numpyro.param("t", T))))

    def guide():
        a = numpyro.param("a", jnp.zeros(2))
        with numpyro.plate("data", size, subsample_size=n):
            numpyro.sample("z", dist.Bernoulli(logits=a))

    def states(a, t):
        z = np.array(list(itertools.product([0.0, 1.0], repeat=2)))
        each, aside = bernoulli(a, z), prior * (t**2 + 4 * jnp.sin(t)) / 4
        return each.sum(1), bernoulli(0.3, z) + f(z, data[:2], t) - each + aside

    a = np.array([0.5, -0.4])
    return Program(model, guide, a, states, {"z": ((2,), [[p] for p in sigmoid(a)])})


def nested():
    """Bits in an inner plate, and one in the outer: that is common to all terms, the inner one is not."""
    heights, tilt = np.array([[0.1, 0.5], [0.9, 0.3]]), np.array([0.3, -0.6])

    def model():
        with numpyro.plate("outer", 2, dim=-1):
            y = numpyro.sample("y", dist.Bernoulli(logits=tilt))
            numpyro.factor("g", tilt * y)
            with numpyro.plate("inner", 2, dim=-2):
                z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
                numpyro.factor("f", f(z, heights, numpyro.param("t", T)))

    def guide():
        a = numpyro.param("a", jnp.zeros(6))
        with numpyro.plate("outer", 2, dim=-1):
            numpyro.sample("y", dist.Bernoulli(logits=a[4:]))
            with numpyro.plate("inner", 2, dim=-2):
                numpyro.sample("z", dist.Bernoulli(logits=a[:4].reshape(2, 2)))

    def states(a, t):
        bits = np.array(list(itertools.product([0.0, 1.0], repeat=6)))
        z, y = bits[:, :4].reshape(-1, 2, 2), bits[:, 4:]
        each, above = bernoulli(a[:4].reshape(2, 2), z), bernoulli(a[4:], y)
        w = (bernoulli(0.3, z) + f(z, heights, t) - each).sum(1) + bernoulli(tilt, y) + tilt * y - above
        return each.sum((1, 2)) + above.sum(1), w

    a = np.array([0.5, -0.4, 0.2, 0.8, -0.3, 0.6])
    p = [[x] for x in sigmoid(a)]
    return Program(model, guide, a, states, {"z": ((2, 2), p[:4]), "y": ((2,), p[4:])})


PROGRAMS = {
    "single": single(), "chain": chain(), "pair": pair(), "plate": plated(), "subsampled": plated(2),
    "nested": nested(), "beside": plated(2, -0.5),
}  # fmt: skip


def tables_of(program, estimators, k):
    """Every cell of the noise of each site in K particles, and their probabilities."""
    labels, axes = {}, []
    for site, (_, elements) in program.sites.items():
        antithetic = estimators.get(site, estimators.get("*")) == DisARM()
        labels[site] = "u" if antithetic else "value"
        for p in elements * k:
            axes.append(cells(*p, *(1 - np.asarray(p))) if antithetic else (np.arange(2.0), np.array([1 - p[0], p[0]])))
    found, weights = grid(*axes)
    tables, start = {}, 0
    for site, (shape, elements) in program.sites.items():
        stop = start + k * len(elements)
        tables[site], start = {labels[site]: columns(found[start:stop], k, *shape)}, stop
    return tables, weights


def check(name, estimators, k, objective, noise=None, atol=1e-11, **options):
    program = PROGRAMS[name]
    tables, weights = noise or tables_of(program, estimators, k)
    guide = with_estimators(program.guide, estimators)
    params = {"a": jnp.asarray(program.a), "t": jnp.asarray(T)}
    elbo, kept = InjectedJax(num_particles=k, objective=objective, **options), moved(guide)
    loss, gradient = jax_gradients(elbo, program.model, guide, params, tables, **kept)

    def exact(p):
        log_q, log_w = program.states(p["a"], p["t"])
        return -bound(log_q, log_w, k, objective.alpha)

    scale = 2.0 if name in ("subsampled", "beside") else 1.0
    value, slope = jax.jit(jax.value_and_grad(exact))(params)
    np.testing.assert_allclose(weights @ loss, scale * value, atol=atol)
    wanted = scale * np.concatenate([np.ravel(slope[k]) for k in sorted(slope)])
    np.testing.assert_allclose(weights @ gradient, wanted, atol=atol)
    return weights @ (gradient - wanted) ** 2


def moved(guide):
    """What the hook declares, away from its start, where much of it is zero."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    kept = {k: s["value"] for k, s in trace.items() if "$" in k}
    return {k: v if isinstance(v, dict) else v + 0.3 * jnp.cos(1.0 + jnp.arange(v.size)).reshape(v.shape)
            for k, v in kept.items()}  # fmt: skip


IW = ImportanceWeighted()
CELLS = [
    ("single", {"z": DisARM()}, 3, Renyi(0.5)),
    ("single", {"z": Enumerate()}, 3, Renyi(-1.0)),
    ("single", {"z": Reinforce(Constant(0.7))}, 5, Renyi(2.0)),
    ("single", {"z": Enumerate()}, 5, IW),
    ("chain", {"x": DisARM(), "y": DisARM()}, 2, IW),
    ("chain", {"x": Reinforce(VIMCO()), "y": DisARM()}, 3, IW),
    ("chain", {"x": Enumerate(), "y": DisARM()}, 2, Renyi(0.5)),
    ("pair", {"*": DisARM()}, 2, IW),
    ("pair", {"x": DisARM(), "y": Enumerate()}, 2, Renyi(0.5)),
    ("pair", {"x": Enumerate(), "y": Reinforce(LeaveOneOut())}, 3, IW),
    ("pair", {"x": Reinforce(LeaveOneOut()), "y": Enumerate()}, 5, Renyi(-0.5)),
    ("pair", {"x": Reinforce(VIMCO()), "y": Reinforce(VIMCO("arithmetic"))}, 3, Renyi(0.5)),
    ("plate", {"z": DisARM()}, 2, IW),
    ("plate", {"z": Enumerate()}, 3, Renyi(0.5)),
    ("plate", {"z": Reinforce(LeaveOneOut())}, 5, IW),
    ("subsampled", {"z": DisARM()}, 2, Renyi(0.5)),
    ("subsampled", {"z": Enumerate()}, 3, IW),
    ("nested", {"z": Enumerate(), "y": Reinforce(LeaveOneOut())}, 2, Renyi(0.5)),
    ("beside", {"z": Enumerate()}, 2, Renyi(0.5)),
]


@pytest.mark.parametrize(("name", "estimators", "k", "objective"), CELLS, ids=str)
def test_any_estimator_under_any_bound(name, estimators, k, objective):
    check(name, estimators, k, objective)


AVERAGED = [
    ("chain", {"x": Enumerate(), "y": DisARM()}, 2, Renyi(0.5)),
    ("plate", {"z": Enumerate()}, 3, Renyi(2.0)),
    ("beside", {"z": DisARM()}, 2, Renyi(-0.5)),
    ("nested", {"*": Enumerate()}, 2, IW),
]


@pytest.mark.parametrize(("name", "estimators", "k", "objective"), AVERAGED, ids=str)
def test_the_models_own_gradient_averaged_under_a_bound(name, estimators, k, objective):
    check(name, estimators, k, objective, average_model=True)


def test_that_average_has_less_variance():
    """Of the model's parameter, the last."""
    averaged, plain = (check("pair", {"*": DisARM()}, 2, IW, average_model=yes) for yes in (True, False))
    assert averaged[-1] < 0.95 * plain[-1]


@pytest.mark.parametrize(
    ("estimator", "objective"),
    [(REBAR(0.8, scale=0.7), IW), (RELAXWithModel(1.2, hidden=2), Renyi(0.5))],
    ids=str,
)
def test_relaxed_values_under_a_bound(estimator, objective):
    nodes = [legendre(11, 1 - sigmoid(-0.7)), legendre(11)] * 2
    (u1, v1, u2, v2), weights = grid(*nodes)
    noise = {"z": {"u": np.stack([u1, u2], -1), "v": np.stack([v1, v2], -1)}}, weights
    check("single", {"z": estimator}, 2, objective, noise, atol=1e-6)


@pytest.mark.parametrize("name", ["pair", "plate"])
def test_wake_phases(name):
    """Every term by hand: Σ_k w̃_k ∇ log p for the model, Σ_k w̃_k ∇ log q for the guide."""
    program, k = PROGRAMS[name], 2
    estimators = {n: Reinforce(LeaveOneOut()) for n in program.sites}
    tables, weights = tables_of(program, estimators, k)
    elbo = InjectedJax(estimators, num_particles=k, objective=WakeSleep(wake_theta=2.0, wake_phi=0.5))
    params = {"a": jnp.asarray(program.a), "t": jnp.asarray(T)}
    _, gradient = jax_gradients(elbo, program.model, program.guide, params, tables)
    bits = np.array(list(itertools.product([0.0, 1.0], repeat=2)))

    def surrogate(p):
        log_q, log_w = program.states(p["a"], p["t"])
        each = bernoulli(p["a"], bits) if name == "plate" else log_q[:, None]
        tuples = np.array(list(itertools.product(range(4), repeat=k)))
        share = jnp.exp(log_q[tuples].sum(1))[:, None, None] * jax.nn.softmax(log_w[tuples], 1)
        return -jnp.sum(jax.lax.stop_gradient(share) * (2.0 * (log_w + each)[tuples] + 0.5 * each[tuples]))

    slope = jax.jit(jax.grad(surrogate))(params)
    np.testing.assert_allclose(weights @ gradient, np.concatenate([np.ravel(slope[n]) for n in "at"]), atol=1e-11)


@pytest.mark.parametrize("estimator", [Enumerate(), UnorderedSet(3), StochasticTriple()], ids=repr)
def test_a_particle_without_weight(estimator):
    """Values of probability zero among drawn ones and alternatives: nothing is −∞ less −∞."""
    a = jnp.array([0.3, -0.2, 0.5])
    log_p = jnp.array([-1.0, 0.4, -jnp.inf])

    def model():
        z = numpyro.sample("z", dist.Categorical(logits=jnp.zeros(3)))
        numpyro.factor("f", log_p[z])

    def guide():
        numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", a)))

    def at(k, v, log_w):  # the bound with one particle elsewhere
        return jax.nn.logsumexp(log_w[jnp.asarray(z).at[k].set(v)])

    z, options = np.array([2, 0, 1]), {"num_particles": 3, "objective": ImportanceWeighted()}
    elbo = InjectedJax({"z": estimator}, **options)
    half, u = 0.5 * np.ones((1, 3)), 0.1 + 0.8 * np.eye(3)[[2, 0, 1]]
    noise = {"value": np.array([[2, 0, 1]]), "u": u[None], "which": half, "side": half}
    _, found = jax_gradients(elbo, model, guide, {"a": a}, {"z": noise})
    assert np.isfinite(found).all()
    if estimator == StochasticTriple():
        return

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def slope(a, average):
        q, log_w = jax.nn.softmax(a), jnp.log(1 / 3) + log_p - jax.nn.log_softmax(a)
        weights = jnp.exp(log_w[z] - jax.nn.logsumexp(log_w[z]))
        total = jnp.sum(jax.lax.stop_gradient(weights) * -jax.nn.log_softmax(a)[z])
        there = jnp.stack([jnp.stack([at(k, v, log_w) for v in range(3)]) for k in range(3)])
        if average:
            total = jnp.sum(jax.lax.stop_gradient(q) * there) / 3
        # every value of one particle, those of the others held
        return -total - jnp.sum(jax.lax.stop_gradient(there) * q)

    np.testing.assert_allclose(found[0], slope(a, False), atol=1e-12)
    averaged = InjectedJax({"z": estimator}, average_model=True, **options)
    _, found = jax_gradients(averaged, model, guide, {"a": a}, {"z": noise})
    np.testing.assert_allclose(found[0], slope(a, True), atol=1e-12)


def test_exact_gradient_knows_what_no_latent_moves():
    """In both libraries: such a term adds to the bound, and the plates without it are common."""
    program, pyro_t = PROGRAMS["beside"], torch.tensor(T)

    def model():
        t = pyro.param("t", pyro_t)
        with pyro.plate("data", 4, subsample_size=2):
            z = pyro.sample("z", td.Bernoulli(logits=0.3))
            pyro.factor("f", 1.3 * z - 0.49 + t * 1.47 * z + 0.4 * torch.sin(3 * z + 0.7))
        pyro.factor("prior", -0.5 * t**2)
        with pyro.plate("more", 4, subsample_size=2, dim=-2):
            pyro.factor("other", -0.5 * torch.sin(t) * torch.ones(2, 1))

    def guide():
        a = pyro.param("a", torch.tensor(program.a))
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", td.Bernoulli(logits=a))

    def exact(p):
        return -2 * bound(*program.states(p["a"], p["t"]), 2, 0.0)

    wanted = jax.jit(jax.grad(exact))({"a": jnp.asarray(program.a), "t": jnp.asarray(T)})
    one = {"data": [[0, 1]], "more": [[0, 1]]}
    options = {"objective": IW, "num_particles": 2, "minibatches": one}
    for found in (
        exact_gradient(program.model, program.guide, params={"a": jnp.asarray(program.a)}, **options).gradient,
        exact_gradient(model, guide, **options).gradient,
    ):
        for name in "at":
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-12)


@pytest.mark.slow
def test_the_rest_of_the_catalogue_under_a_bound():
    """Nine estimators in one program, which one cost couples, by many draws: each has its own parameter."""
    chosen = {
        "c0": UnorderedSet(2), "c1": SumAndSample(1), "c2": StochasticTriple(), "b0": ARMS(3), "b1": UGC(),
        "b2": BitFlip(1), "b3": RELAX(), "b4": Repeat(2, DisARM()), "b5": MeasureValued(),
    }  # fmt: skip
    a = jnp.array([0.4, -0.6, 0.9, -0.3, 0.5, -0.8, 0.7, 0.2, -0.5])

    def law(name, a, lib=dist):
        if name[0] == "b":
            return lib.Bernoulli(logits=a)
        return lib.Categorical(logits=a * jnp.array([1.0, -0.5, 0.3]))

    def cost(values):
        sign = [1.0, -1.2, 0.8, -0.9, 1.1, 0.7, -1.0, 0.9, -0.8]
        total = sum(s * v for s, v in zip(sign, values, strict=True))
        return total + 0.5 * jnp.sin(total)

    def model():
        values = [numpyro.sample(n, law(n, 0.3)) for n in chosen]
        numpyro.factor("f", cost(values))

    def guide():
        a = numpyro.param("a", jnp.zeros(9))
        for i, n in enumerate(chosen):
            numpyro.sample(n, law(n, a[i]))

    states = np.array(list(itertools.product(*[range(3) if n[0] == "c" else range(2) for n in chosen]))).T

    def exact(a):
        log_q, log_p = (sum(law(n, x[i]).log_prob(states[i]) for i, n in enumerate(chosen)) for x in (a, [0.3] * 9))
        log_w, q = log_p + cost(list(states)) - log_q, jnp.exp(log_q)
        return -q @ (jnp.logaddexp(log_w[:, None], log_w) - jnp.log(2)) @ q

    elbo, point = EstimatorELBO(num_particles=2, objective=IW), {"a": a}
    reference = {"a": jax.grad(exact)(a)}
    assert_unbiased(elbo, model, with_estimators(guide, chosen), params=point, reference=reference, max_draws=10**6)
