"""Estimators whose value carries a gradient of its own: exact over the noise where they are unbiased, and a measured
bias of known sign and size where they are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
    FromTableJax,
    FromTableTorch,
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
    LAX,
    REBAR,
    Constant,
    EstimatorError,
    EvolutionStrategy,
    GappedStraightThrough,
    GeneralizedPathwise,
    GumbelSoftmax,
    GumbelStraightThrough,
    ImplicitPathwise,
    ImportanceWeighted,
    Pathwise,
    RaoGumbel,
    Reinforce,
    ReinMax,
    RejectionPathwise,
    Renyi,
    StraightThrough,
)
from ppl_estimators.core.estimator import Estimator, Value
from ppl_estimators.core.families import CONTINUOUS, log_prob
from ppl_estimators.core.keep import Kept
from ppl_estimators.core.site import Costs, Draw, Site
from ppl_estimators.numpyro import EstimatorELBO as Jax
from ppl_estimators.numpyro import OneHotCategorical, with_estimators
from ppl_estimators.numpyro.distributions import describe as jax_describe
from ppl_estimators.numpyro.ops import OPS as JAX_OPS
from ppl_estimators.pyro import EstimatorELBO as Torch
from ppl_estimators.pyro import with_estimators as torch_hook
from ppl_estimators.pyro.distributions import describe as torch_describe
from ppl_estimators.pyro.distributions import parameters as torch_parameters

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


def test_one_hot_sites_have_the_same_gradients_in_pyro():
    """Whose own one-hot log probability has no slope in the value."""
    rng = np.random.default_rng(0)
    tables = {"z": {k: rng.uniform(size=(6, 1, 3)) for k in ("u", "v0", "v1")}}

    def model():
        with numpyro.handlers.scale(scale=1.7):
            z = numpyro.sample("z", OneHotCategorical(logits=jnp.asarray(PRIOR)))
        numpyro.factor("f", cubic(z))

    def guide():
        with numpyro.handlers.scale(scale=1.7):
            onehot_guide()

    def torch_model():
        with pyro.poutine.scale(scale=1.7):
            z = pyro.sample("z", pdist.OneHotCategorical(logits=torch.tensor(PRIOR)))
        pyro.factor("f", ((z @ torch.tensor(M)) ** 3).sum())

    def torch_guide():
        with pyro.poutine.scale(scale=1.7):
            pyro.sample("z", pdist.OneHotCategorical(logits=pyro.param("a", torch.tensor(PHI))))

    for estimator in (StraightThrough(), ReinMax(), RaoGumbel(2), GumbelSoftmax(), GappedStraightThrough()):
        pyro.clear_param_store()
        params = {"a": jnp.asarray(PHI)}
        loss, gradient = jax_gradients(InjectedJax({"z": estimator}), model, guide, params, tables)
        twin = torch_gradients(InjectedTorch({"z": estimator}), torch_model, torch_guide, params, tables)
        np.testing.assert_allclose(twin[0], loss, rtol=1e-10, err_msg=repr(estimator))
        np.testing.assert_allclose(twin[1], gradient, atol=1e-10, err_msg=repr(estimator))


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


@pytest.mark.parametrize(
    "estimator",
    [StraightThrough(), ReinMax(), GumbelSoftmax(), GumbelStraightThrough(), RaoGumbel(2), GappedStraightThrough()],
    ids=repr,
)
@pytest.mark.parametrize("logits", [[-np.inf, 0.3, 1.0], [-30.0, 30.0, 0.0], [0.0, -np.inf, -np.inf]])
def test_impossible_and_certain_categories_stay_finite_in_float32(estimator, logits):
    """A category of probability zero is never drawn, and neither value nor gradient is lost to it."""
    a = jnp.asarray(logits, dtype=jnp.float32)
    cost = jnp.asarray([1.0, -2.0, 0.5], dtype=jnp.float32)

    def value(a, u):
        site = Site("z", "OneHotCategorical", "onehot", (), (3,), frozenset(), logits=a)
        z = estimator.draw(JAX_OPS, site, dict.fromkeys(["u", "v0", "v1"], u)).value
        return jnp.sum(cost * z) - log_prob(JAX_OPS, "onehot", a, z), z

    u = jax.random.uniform(jax.random.key(0), (200, 3), dtype=jnp.float32, minval=1e-30)
    gradient, z = jax.vmap(jax.grad(value, has_aux=True), (None, 0))(a, u)
    assert z.dtype == jnp.float32
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_allclose(z.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(z[:, np.isneginf(logits)], 0)


def test_rao_gumbel_at_a_one_hot_site_has_the_mean_of_gumbel_straight_through_and_less_variance():
    draws = 20_000

    def sampled(estimator):
        elbo = Jax({"z": estimator})
        loss = lambda a, key: -elbo.loss(key, {"a": a}, onehot_model(cubic), onehot_guide)  # noqa: E731
        keys = jax.random.split(jax.random.key(0), draws)
        return np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(jnp.asarray(PHI), keys))

    plain, rao = sampled(GumbelStraightThrough(0.5)), sampled(RaoGumbel(10, 0.5))
    error = np.sqrt((plain.var(0) + rao.var(0)) / draws)
    assert np.all(np.abs(plain.mean(0) - rao.mean(0)) < 5 * error)
    assert np.all(rao.var(0) < 0.9 * plain.var(0))
    assert np.any(np.abs(rao.mean(0) - jax.grad(onehot_exact, 1)(cubic, PHI)) > 10 * error)


# ---- implicit reparameterisation ------------------------------------------------------------------------------------


class RawSource(FromTableJax):
    """Draws are what the table says, not a transform of it."""

    def value(self, name, fn, key, step=None):
        return jnp.asarray(self.table[name]["value"])[self.row].astype(float), []


class Raw(InjectedJax):
    source = RawSource


class RawSourceTorch(FromTableTorch):
    def value(self, name, fn, *args, **kwargs):
        return torch.as_tensor(np.array(self.table[name]["value"]))[0]


class RawTorch(InjectedTorch):
    source = RawSourceTorch


MIXTURE = {"loc": np.array([-1.2, 0.9]), "log_scale": np.array([-0.3, 0.2]), "weight": np.array([0.4, -0.1])}


def bent(z):
    return jnp.sin(1.3 * z) - 0.2 * z**2


def mixture_model():
    with numpyro.handlers.mask(mask=False):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.factor("f", bent(z[..., 0]))


def mixture_guide():
    loc, log_scale, weight = (numpyro.param(k, jnp.zeros(2)) for k in ("loc", "log_scale", "weight"))
    fn = dist.MixtureSameFamily(dist.Categorical(logits=weight), dist.Normal(loc, jnp.exp(log_scale)))
    numpyro.sample("z", fn.expand([1]).to_event(1))


def mixture_model_torch():
    with pyro.poutine.mask(mask=torch.tensor(False)):
        z = pyro.sample("z", pdist.Normal(torch.tensor(0.0), 1.0).expand([1]).to_event(1))
    pyro.factor("f", torch.sin(1.3 * z[..., 0]) - 0.2 * z[..., 0] ** 2)


def mixture_guide_torch():
    loc, log_scale, weight = (pyro.param(k, torch.tensor(MIXTURE[k])) for k in ("loc", "log_scale", "weight"))
    fn = pdist.MixtureSameFamily(pdist.Categorical(logits=weight), pdist.Normal(loc, log_scale.exp()))
    pyro.sample("z", fn.expand([1]).to_event(1))


def mixture_density(p, z):
    scale = jnp.exp(p["log_scale"])
    parts = jax.nn.log_softmax(p["weight"]) - 0.5 * ((z[:, None] - p["loc"]) / scale) ** 2 - jnp.log(scale)
    return jax.nn.logsumexp(parts - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def mixture_exact(p, z, dz):
    log_q = mixture_density(p, z)
    return jnp.sum(dz * jnp.exp(log_q) * (bent(z) - log_q))


def test_implicit_gradient_of_a_mixture_is_exact_by_quadrature_and_the_same_in_both_libraries():
    z = np.linspace(-14, 14, 2801)
    dz = np.full_like(z, z[1] - z[0])
    weights = dz * np.exp(mixture_density(MIXTURE, jnp.asarray(z)))
    tables = {"z": {"value": z[:, None, None]}}
    params = {k: jnp.asarray(v) for k, v in MIXTURE.items()}
    losses, gradient = jax_gradients(Raw({"z": ImplicitPathwise()}), mixture_model, mixture_guide, params, tables)
    exact = jax.jit(jax.grad(mixture_exact))(params, z, dz)
    exact = np.concatenate([exact[k] for k in sorted(exact)])
    mean, variance = moments(-gradient, weights)
    np.testing.assert_allclose(mean, exact, atol=1e-10)
    assert np.all(variance > 1e-3)
    assert np.all(np.abs(exact) > 0.01)
    few = slice(900, 1900, 100)
    twin, torch_gradient = torch_gradients(
        RawTorch({"z": ImplicitPathwise()}),
        mixture_model_torch,
        mixture_guide_torch,
        MIXTURE,
        {"z": {"value": z[few, None, None]}},
    )
    np.testing.assert_allclose(twin, losses[few], rtol=1e-10)
    np.testing.assert_allclose(torch_gradient, gradient[few], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("objective", [None, ImportanceWeighted()], ids=repr)
def test_implicit_gradient_of_a_normal_is_that_of_its_sampler(objective):
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(jnp.sin(z), 0.5), obs=0.4)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("m", 0.0), jnp.exp(numpyro.param("s", 0.0))))

    params = {"m": jnp.asarray(0.7), "s": jnp.asarray(-0.4)}
    noise = {"z": {"value": np.random.default_rng(0).normal(size=(20, 3))}}
    found = [
        jax_gradients(InjectedJax({"z": e}, num_particles=3, objective=objective), model, guide, params, noise)[1]
        for e in (Pathwise(), ImplicitPathwise())
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


def test_implicit_gradient_of_a_gamma_is_that_of_its_sampler():
    z, alpha, rate = jnp.array([0.05, 0.7, 3.0]), jnp.array([0.4, 1.3, 6.0]), jnp.array([2.0, 0.5, 1.7])

    def value(alpha, rate):
        site = jax_describe("z", dist.Gamma(alpha, rate), frozenset(), None, {})
        return ImplicitPathwise().draw(JAX_OPS, site, {"value": z}).value.sum()

    of_alpha, of_rate = jax.jit(jax.grad(value, (0, 1)))(alpha, rate)
    np.testing.assert_allclose(of_rate, -z / rate, rtol=1e-10)
    np.testing.assert_allclose(of_alpha, jax.lax.random_gamma_grad(alpha, z * rate) / rate, rtol=1e-8)


class Power(dist.Distribution):
    """A distribution of the user's: F(z) = z^a on (0, 1)."""

    arg_constraints: ClassVar = {"a": dist.constraints.positive}
    support = dist.constraints.unit_interval

    def __init__(self, a):
        self.a = a
        super().__init__(jnp.shape(a))

    def sample(self, key, sample_shape=()):
        return jax.random.uniform(key, (*sample_shape, *self.batch_shape)) ** (1 / self.a)

    def log_prob(self, value):
        return jnp.log(self.a) + (self.a - 1) * jnp.log(value)

    def cdf(self, value):
        return value**self.a


