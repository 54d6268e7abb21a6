"""Estimators that look at slopes of the cost, summed over every outcome: exact, whatever they have learned."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import FromTableJax, InjectedJax, jax_gradients

from ppl_estimators import NVIL, DeltaMethod, DoubleControlVariate, LeaveOneOut, MuProp, PastSteps, Reinforce, Stein
from ppl_estimators.numpyro import OneHotCategorical, with_estimators

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

LOGITS = np.array([0.7, -1.1, 0.4])
WEIGHTS = np.array([1.0, -2.0, 0.7])


def cost(b):
    """Not linear in any bit, and no sum over bits; smooth, with slopes at 0 and 1 of its own."""
    return np.sin(2.0 * b @ WEIGHTS) + 0.8 * b[..., 0] * b[..., 1] ** 2 - 3.0


def jax_cost(b):
    return jnp.sin(2.0 * b @ WEIGHTS) + 0.8 * b[..., 0] * b[..., 1] ** 2 - 3.0


def binary(estimator):
    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(3)).to_event(1))
        numpyro.factor("f", jax_cost(b))

    def guide():
        a = numpyro.param("a", jnp.asarray(LOGITS))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=a).to_event(1))

    return model, with_estimators(guide, {"b": estimator})


STATES = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
P = 1 / (1 + np.exp(-LOGITS))
PROBABILITY = np.prod(np.where(STATES == 1, P, 1 - P), axis=-1)


def outcomes(particles):
    """Every outcome of independent particles, and its probability."""
    index = np.array(list(itertools.product(range(8), repeat=particles)))
    return {"b": {"value": STATES[index]}}, PROBABILITY[index].prod(-1)


def measured(estimator, particles, change, program=binary, tables=None, start=None):
    """Exact mean and variance of −∇_a, with what the estimator keeps changed by ``change``."""
    model, guide = program(estimator)
    tables, weights = outcomes(particles) if tables is None else tables
    elbo = InjectedJax({"b": estimator}, num_particles=particles)
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(guide).get_trace()
    kept = {k: jnp.asarray(s["value"], float) for k, s in trace.items() if s["type"] == "param" and k != "a"}
    state = {k: s["value"] for k, s in trace.items() if s["type"] == "mutable"}
    kept = {k: change(k, v) for k, v in kept.items()}
    _, gradients = jax_gradients(
        elbo, model, guide, {"a": jnp.asarray(LOGITS if start is None else start)}, tables, **kept, **state
    )
    mean = weights @ -gradients
    return mean, weights @ (-gradients - mean) ** 2


def as_declared(name, value):
    return value


def randomised(name, value):
    """Any network is as good as another for the mean: here one far from zero."""
    return value + 0.8 * jax.random.normal(jax.random.key(len(name) + value.size), value.shape)


EXACT = (
    P
    * (1 - P)
    * np.array(
        [
            sum(
                pr / np.where(s[i] == 1, P[i], 1 - P[i]) * (1 if s[i] else -1) * cost(s)
                for s, pr in zip(STATES, PROBABILITY, strict=True)
            )
            for i in range(3)
        ]
    )
)

ROWS = [
    (MuProp(), 1, as_declared),
    (MuProp(LeaveOneOut()), 2, as_declared),
    (DoubleControlVariate(), 2, as_declared),
    (DoubleControlVariate(-0.6), 2, as_declared),
    (DoubleControlVariate(1.3), 3, as_declared),
    (Stein(hidden=3), 2, as_declared),
    (Stein(hidden=3), 2, randomised),
    (Stein(hidden=3), 3, randomised),
]


@pytest.mark.parametrize(("estimator", "particles", "change"), ROWS, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_mean_is_the_gradient(estimator, particles, change):
    mean, variance = measured(estimator, particles, change)
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)
    assert (variance > 1e-4).all()


def test_what_starts_as_leave_one_out_is_leave_one_out():
    _, expected = measured(Reinforce(LeaveOneOut()), 2, as_declared)
    for estimator in (DoubleControlVariate(), Stein()):
        np.testing.assert_allclose(measured(estimator, 2, as_declared)[1], expected, rtol=1e-12)


def test_a_linear_cost_has_no_variance_left(monkeypatch):
    """α = −1 takes a linear cost away altogether, and so does MuProp's expansion."""
    monkeypatch.setitem(globals(), "jax_cost", lambda b: b @ WEIGHTS)
    for estimator, particles in ((DoubleControlVariate(-1.0), 2), (MuProp(), 1)):
        mean, variance = measured(estimator, particles, as_declared)
        np.testing.assert_allclose(mean, P * (1 - P) * WEIGHTS, atol=1e-12)
        np.testing.assert_allclose(variance, 0.0, atol=1e-12)


