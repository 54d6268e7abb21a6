"""Estimators whose value carries a gradient of its own: exact over the noise where they are unbiased, and a measured
bias of known sign and size where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, cells, columns, grid, jax_gradients, legendre, moments

from ppl_estimators import (
    GappedStraightThrough,
    GumbelSoftmax,
    GumbelStraightThrough,
    RaoGumbel,
    ReinMax,
    StraightThrough,
)
from ppl_estimators.numpyro import OneHotCategorical

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]


def sigmoid(a):
    return 1 / (1 + np.exp(-np.asarray(a)))


def bernoulli(f):
    """The cost is exactly f(b): prior and entropy are masked out."""

    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(logits=0.0))
        numpyro.factor("f", f(b))

    def guide():
        a = numpyro.param("a", 0.0)
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=a))

    return model, guide


def over_noise(estimator, f, a):
    """Mean and variance of the gradient of f(b) in the logit, integrated over u (and over v for RaoGumbel)."""
    p = sigmoid(a)
    rows = estimator.r if isinstance(estimator, RaoGumbel) else 0
    axes, weights = grid(legendre(60 if rows < 2 else 20, 1 - p), *[legendre(60 if rows < 2 else 20)] * rows)
    tables = {"b": {label: x[:, None] for label, x in zip(["u", "v0", "v1"], axes, strict=False)}}
    _, gradient = jax_gradients(InjectedJax({"b": estimator}), *bernoulli(f), {"a": jnp.asarray(a)}, tables)
    mean, variance = moments(-gradient, weights)
    return mean[0], variance[0]


def linear(b):
    return 1.7 * b


def square(b):
    return (b - 0.3) ** 2


def wave(b):
    return jnp.sin(2 * b + 0.4)


def exact(f, a):
    return sigmoid(a) * sigmoid(-a) * float(f(1.0) - f(0.0))


LOGITS = [0.0, 0.9, -1.4]


@pytest.mark.parametrize("a", LOGITS)
def test_straight_through_is_exact_for_linear_cost_and_biased_by_pq_times_2p_minus_1_for_a_square(a):
    p = sigmoid(a)
    np.testing.assert_allclose(over_noise(StraightThrough(), linear, a)[0], exact(linear, a), atol=1e-10)
    bias = over_noise(StraightThrough(), square, a)[0] - exact(square, a)
    np.testing.assert_allclose(bias, p * (1 - p) * (2 * p - 1), atol=1e-10)
    assert np.sign(np.round(bias, 12)) == np.sign(a)


@pytest.mark.parametrize("a", LOGITS)
def test_reinmax_is_exact_for_squares_and_half_of_the_slope_times_the_other_probability(a):
    p, slope = sigmoid(a), jax.grad(wave)
    for f in (linear, square):
        np.testing.assert_allclose(over_noise(ReinMax(), f, a)[0], exact(f, a), atol=1e-10)
    # 1/2 f'(b) (b q + (1 - b) p), at each of the two values
    (u,), _ = grid(cells(1 - p))
    _, gradient = jax_gradients(
        InjectedJax({"b": ReinMax()}), *bernoulli(wave), {"a": jnp.asarray(a)}, {"b": {"u": u[:, None]}}
    )
    np.testing.assert_allclose(-gradient[:, 0], [0.5 * slope(0.0) * p, 0.5 * slope(1.0) * (1 - p)], atol=1e-12)
    bias = over_noise(ReinMax(), wave, a)[0] - exact(wave, a)
    trapezoid = 0.5 * (slope(0.0) + slope(1.0)) - (wave(1.0) - wave(0.0))
    np.testing.assert_allclose(bias, p * (1 - p) * trapezoid, atol=1e-10)
    assert bias < -0.01


@pytest.mark.parametrize("estimator", [GumbelSoftmax(1.0), GumbelStraightThrough(1.0), RaoGumbel(1, 1.0)], ids=repr)
def test_gumbel_estimators_are_biased_for_linear_cost_by_a_third(estimator):
    """At a = 0 and λ = 1 the mean slope is ∫ σ'(x)² dx = 1/6, where p q = 1/4."""
    np.testing.assert_allclose(over_noise(estimator, linear, 0.0)[0], 1.7 / 6, atol=1e-8)


@pytest.mark.parametrize("a", LOGITS[1:])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_gumbel_estimators_are_the_slope_of_the_relaxed_value(a, temperature):
    u, weights = legendre(60, sigmoid(-a))
    soft = sigmoid((a + np.log(u / (1 - u))) / temperature)
    slope = soft * (1 - soft) / temperature
    inside = weights @ (slope * np.asarray(jax.vmap(jax.grad(wave))(soft)))
    np.testing.assert_allclose(over_noise(GumbelSoftmax(temperature), wave, a)[0], inside, atol=1e-10)
    corner = weights @ (slope * np.asarray(jax.vmap(jax.grad(wave))(1.0 * (u > sigmoid(-a)))))
    mean, variance = over_noise(GumbelStraightThrough(temperature), wave, a)
    np.testing.assert_allclose(mean, corner, atol=1e-10)
    assert abs(mean - exact(wave, a)) > 0.01
    # Rao-Blackwell: the same mean, less variance, and less still with two conditional draws
    one, two = (over_noise(RaoGumbel(r, temperature), wave, a) for r in (1, 2))
    np.testing.assert_allclose(one, (mean, variance), atol=1e-5)  # one conditional draw is distributed as the draw
    np.testing.assert_allclose(two[0], mean, atol=1e-5)
    given_b = []
    for hard, weight in ((u > sigmoid(-a), sigmoid(a)), (u <= sigmoid(-a), sigmoid(-a))):
        given_b.append((weights[hard] @ slope[hard]) / weight * float(jax.grad(wave)(1.0 * hard[-1])))
    between = np.array([sigmoid(a), sigmoid(-a)]) @ np.square(given_b) - mean**2
    np.testing.assert_allclose(two[1], between + (variance - between) / 2, atol=1e-5)
    assert two[1] < variance