class PowerTorch(pdist.TorchDistribution):
    arg_constraints: ClassVar = {}
    support = torch.distributions.constraints.unit_interval

    def __init__(self, a):
        self.a = a
        super().__init__(a.shape)

    def sample(self, sample_shape=()):
        return torch.rand(self._extended_shape(sample_shape)) ** (1 / self.a)

    def log_prob(self, value):
        return self.a.log() + (self.a - 1) * value.log()

    def cdf(self, value):
        return value**self.a


def test_a_users_distribution_has_an_implicit_gradient_in_both_libraries_through_expand_mask_and_to_event():
    z, a = np.array([[0.2, 0.7, 0.9], [0.5, 0.3, 0.8]]), 1.6
    expected = 3.0 * np.sum(-z * np.log(z) / a, axis=-1)  # f = 3 Σ z; dz/da = -z log z / a

    def model():
        with numpyro.handlers.mask(mask=False):
            x = numpyro.sample("z", dist.Uniform(jnp.zeros(3), 1.0).to_event(1))
        numpyro.factor("f", 3 * x.sum())

    def guide():
        fn = Power(numpyro.param("a", 1.0)).expand([3]).mask(False).to_event(1)
        numpyro.sample("z", fn)

    tables = {"z": {"value": z[:, None]}}
    elbo = Raw({"z": ImplicitPathwise()})
    _, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(a)}, tables)
    np.testing.assert_allclose(-gradient[:, 0], expected, rtol=1e-10)

    def torch_model():
        with pyro.poutine.mask(mask=torch.tensor(False)):
            x = pyro.sample("z", pdist.Uniform(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", 3 * x.sum())

    def torch_guide():
        fn = PowerTorch(pyro.param("a", torch.tensor(a)).expand(3)).mask(False).to_event(1)
        pyro.sample("z", fn)

    _, gradient = torch_gradients(RawTorch({"z": ImplicitPathwise()}), torch_model, torch_guide, {"a": a}, tables)
    np.testing.assert_allclose(-gradient[:, 0], expected, rtol=1e-10)


def test_implicit_gradient_of_a_truncated_normal_is_that_of_its_inverse_cdf():
    u = jnp.array([0.02, 0.4, 0.97])

    def truncated(m, s):
        return dist.TruncatedNormal(m, s, low=-0.8, high=1.1)

    def value(m, s):
        site = jax_describe("z", truncated(m, s), frozenset(), None, {})
        z = truncated(*jax.lax.stop_gradient((m, s))).icdf(u)
        return ImplicitPathwise().draw(JAX_OPS, site, {"value": z}).value

    def explicit(m, s):
        return truncated(m, s).icdf(u)

    found, expected = jax.jit(lambda *at: [jax.jacobian(f, (0, 1))(*at) for f in (value, explicit)])(0.3, 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_mixture_of_normals_trains_through_implicit_gradients_in_both_libraries():
    """The target is a mixture too: a guide that covers both of its ends reaches −ELBO = 0."""
    loc, scale, logits = [-2.0, 1.5], [0.7, 0.9], [0.4, -0.4]
    start = {"m": np.array([-0.5, 0.5]), "s": np.zeros(2), "w": np.zeros(2)}

    def model():
        target = dist.MixtureSameFamily(
            dist.Categorical(logits=jnp.array(logits)), dist.Normal(jnp.array(loc), jnp.array(scale))
        )
        numpyro.sample("z", target)

    def guide():
        m, s, w = (numpyro.param(k, jnp.asarray(start[k])) for k in "msw")
        numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=w), dist.Normal(m, jnp.exp(s))))

    elbo = Jax({"z": ImplicitPathwise()}, num_particles=30)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.02), elbo)
    result = svi.run(jax.random.key(0), 800, progress_bar=False)
    assert result.losses[:5].mean() > 0.3
    assert abs(result.losses[-100:].mean()) < 0.03
    np.testing.assert_allclose(result.params["m"], loc, atol=0.2)

    def torch_model():
        pyro.sample("z", pdist.MixtureSameFamily(
            pdist.Categorical(logits=torch.tensor(logits)), pdist.Normal(torch.tensor(loc), torch.tensor(scale))
        ))  # fmt: skip

    def torch_guide():
        m, s, w = (pyro.param(k, torch.tensor(start[k])) for k in "msw")
        pyro.sample("z", pdist.MixtureSameFamily(pdist.Categorical(logits=w), pdist.Normal(m, s.exp())))

    torch.manual_seed(0)
    loss = Torch({"z": ImplicitPathwise()}, num_particles=30, vectorize_particles=True, max_plate_nesting=0)
    svi = pyro.infer.SVI(torch_model, torch_guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step() for _ in range(800)]
    assert np.mean(losses[:5]) > 0.3
    assert abs(np.mean(losses[-100:])) < 0.03
    np.testing.assert_allclose(pyro.param("m").detach(), loc, atol=0.2)