def test_double_control_variate_learns_a_lower_variance():
    """The auxiliary objective leads from leave-one-out to a coefficient with a lower variance."""
    model, guide = binary(DoubleControlVariate())
    elbo = InjectedJax({"b": DoubleControlVariate()}, num_particles=2)
    tables, weights = outcomes(2)
    _, slope = jax_gradients(elbo, model, guide, {"b$coefficient": jnp.asarray(0.0)}, tables, a=jnp.asarray(LOGITS))
    slope = (weights @ slope).item()
    before = measured(DoubleControlVariate(), 2, as_declared)[1].sum()
    after = measured(DoubleControlVariate(-0.05 * slope), 2, as_declared)[1].sum()
    assert after < before
    ahead = measured(DoubleControlVariate(1e-4), 2, as_declared)[1].sum()
    np.testing.assert_allclose(slope, (ahead - before) / 1e-4, rtol=1e-2)


def test_a_coefficient_of_the_same_draw_would_be_seen():
    """Built wrong on purpose: the slope of its own draw in place of the others' is biased, and these sums see it."""
    states = list(itertools.product(range(8), repeat=2))
    slopes = np.asarray(jax.vmap(jax.grad(jax_cost))(jnp.asarray(STATES)))
    wrong = np.zeros(3)
    for i, j in states:
        for k, other in ((i, j), (j, i)):
            s, s_other = STATES[k] - P, STATES[other] - P
            c, c_other = slopes[k] @ s, slopes[other] @ s_other
            signal = cost(STATES[k]) - c - cost(STATES[other]) + c_other
            term = signal * s + slopes[k] * P * (1 - P)
            wrong += 0.5 * PROBABILITY[i] * PROBABILITY[j] * term
    assert np.abs(wrong - EXACT).max() > 0.05


# ---- two one-hot sites of four categories -------------------------------------------------------------------------

ONE_HOT_LOGITS = np.array([[0.3, -0.8, 0.9, 0.1], [-0.4, 0.6, 0.2, -1.0]])


def one_hot(estimator):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))

    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", OneHotCategorical(logits=jnp.zeros((2, 4))).to_event(1))
        numpyro.factor("f", jnp.exp(0.5 * b[0] @ matrix @ b[1]) - 2.0)

    def guide():
        a = numpyro.param("a", jnp.asarray(ONE_HOT_LOGITS))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", OneHotCategorical(logits=a).to_event(1))

    return model, with_estimators(guide, {"b": estimator})


@pytest.mark.parametrize(("estimator", "particles"), [(MuProp(), 1), (DoubleControlVariate(-0.4), 2)], ids=repr)
def test_one_hot_sites(estimator, particles):
    p = np.exp(ONE_HOT_LOGITS) / np.exp(ONE_HOT_LOGITS).sum(-1, keepdims=True)
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    eye, weight = np.eye(4), p[0][pairs[:, 0]] * p[1][pairs[:, 1]]
    index = np.array(list(itertools.product(range(16), repeat=particles)))
    tables = {"b": {"value": eye[pairs[index]]}}, weight[index].prod(-1)
    mean, _ = measured(estimator, particles, as_declared, one_hot, tables, ONE_HOT_LOGITS)

    matrix = np.random.default_rng(0).normal(size=(4, 4))
    f = np.exp(0.5 * matrix) - 2.0
    rows, columns = f @ p[1], f.T @ p[0]
    exact = np.stack([p[0] * (rows - p[0] @ rows), p[1] * (columns - p[1] @ columns)])
    np.testing.assert_allclose(mean, exact.ravel(), atol=1e-12)