@pytest.mark.parametrize("a", LOGITS)
def test_gapped_straight_through_moves_the_logit_to_the_gap(a):
    gap, temperature = 1.0, 0.7
    p, slope = sigmoid(a), jax.grad(wave)

    def at(logit):
        return sigmoid(logit / temperature) * sigmoid(-logit / temperature) / temperature

    expected = p * slope(1.0) * at(max(a, gap)) + (1 - p) * slope(0.0) * at(max(-a, gap))
    mean, _ = over_noise(GappedStraightThrough(gap, temperature), wave, a)
    np.testing.assert_allclose(mean, expected, atol=1e-10)
    assert abs(mean - exact(wave, a)) > 0.01


# ---- one-hot sites --------------------------------------------------------------------------------------------------

PHI = np.array([0.6, -0.4, 0.3])
P = np.exp(PHI) / np.exp(PHI).sum()
M = np.array([[0.5, 1.0, -0.3], [0.2, -0.9, 0.4], [1.1, 0.0, 0.7]])
PRIOR = np.array([0.1, 0.5, -0.2])


def onehot_model(f):
    def model():
        z = numpyro.sample("z", OneHotCategorical(logits=jnp.asarray(PRIOR)))
        numpyro.factor("f", f(z))

    return model


def onehot_guide():
    numpyro.sample("z", OneHotCategorical(logits=numpyro.param("a", jnp.zeros(3))))


def onehot_exact(f, a):
    log_q, log_p = jax.nn.log_softmax(a), jax.nn.log_softmax(jnp.asarray(PRIOR))
    return jnp.exp(log_q) @ (jnp.stack([f(z) for z in jnp.eye(3)]) + log_p - log_q)


def at_each_category(estimator, f):
    """Mean over the draw, for estimators whose slope given the draw has no noise. u close to 1 wins."""
    u = np.where(np.eye(3) == 1, 1 - 1e-9, 1e-9)
    _, gradient = jax_gradients(
        InjectedJax({"z": estimator}),
        onehot_model(f),
        onehot_guide,
        {"a": jnp.asarray(PHI)},
        {"z": {"u": columns(u.T, 1, 3)}},
    )
    return P @ -gradient


def flat(z):
    return z @ jnp.asarray([0.3, -1.0, 0.8])


def quadratic(z):
    return z @ jnp.asarray(M) @ z + flat(z)


def cubic(z):
    return jnp.sum((z @ jnp.asarray(M)) ** 3)


def test_straight_through_and_reinmax_at_a_one_hot_site():
    """Prior and entropy count too: their linear extension has a slope at the categories that were not drawn."""
    np.testing.assert_allclose(
        at_each_category(StraightThrough(), flat), jax.grad(onehot_exact, 1)(flat, PHI), atol=1e-10
    )
    for f in (flat, quadratic):
        np.testing.assert_allclose(at_each_category(ReinMax(), f), jax.grad(onehot_exact, 1)(f, PHI), atol=1e-10)
    biases = [
        np.linalg.norm(at_each_category(e, f) - jax.grad(onehot_exact, 1)(f, PHI))
        for e, f in ((StraightThrough(), quadratic), (ReinMax(), cubic), (ReinMax(1.5), quadratic))
    ]
    assert min(biases) > 0.005, biases


def test_gapped_straight_through_at_a_one_hot_site():
    gap, temperature = 1.0, 0.7
    slope = jax.grad(lambda z: flat(z) + z @ (jax.nn.log_softmax(jnp.asarray(PRIOR)) - jax.nn.log_softmax(PHI)))
    expected = np.zeros(3)
    for i, z in enumerate(np.eye(3)):
        moved = PHI + (PHI.max() - PHI) * z - np.maximum(PHI - PHI.max() + gap, 0) * (1 - z)
        soft = np.asarray(jax.nn.softmax(moved / temperature))
        assert soft[i] == soft.max()
        v = np.asarray(slope(z))
        expected += P[i] * (soft * v - soft * (soft @ v)) / temperature
    np.testing.assert_allclose(at_each_category(GappedStraightThrough(gap, temperature), flat), expected, atol=1e-10)


def test_rao_gumbel_at_a_one_hot_site_has_the_mean_of_gumbel_straight_through_and_less_variance():
    draws = 20_000

    def sampled(estimator):
        elbo = type(InjectedJax()).__mro__[1]({"z": estimator})
        loss = lambda a, key: -elbo.loss(key, {"a": a}, onehot_model(cubic), onehot_guide)  # noqa: E731
        keys = jax.random.split(jax.random.key(0), draws)
        return np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(PHI), keys))

    plain, rao = sampled(GumbelStraightThrough(0.5)), sampled(RaoGumbel(10, 0.5))
    error = np.sqrt((plain.var(0) + rao.var(0)) / draws)
    assert np.all(np.abs(plain.mean(0) - rao.mean(0)) < 5 * error)
    assert np.all(rao.var(0) < 0.9 * plain.var(0))
    assert np.any(np.abs(rao.mean(0) - jax.grad(onehot_exact, 1)(cubic, PHI)) > 10 * error)