@pytest.mark.parametrize(
    ("fn", "twin", "fact"),
    [
        (lambda: dist.Poisson(2.0), lambda: pdist.Poisson(2.0), "continuous distribution, got Poisson, discrete"),
        (
            lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
            lambda: pdist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            r"univariate distribution, got MultivariateNormal, of event shape \(2,\)",
        ),
        (lambda: dist.StudentT(3.0), lambda: pdist.StudentT(torch.tensor(3.0)), "cdf with a derivative, got StudentT"),
        (None, lambda: pdist.Gamma(torch.tensor(2.0), 1.0), "cdf with a derivative, got Gamma"),
        (lambda: dist.VonMises(0.0, 1.0), lambda: pdist.VonMises(0.0, torch.tensor(1.0)), "derivative, got VonMises"),
    ],
)
def test_implicit_pathwise_asks_the_distribution(fn, twin, fact):
    fix = r"Use Pathwise\(\) if the distribution is reparameterisable, or Reinforce\(LeaveOneOut\(\)\) with num"
    if fn is not None:
        program = lambda: numpyro.sample("z", fn())  # noqa: E731
        with pytest.raises(EstimatorError, match=f"site 'z': .*{fact}.*{fix}"):
            Jax({"z": ImplicitPathwise()}).loss(jax.random.key(0), {}, program, program)
    program = lambda: pyro.sample("z", twin())  # noqa: E731
    with pytest.raises(EstimatorError, match=f"site 'z': .*{fact}.*{fix}"):
        Torch({"z": ImplicitPathwise()}).loss(program, program)