# ---- NVIL: the gradient times a number that the past decides ------------------------------------------------------


def test_nvil_is_scaled_by_the_past():
    model, guide = binary(NVIL(hidden=3))
    elbo = InjectedJax({"b": NVIL(hidden=3)})
    tables, weights = outcomes(1)
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(guide).get_trace()
    kept = {k: s["value"] for k, s in trace.items() if s["type"] in ("param", "mutable") and k != "a"}
    for variance, norm in ((0.3, 1.0), (9.0, 3.0)):
        kept["b$state"] = {**kept["b$state"], "variance": jnp.asarray(variance), "0_mean": jnp.asarray(-2.0)}
        _, gradients = jax_gradients(elbo, model, guide, {"a": jnp.asarray(LOGITS)}, tables, **kept)
        np.testing.assert_allclose(weights @ -gradients, EXACT / norm, atol=1e-12)


# ---- the delta method ---------------------------------------------------------------------------------------------


def gaussian(estimator, quadratic=False):
    def model():
        with numpyro.handlers.mask(mask=False):
            z = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.factor("f", 0.5 * z**2 - z if quadratic else jnp.sin(0.5 * z) + 0.05 * jnp.abs(z) - 3.0)

    def guide():
        a = numpyro.param("a", jnp.asarray([0.3, -0.2]))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Normal(a[0], jnp.exp(a[1])))

    return model, with_estimators(guide, {"b": estimator})


class SignedSource(FromTableJax):
    """The sign of the secant is read from the table too."""

    def noise(self, names, label, noise, keys, step=None):
        return jnp.stack([jnp.asarray(self.table[name][label])[self.row] for name in names])


class Signed(InjectedJax):
    source = SignedSource


def of_gaussian(estimator, a=(0.3, -0.2), *, quadratic=False, **state):
    """Exact mean and variance over the standard noise (split at the kink) and both signs."""
    edge = -a[0] / np.exp(a[1])
    x, w = np.polynomial.legendre.leggauss(120)
    parts = [(-9.0, edge), (edge, 9.0)]
    nodes = np.concatenate([low + (high - low) * (x + 1) / 2 for low, high in parts])
    weights = (
        np.concatenate([(high - low) * w / 2 for low, high in parts]) * np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi)
    )
    values, signs = np.meshgrid(nodes, [0.2, 0.8], indexing="ij")
    weights = np.repeat(weights, 2) / 2
    model, guide = gaussian(estimator, quadratic)
    elbo = Signed({"b": estimator})
    tables = {"b": {"value": values.reshape(-1, 1), "sign": signs.reshape(-1, 1)}}
    _, gradients = jax_gradients(elbo, model, guide, {"a": jnp.asarray(a)}, tables, **state)
    mean = weights @ -gradients
    return mean, weights @ (-gradients - mean) ** 2


def past(f, h, fh, hh):
    moments = {"weight": 1.0, "f": f, "h": h, "fh": fh, "hh": hh}
    return {"b$state": {k: jnp.asarray(v) for k, v in moments.items()}}


def test_delta_method_is_unbiased_and_quieter():
    exact, plain = of_gaussian(Reinforce())
    for a in (0.0, 0.8, 1.7):  # coefficients that the past may have left
        mean, _ = of_gaussian(DeltaMethod(PastSteps(0.9)), **past(0.0, 0.0, a, 1.0))
        np.testing.assert_allclose(mean, exact, atol=1e-10)
    quiet = of_gaussian(DeltaMethod(PastSteps(0.9)), **past(0.0, 0.0, 0.8, 1.0))[1]
    assert (quiet < 0.3 * plain).all()


def test_delta_method_leaves_nothing_of_a_quadratic():
    mean, variance = of_gaussian(DeltaMethod(PastSteps(0.9)), quadratic=True, **past(0.0, 0.0, 1.0, 1.0))
    mu, sigma = 0.3, np.exp(-0.2)
    np.testing.assert_allclose(mean, [mu - 1.0, sigma**2], atol=1e-10)
    np.testing.assert_allclose(variance, 0.0, atol=1e-10)
