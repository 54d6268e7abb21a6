"""Mean and variance of each discrete estimator, integrated over its noise: the exact gradient to 1e-10."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from injected import (
    InjectedJax,
    InjectedTorch,
    cells,
    columns,
    grid,
    jax_gradients,
    legendre,
    moments,
    torch_gradients,
)

from ppl_estimators import (
    REBAR,
    RELAX,
    Constant,
    DisARM,
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    Reinforce,
    RELAXWithModel,
)
from ppl_estimators.numpyro import with_estimators

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]


def sigmoid(a):
    return 1 / (1 + np.exp(-np.asarray(a)))


# ---- one Bernoulli site, f = (b - t)^2: closed forms ----------------------------------------------------------------


def toy(t):
    """The cost is exactly (b - t)^2: prior and entropy are masked out, which leaves the score untouched."""

    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(logits=0.0))
        numpyro.factor("f", (b - t) ** 2)

    def guide():
        a = numpyro.param("a", 0.0)
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=a))

    return model, guide


def toy_torch(t):
    def model():
        with pyro.poutine.mask(mask=torch.tensor(False)):
            b = pyro.sample("b", pdist.Bernoulli(logits=torch.tensor(0.0)))
        pyro.factor("f", (b - t) ** 2)

    def guide(a):
        a = pyro.param("a", torch.tensor(a))
        with pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("b", pdist.Bernoulli(logits=a))

    return model, guide


def values(p, particles):
    """Every outcome of independent draws, and its probability."""
    outcomes = list(itertools.product([0.0, 1.0], repeat=particles))
    weights = np.array([np.prod([p if b else 1 - p for b in o]) for o in outcomes])
    return {"b": {"value": np.array(outcomes)}}, weights


def uniform_cells(p):
    u, w = cells(p, 1 - p)
    return {"b": {"u": u[:, None]}}, w


def closed_form_loo(p, delta, k):
    """Variance of leave-one-out with k particles: the U-statistic with kernel (f - f')(b - b') / 2."""
    q = 1 - p
    outcomes = list(itertools.product([0, 1], repeat=k))
    prob = np.array([np.prod([p if b else q for b in o]) for o in outcomes])
    stat = np.array([sum((b - np.mean(o)) * delta * (b - p) for b in o) / (k - 1) for o in outcomes])
    return prob @ stat**2 - (prob @ stat) ** 2


CASES = [(0.45, 0.5), (0.45, 0.3), (0.45, 0.1), (0.49, 0.3), (0.499, 0.9), (0.2, 0.7)]


@pytest.mark.parametrize(("t", "p"), CASES)
def test_closed_form_variances(t, p):
    a, q, f0, f1 = np.log(p / (1 - p)), 1 - p, t**2, (1 - t) ** 2
    delta = f1 - f0
    exact = p * q * delta
    model, guide = toy(t)
    c = 0.7
    rows = {
        "REINFORCE": (Reinforce(), *values(p, 1), p * q * (q * f1 + p * f0) ** 2),
        "constant": (Reinforce(Constant(c)), *values(p, 1), p * q * (q * f1 + p * f0 - c) ** 2),
        "best constant": (Reinforce(Constant(q * f1 + p * f0)), *values(p, 1), 0.0),
        "leave-one-out, 2": (Reinforce(LeaveOneOut()), *values(p, 2), p * q * delta**2 * (0.5 - p * q)),
        "leave-one-out, 3": (Reinforce(LeaveOneOut()), *values(p, 3), closed_form_loo(p, delta, 3)),
        "leave-one-out, 4": (Reinforce(LeaveOneOut()), *values(p, 4), closed_form_loo(p, delta, 4)),
        "DisARM": (DisARM(), *uniform_cells(p), p * q * delta**2 * (0.5 * max(p, q) - p * q)),
        "Enumerate": (Enumerate(), *values(p, 1), 0.0),
    }
    for name, (estimator, tables, weights, variance) in rows.items():
        particles = next(iter(tables["b"].values())).shape[1]
        elbo = InjectedJax({"b": estimator}, num_particles=particles)
        loss, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(a)}, tables)
        mean, var = moments(-gradient, weights)
        np.testing.assert_allclose(mean, exact, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(var, variance, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(weights @ loss, -(p * f1 + q * f0), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("estimator", [Reinforce(), Reinforce(Constant(0.7)), DisARM(), Enumerate()], ids=repr)
@pytest.mark.parametrize(("t", "p"), CASES[1:4])
def test_closed_form_variances_in_pyro(t, p, estimator):
    a, q, f0, f1 = np.log(p / (1 - p)), 1 - p, t**2, (1 - t) ** 2
    delta = f1 - f0
    variance = {
        Reinforce(): p * q * (q * f1 + p * f0) ** 2,
        Reinforce(Constant(0.7)): p * q * (q * f1 + p * f0 - 0.7) ** 2,
        DisARM(): p * q * delta**2 * (0.5 * max(p, q) - p * q),
        Enumerate(): 0.0,
    }[estimator]
    tables, weights = uniform_cells(p) if estimator == DisARM() else values(p, 1)
    model, guide = toy_torch(t)
    _, gradient = torch_gradients(InjectedTorch({"b": estimator}), model, lambda: guide(float(a)), {"a": 0}, tables)
    mean, var = moments(-gradient, weights)
    np.testing.assert_allclose(mean, p * q * delta, atol=1e-12)
    np.testing.assert_allclose(var, variance, atol=1e-12)


def test_optimal_constant_from_other_particles_is_unbiased_and_plug_in_would_not_be():
    t, p, k = 0.2, 0.7, 4
    tables, weights = values(p, k)
    model, guide = toy(t)
    elbo = InjectedJax({"b": Reinforce(OptimalConstant())}, num_particles=k)
    _, gradient = jax_gradients(elbo, model, guide, {"a": jnp.log(p / (1 - p))}, tables)
    f0, f1 = t**2, (1 - t) ** 2
    exact = p * (1 - p) * (f1 - f0)
    np.testing.assert_allclose(moments(-gradient, weights)[0], exact, atol=1e-12)
    b = tables["b"]["value"]
    f, s = np.where(b, f1, f0), b - p
    others = ((f * s**2).sum(1, keepdims=True) - f * s**2) / ((s**2).sum(1, keepdims=True) - s**2)
    np.testing.assert_allclose(-np.ravel(gradient), np.mean((f - others) * s, axis=1), atol=1e-12)
    plug_in = np.mean((f - (f * s**2).sum(1, keepdims=True) / (s**2).sum(1, keepdims=True)) * s, axis=1)
    assert abs(weights @ plug_in - exact) > 0.05 * abs(exact)


# ---- relaxations: Gauss-Legendre over u and v ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0.2, 0.9])
@pytest.mark.parametrize(
    "estimator", [REBAR(0.5), REBAR(1.0, scale=0.6), RELAX(0.7), RELAXWithModel(0.5, baseline=None)], ids=repr
)
def test_relaxed_estimators_integrate_to_the_exact_gradient(p, estimator):
    t = 0.3
    u, v = legendre(48, 1 - p), legendre(48)
    (us, vs), weights = grid(u, v)
    tables = {"b": {"u": us[:, None], "v": vs[:, None]}}
    model, guide = toy(t)
    guide = with_estimators(guide, {"b": estimator})
    rng = np.random.default_rng(0)
    kept = {
        "b$log_temperature": jnp.log(estimator.temperature),
        "b$log_scale": jnp.log(getattr(estimator, "scale", 1.0)),
        "b$control.w1": jnp.asarray(rng.normal(size=(2, 8))),
        "b$control.b1": jnp.asarray(rng.normal(size=8)),
        "b$control.w2": jnp.asarray(0.3 * rng.normal(size=(8, 1))),
        "b$control.b2": jnp.asarray([0.4]),
        "b$state": {"level_mean": jnp.asarray(0.3), "level_started": jnp.asarray(1.0)},
    }
    elbo = InjectedJax()
    a = jnp.log(p / (1 - p))
    _, gradient = jax_gradients(elbo, model, guide, {"a": a}, tables, **kept)
    mean, variance = moments(-gradient, weights)
    exact = p * (1 - p) * ((1 - t) ** 2 - t**2)
    np.testing.assert_allclose(mean, exact, atol=1e-10)
    assert variance[0] > 1e-6  # the integrand is not constant: the mean is a real integral


# ---- several dependent elements, chains ------------------------------------------------------------------------------


def cost(x, y):
    """Not linear in either argument, not separable."""
    return 1.3 * x - 0.7 * y + 2.1 * x * y + 0.4 * jnp.sin(3 * x + y)


def event_model():
    with numpyro.handlers.mask(mask=False):
        b = numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(2)).to_event(1))
    numpyro.factor("f", cost(b[..., 0], b[..., 1]))


def event_guide():
    a = numpyro.param("a", jnp.zeros(2))
    numpyro.sample("b", dist.Bernoulli(logits=a).to_event(1))


def chain_model():
    x = numpyro.sample("x", dist.Bernoulli(logits=0.3))
    y = numpyro.sample("y", dist.Bernoulli(logits=0.5 - x))
    numpyro.factor("f", cost(x, y))


def chain_guide():
    a = numpyro.param("a", jnp.zeros(3))
    x = numpyro.sample("x", dist.Bernoulli(logits=a[0]))
    numpyro.sample("y", dist.Bernoulli(logits=a[1] + a[2] * x))


def log_bernoulli(a, b):
    return b * a - jax.nn.softplus(a)


def event_exact(a):
    total = 0.0
    for x, y in itertools.product([0.0, 1.0], repeat=2):
        log_q = log_bernoulli(a[0], x) + log_bernoulli(a[1], y)
        total += jnp.exp(log_q) * (cost(x, y) - log_q)
    return total


def chain_exact(a):
    total = 0.0
    for x, y in itertools.product([0.0, 1.0], repeat=2):
        log_q = log_bernoulli(a[0], x) + log_bernoulli(a[1] + a[2] * x, y)
        log_p = log_bernoulli(0.3, x) + log_bernoulli(0.5 - x, y)
        total += jnp.exp(log_q) * (cost(x, y) + log_p - log_q)
    return total


event_slope, chain_slope = (jax.jit(jax.grad(f)) for f in (event_exact, chain_exact))


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), Reinforce()], ids=repr)
def test_dependent_elements_of_one_site(estimator):
    a = np.array([0.4, -0.9])
    p = sigmoid(a)
    if isinstance(estimator, DisARM):
        (u, v), weights = grid(*(cells(x, 1 - x) for x in p))
        tables = {"b": {"u": columns([u, v], 1, 2)}}
    else:
        (x, y), weights = grid(*(((np.array([0.0, 1.0])), np.array([1 - r, r])) for r in p))
        tables = {"b": {"value": columns([x, y], 1, 2)}}
    _, gradient = jax_gradients(InjectedJax({"b": estimator}), event_model, event_guide, {"a": a}, tables)
    np.testing.assert_allclose(moments(-gradient, weights)[0], event_slope(a), atol=1e-12)


A = np.array([0.4, -0.6, 1.1])
PX, PY = sigmoid(A[0]), sigmoid(A[1] + A[2] * np.array([0.0, 1.0]))
CHAIN = {"u": lambda p: cells(*p, *(1 - np.asarray(p)))}


@pytest.mark.parametrize(
    "estimators", [{"x": DisARM(), "y": DisARM()}, {"x": Enumerate(), "y": DisARM()}], ids=["DisARM", "mixed"]
)
def test_chain_reruns_what_is_downstream(estimators):
    """x moves y: a flipped x draws y again, from the same noise."""
    y = CHAIN["u"](PY)
    if isinstance(estimators["x"], DisARM):
        (u, v), weights = grid(CHAIN["u"]([PX]), y)
        tables = {"x": {"u": u[:, None]}, "y": {"u": v[:, None]}}
    else:
        (x, v), weights = grid((np.array([0.0, 1.0]), np.array([1 - PX, PX])), y)
        tables = {"x": {"value": x[:, None]}, "y": {"u": v[:, None]}}
    _, gradient = jax_gradients(InjectedJax(estimators), chain_model, chain_guide, {"a": A}, tables)
    np.testing.assert_allclose(moments(-gradient, weights)[0], chain_slope(A), atol=1e-12)


def test_moving_average_is_unbiased_at_every_step():
    """Over five steps of state: the baseline of a step is a function of the steps before it."""
    t, p = 0.3, 0.7
    model, guide = toy(t)
    guide = with_estimators(guide, {"b": Reinforce(MovingAverage(0.6))})
    elbo = InjectedJax()
    a = jnp.log(p / (1 - p))
    exact = p * (1 - p) * ((1 - t) ** 2 - t**2)
    costs = {0.0: t**2, 1.0: (1 - t) ** 2}

    @jax.jit
    def step(state, b):
        def loss(a):
            elbo.randomness.table = {"b": {"value": b[None]}}
            out = elbo.loss_with_mutable_state(jax.random.key(0), {"a": a, "b$state": state}, model, guide)
            return out["loss"], out["mutable_state"]["b$state"]

        return jax.grad(loss, has_aux=True)(a)

    start = {"mean": jnp.zeros(()), "started": jnp.zeros(())}
    branches = [(1.0, start, None)]
    for _ in range(5):
        mean, after = 0.0, []
        for weight, state, average in branches:
            for b, prob in ((0.0, 1 - p), (1.0, p)):
                gradient, new = step(state, jnp.asarray(b))
                expected = -(costs[b] - (0.0 if average is None else average)) * (b - p)
                np.testing.assert_allclose(gradient, expected, atol=1e-12)
                mean += weight * prob * -gradient
                now = costs[b] if average is None else 0.6 * average + 0.4 * costs[b]
                np.testing.assert_allclose(new["mean"], now, atol=1e-12)
                after.append((weight * prob, new, now))
        branches = after
        np.testing.assert_allclose(mean, exact, atol=1e-12)