# ---- LAX ------------------------------------------------------------------------------------------------------------


def location_scale(family, fn, value):
    """A site of one element and one particle, as `local` sees it."""
    site = jax_describe("z", fn, frozenset(), None, {})
    assert site.family == family
    return site.filled(lead=1, named={k: v[None] for k, v in site.named.items()}, scale=1.0)


FAMILIES = {
    "normal": (dist.Normal, lambda e: np.exp(-(e**2) / 2) / np.sqrt(2 * np.pi), 9.0),
    "laplace": (dist.Laplace, lambda e: np.exp(-np.abs(e)) / 2, 36.0),
    "logistic": (dist.Logistic, lambda e: sigmoid(e) * sigmoid(-e), 36.0),
    "gumbel": (dist.Gumbel, lambda e: np.exp(-e - np.exp(-e)), 36.0),
    "cauchy": (dist.Cauchy, lambda e: 1 / (np.pi * (1 + e**2)), None),
}


def standard_grid(family):
    """Nodes ε and weights of the standard law."""
    _, density, width = FAMILIES[family]
    x, w = np.polynomial.legendre.leggauss(200)
    if width is None:  # Cauchy: ε = tan
        angle = np.pi / 2 * x
        return np.tan(angle), w / 2
    nodes = [width * (x - 1) / 2, width * (x + 1) / 2]  # a Laplace density has a corner at 0
    e = np.concatenate(nodes)
    return e, density(e) * np.tile(w, 2) * width / 2


ALL = [*FAMILIES, "gamma", "beta", "dirichlet"]


@pytest.mark.parametrize("family", ALL)
def test_both_libraries_show_the_parameters_of_a_family_by_the_same_names(family):
    names = CONTINUOUS[family]
    values = [np.array([0.7, 1.9, 0.4]), np.array([1.1, 0.6, 2.0])][: len(names)]
    name = family.capitalize()
    numbers = [jnp.asarray(v) for v in values], [torch.tensor(v) for v in values]
    twins = getattr(dist, name)(*numbers[0]), getattr(pdist, name)(*numbers[1])
    sites = [jax_describe("z", twins[0], frozenset(), None, {}), torch_describe("z", twins[1], frozenset(), 1.0, {})]
    assert [s.family for s in sites] == [family, family]
    found = sites[0].named, torch_parameters(twins[1])
    for named in found:
        assert set(named) == set(names)
        for key, value in zip(names, values, strict=True):
            np.testing.assert_allclose(named[key], value, rtol=1e-12)
        in_order = [value for _, value in sorted(zip(names, values, strict=True), key=lambda pair: pair[0])]
        np.testing.assert_allclose(sites[0].filled(named=named).parameters, in_order, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_lax_is_unbiased_for_every_location_scale_family_and_whatever_network(family):
    e, weights = standard_grid(family)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-10)
    f, loc, scale = lambda z: jax.nn.sigmoid(-1.7 * z), 0.4, 0.8
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(3, 5)), 0.5 * rng.normal(size=(5, 1))
    kept = Kept(networks={"control": lambda x: jnp.tanh(x @ w1) @ w2})

    def surrogate(parameters, z):
        fn = FAMILIES[family][0](*parameters)
        site = location_scale(family, fn, z)
        return LAX(baseline=None).local(JAX_OPS, site, Draw(z[None]), Costs(f(z)[None]), kept).surrogate.sum()

    start = jnp.array([loc, scale])
    gradient = np.asarray(jax.jit(jax.vmap(jax.grad(surrogate), (None, 0)))(start, loc + scale * e))
    exact = jax.jit(jax.grad(lambda p: jnp.asarray(weights) @ f(p[0] + p[1] * e)))(start)
    mean, variance = weights @ gradient, weights @ (gradient - weights @ gradient) ** 2
    np.testing.assert_allclose(mean, exact, atol=1e-10)
    assert np.all(variance > 1e-3)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gumbel"])
def test_a_mirrored_pair_is_unbiased_for_every_symmetric_family(family):
    e, weights = standard_grid(family)
    start, z = jnp.array([0.4, 0.8]), jnp.asarray(0.4 + 0.8 * e)

    def f(z):
        return jax.nn.sigmoid(-1.7 * z) + 0.3

    def surrogate(parameters, z):
        site = location_scale(family, FAMILIES[family][0](*parameters), z)
        estimator, draw = EvolutionStrategy(baseline=None), Draw(z[None])
        other = estimator.alternative(JAX_OPS, site, draw, 0)
        return estimator.local(JAX_OPS, site, draw, Costs(f(z)[None], f(other)[None]), Kept()).surrogate.sum()

    def plain(parameters, z):
        return f(z) * FAMILIES[family][0](*parameters).log_prob(z)

    found, alone = (np.asarray(jax.jit(jax.vmap(jax.grad(g), (None, 0)))(start, z)) for g in (surrogate, plain))
    exact = jax.jit(jax.grad(lambda p: jnp.asarray(weights) @ f(p[0] + p[1] * e)))(start)
    mean, variance = weights @ found, weights @ (found - weights @ found) ** 2
    np.testing.assert_allclose(mean, exact, atol=1e-10)
    assert (variance < weights @ (alone - mean) ** 2).all()


def test_lax_with_the_cost_itself_as_its_network_is_pathwise():
    """c = f: the score drops out, and the slope of the network is that of the cost."""
    fn, z = dist.Normal(0.4, 0.8), jnp.asarray([1.3])
    kept = Kept(networks={"control": lambda x: bent(x[..., :1])})

    def surrogate(parameters):
        site = location_scale("normal", dist.Normal(*parameters), z)
        return LAX(baseline=None).local(JAX_OPS, site, Draw(z), Costs(bent(z)), kept).surrogate.sum()

    epsilon = (z[0] - fn.loc) / fn.scale
    slope = jax.grad(bent)(z[0])
    np.testing.assert_allclose(jax.jit(jax.grad(surrogate))((0.4, 0.8)), (slope, slope * epsilon), rtol=1e-12)


def test_lax_trains_its_network_on_the_variance_of_the_gradient():
    """A cost with a jump: the slope is useless, and the trained network halves the variance of the score function."""

    def model():
        with numpyro.handlers.mask(mask=False):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", 2.0 * (z > 0.3) - z)

    def guide():
        m = numpyro.param("m", 0.1)
        numpyro.sample("z", dist.Normal(m, 1.0))

    wrapped = with_estimators(guide, {"z": LAX()})
    elbo = Jax(num_particles=20)
    svi = numpyro.infer.SVI(model, wrapped, numpyro.optim.optax_to_numpyro(trained_only_networks()), elbo)
    result = svi.run(jax.random.key(0), 1500, progress_bar=False)
    state = {"z$state": result.state.mutable_state["z$state"]} if result.state.mutable_state else {}

    def variance(params, loss):
        keys = jax.random.split(jax.random.key(1), 4000)
        g = jax.jit(jax.vmap(jax.grad(lambda m, key: loss(key, {**params, "m": m})), (None, 0)))(params["m"], keys)
        return float(g.var())

    fixed = {k: v for k, v in result.params.items() if k != "m"} | {"m": jnp.asarray(0.1)}
    lax = variance(fixed, lambda key, p: Jax().loss(key, {**p, **state}, model, wrapped))
    plain = variance(fixed, lambda key, p: Jax({"z": Reinforce(Constant(0.4))}).loss(key, p, model, guide))
    assert lax < 0.5 * plain


def trained_only_networks():
    import optax

    labels = lambda params: {k: "on" if "$" in k else "off" for k in params}  # noqa: E731
    return optax.multi_transform({"on": optax.adam(0.01), "off": optax.set_to_zero()}, labels)


# ---- generalised reparameterisations --------------------------------------------------------------------------------


def log_gamma_grid(a, n=400):
    """x = log g and weights for g ~ Gamma(a): the trapezoidal rule, which converges fast as both tails vanish."""
    x = np.linspace(-34 / a - 1, 4.4, n)
    log_density = a * x - np.exp(x) - float(jax.scipy.special.gammaln(a))
    return x, np.exp(log_density) * (x[1] - x[0])


def gamma_exact(f, p):
    """E[f(z) − log q(z)] of a gamma with shape p[0] and rate p[1], differentiable in both."""
    x = jnp.linspace(-75, 4.5, 3000)
    log_q = p[0] * (x + jnp.log(p[1])) - p[1] * jnp.exp(x) - jax.scipy.special.gammaln(p[0])  # of x = log z
    return jnp.sum(jnp.exp(log_q) * (f(jnp.exp(x)) - (log_q - x))) * (x[1] - x[0])


def gamma_model():
    with numpyro.handlers.mask(mask=False):
        z = numpyro.sample("z", dist.Gamma(1.0, 1.0))
    numpyro.factor("f", wiggle(z))


def gamma_guide():
    numpyro.sample("z", dist.Gamma(numpyro.param("a", 1.0), numpyro.param("b", 1.0)))


def wiggle(z):
    return jnp.sin(z) - 0.3 * z


@pytest.mark.parametrize(
    ("estimator", "shape"),
    [
        (GeneralizedPathwise(), 0.6),
        (GeneralizedPathwise(), 2.3),
        (RejectionPathwise(), 0.6),
        (RejectionPathwise(), 2.3),
    ],
    ids=repr,
)
def test_generalised_reparameterisations_of_a_gamma_are_unbiased_in_shape_and_rate(estimator, shape):
    rate = 1.7
    axes, weights = grid(log_gamma_grid(shape + estimator.boost), *[legendre(80)] * estimator.boost)
    tables = {"z": {label: x[:, None] for label, x in zip(["g0", "u0_0"], axes, strict=False)}}
    params = {"a": jnp.asarray(shape), "b": jnp.asarray(rate)}
    _, gradient = jax_gradients(InjectedJax({"z": estimator}), gamma_model, gamma_guide, params, tables)
    exact = jax.grad(lambda p: gamma_exact(wiggle, p))(jnp.array([shape, rate]))
    mean = weights @ -gradient
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-9)
    np.testing.assert_allclose(mean, exact, atol=1e-10)
    assert np.all(np.abs(exact) > 0.01)
    # without the correction it would be biased: the path alone
    _, path = jax_gradients(InjectedJax({"z": PathOnly(estimator.boost)}), gamma_model, gamma_guide, params, tables)
    assert abs(weights @ -path[:, 0] - exact[0]) > 1e-4


def test_a_generalised_reparameterisation_is_unbiased_under_a_bound():
    """What its value does not carry multiplies the bound less that of the other particle."""
    params, objective, order = {"a": jnp.asarray(2.3), "b": jnp.asarray(1.7)}, Renyi(0.5), 0.5
    x = np.linspace(-10, 3.4, 150)
    density = np.exp(2.3 * x - np.exp(x) - float(jax.scipy.special.gammaln(2.3)))
    axes, weights = grid(*[(x, density * (x[1] - x[0]))] * 2)
    tables = {"z": {"g0": columns(axes, 2)}}
    x = jnp.linspace(-12, 3.5, 400)

    def exact(p):
        log_q = p["a"] * jnp.log(p["b"]) + (p["a"] - 1) * x - p["b"] * jnp.exp(x) - jax.scipy.special.gammaln(p["a"])
        log_w, mass = wiggle(jnp.exp(x)) - log_q, jnp.exp(log_q + x) * (x[1] - x[0])
        both = jnp.logaddexp(order * log_w[:, None], order * log_w) - jnp.log(2)
        return -mass @ both @ mass / order

    means = [
        weights @ jax_gradients(InjectedJax({"z": e}, **options), gamma_model, gamma_guide, params, tables)[1]
        for options in [{"num_particles": 2, "objective": objective}]
        for e in (GeneralizedPathwise(), PathOnly(0))
    ]
    wanted = jax.grad(exact)(params)
    np.testing.assert_allclose(means[0], [wanted["a"], wanted["b"]], atol=1e-8)
    assert abs(means[1][0] - wanted["a"]) > 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class PathOnly(RejectionPathwise):
    """The right value without its correction."""

    boost: int = 1
    value: ClassVar[Value] = Value.OWN
    local = Estimator.local

    def __post_init__(self):
        if self.boost == 0:
            object.__setattr__(self, "standardise", GeneralizedPathwise().standardise)
            object.__setattr__(self, "transform", GeneralizedPathwise().transform)


def simplex_cost(x):
    return jnp.sin(3 * x) - 0.5 * x**2


def simplex_programs(dirichlet):
    def model():
        with numpyro.handlers.mask(mask=False):
            fn = dist.Dirichlet(jnp.ones(2)) if dirichlet else dist.Beta(1.0, 1.0)
            z = numpyro.sample("z", fn)
        numpyro.factor("f", simplex_cost(z[..., 0] if dirichlet else z))

    def guide():
        a = numpyro.param("a", jnp.ones(2))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("z", dist.Dirichlet(a) if dirichlet else dist.Beta(a[0], a[1]))

    return model, guide


@pytest.mark.parametrize("dirichlet", [False, True])
def test_generalised_reparameterisation_of_a_beta_and_a_dirichlet_is_unbiased(dirichlet):
    a = np.array([1.3, 0.8])
    (g0, g1), weights = grid(log_gamma_grid(a[0], 200), log_gamma_grid(a[1], 200))
    labels = {"g0": columns([g0, g1], 1, 2)} if dirichlet else {"g0": g0[:, None], "g1": g1[:, None]}
    model, guide = simplex_programs(dirichlet)
    elbo = InjectedJax({"z": GeneralizedPathwise()})
    _, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(a)}, {"z": labels})
    x = jnp.linspace(-40, 40, 4001)  # logit

    def expectation(a):
        log_q = a[0] * jax.nn.log_sigmoid(x) + a[1] * jax.nn.log_sigmoid(-x) - jax.scipy.special.betaln(a[0], a[1])
        return jnp.sum(jnp.exp(log_q) * simplex_cost(jax.nn.sigmoid(x))) * (x[1] - x[0])

    np.testing.assert_allclose(weights @ -gradient, jax.grad(expectation)(jnp.asarray(a)), atol=1e-10)


CORRECTED = {"boosted": RejectionPathwise(2), "generalised": GeneralizedPathwise()}


@pytest.mark.parametrize("family", ["gamma", "beta", "dirichlet"])
@pytest.mark.parametrize("estimator", CORRECTED.values(), ids=repr)
def test_generalised_reparameterisations_are_the_same_in_both_libraries(estimator, family):
    rng = np.random.default_rng(0)
    a, shape = np.array([1.3, 0.8, 2.1]), (4, 1, 3) if family == "dirichlet" else (4, 1)
    labels = [f"{k}{i}" for i in range(2) for k in ("g", "u")] + [f"u{i}_{j}" for i in range(2) for j in range(2)]
    tables = {"z": {k: rng.uniform(0.1, 0.9, size=shape) for k in labels}}

    def jax_law(a):
        made = {"gamma": lambda: dist.Gamma(a[0], a[1]), "beta": lambda: dist.Beta(a[0], a[1])}
        return made.get(family, lambda: dist.Dirichlet(a))()

    def torch_law(a):
        made = {"gamma": lambda: pdist.Gamma(a[0], a[1]), "beta": lambda: pdist.Beta(a[0], a[1])}
        return made.get(family, lambda: pdist.Dirichlet(a))()

    def model():
        z = numpyro.sample("z", jax_law(jnp.array([1.0, 2.0, 1.5])))
        numpyro.factor("f", jnp.sum(jnp.sin(z) * jnp.array([1.0, 2.0, 3.0])[: max(z.size, 1)]))

    def torch_model():
        z = pyro.sample("z", torch_law(torch.tensor([1.0, 2.0, 1.5])))
        pyro.factor("f", (z.sin() * torch.tensor([1.0, 2.0, 3.0])[: z.numel()]).sum())

    guide = lambda: numpyro.sample("z", jax_law(numpyro.param("a", jnp.ones(3))))  # noqa: E731
    twin_guide = lambda: pyro.sample("z", torch_law(pyro.param("a", torch.tensor(a))))  # noqa: E731
    loss, gradient = jax_gradients(InjectedJax({"z": estimator}), model, guide, {"a": jnp.asarray(a)}, tables)
    twin, torch_gradient = torch_gradients(InjectedTorch({"z": estimator}), torch_model, twin_guide, {"a": a}, tables)
    np.testing.assert_allclose(twin, loss, rtol=1e-10)
    np.testing.assert_allclose(torch_gradient, gradient, rtol=1e-8)


# ---- schedules ------------------------------------------------------------------------------------------------------


def cooling(step):
    return 0.4 + 1.6 * 0.5**step


TEMPERATURES = [2.0, 1.2, 0.8, 0.6, 0.5, 0.45]


def test_a_schedule_advances_with_the_steps_of_training_and_not_with_evaluations_in_numpyro():
    seen = []

    def model():
        b = numpyro.sample("b", dist.Bernoulli(logits=0.0))
        jax.debug.callback(lambda b: seen.append(float(b)), b)

    guide = with_estimators(lambda: numpyro.sample("b", dist.Bernoulli(logits=0.3)), {"b": GumbelSoftmax(cooling)})
    elbo = InjectedJax()
    elbo.randomness.table = {"b": {"u": np.full((1,), 0.8)}}
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(0.1), elbo)
    state = svi.init(jax.random.key(0))

    def relaxed_values():
        jax.effects_barrier()
        found = [x for x in seen if 0 < x < 1]
        seen.clear()
        assert found
        return found

    seen.clear()
    for temperature in TEMPERATURES:
        svi.evaluate(state)  # NumPyro hands it no state: it sees the start of the schedule
        np.testing.assert_allclose(relaxed_values(), sigmoid((0.3 + np.log(4.0)) / TEMPERATURES[0]), rtol=1e-10)
        state, _ = svi.update(state)
        np.testing.assert_allclose(relaxed_values(), sigmoid((0.3 + np.log(4.0)) / temperature), rtol=1e-10)
    assert state.mutable_state["b$state"]["steps"] == len(TEMPERATURES)


@pytest.mark.parametrize("hook", [False, True])
def test_a_schedule_advances_with_the_steps_of_training_and_not_with_evaluations_in_pyro(hook):
    seen = []
    estimators = {"b": GumbelSoftmax(cooling)}

    def model():
        seen.append(pyro.sample("b", pdist.Bernoulli(logits=torch.tensor(0.0))).detach())

    def guide():
        pyro.sample("b", pdist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    elbo = InjectedTorch(None if hook else estimators)
    elbo.randomness.table = {"b": {"u": np.full((1,), 0.8), "value": np.ones(1)}}
    svi = pyro.infer.SVI(model, torch_hook(guide, estimators) if hook else guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    svi.evaluate_loss()
    for temperature in TEMPERATURES:
        seen.clear()
        svi.evaluate_loss()
        svi.step()
        expected = sigmoid((0.3 + np.log(4.0)) / temperature)
        np.testing.assert_allclose(seen, [expected] * 2, rtol=1e-10)
    assert pyro.get_param_store()["b$state.steps"] == len(TEMPERATURES)


def test_a_schedule_without_the_hook_is_refused_in_numpyro():
    program = lambda: numpyro.sample("b", dist.Bernoulli(logits=0.3))  # noqa: E731
    with pytest.raises(EstimatorError, match=r"site 'b': GumbelSoftmax\(cooling\) keeps .* Wrap the guide"):
        Jax({"b": GumbelSoftmax(cooling)}).loss(jax.random.key(0), {}, program, program)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GumbelSoftmax(0.0), r"GumbelSoftmax\(temperature=...\) needs a positive number, or a function"),
        (lambda: RaoGumbel(0), r"RaoGumbel\(r=...\) needs one or more"),
        (lambda: GappedStraightThrough(-1.0), r"GappedStraightThrough\(gap=...\) needs a number of 0 or more"),
        (lambda: RejectionPathwise(0), r"RejectionPathwise\(boost=...\) needs 1 or more"),
    ],
)
def test_specs_refuse_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_integer_categorical_is_refused_with_the_fix():
    program = lambda: numpyro.sample("k", dist.Categorical(logits=jnp.zeros(3)))  # noqa: E731
    fix = r"site 'k': ReinMax needs a Bernoulli or OneHotCategorical site, got Categorical\. Use OneHotCategorical"
    with pytest.raises(EstimatorError, match=fix):
        Jax({"k": ReinMax()}).loss(jax.random.key(0), {}, program, program)


def test_a_corrected_site_below_a_relaxed_value_is_refused():
    """REBAR differentiates the cost at relaxed values: below them the correction would be missing."""

    def model():
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.sample("z", dist.Gamma(1.0 + b, 1.0))

    guide = with_estimators(model, {"b": REBAR(), "z": GeneralizedPathwise()})
    with pytest.raises(EstimatorError, match=r"site 'b': REBAR .* site 'z' \(Gamma\) .* cannot be relaxed"):
        Jax().loss(jax.random.key(0), {}, model, guide)
