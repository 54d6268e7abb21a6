"""Hard values with a made-up derivative: the gradient of one draw, by hand. -log q adds its slope in the value only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from injected import InjectedJax, InjectedTorch, jax_gradients
from scipy.special import digamma, expit

from ppl_estimators import ImportanceWeighted, ReinMax, SmoothedTriple, StraightThrough

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

A = np.array([0.8, -1.3, 0.4])
U = np.array([0.7, 0.9, 0.1])
T = np.array([2.0, -0.5, 1.5])
MASK = np.array([True, False, True])
P = expit(A)
B = (U > 1 - P).astype(float)


def jax_model():
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Bernoulli(logits=0.0))
        numpyro.factor("f", jnp.asarray(T) * z)


def jax_guide():
    a = numpyro.param("a", jnp.asarray(A))
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Bernoulli(logits=a).mask(jnp.asarray(MASK)))


def torch_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", tdist.Bernoulli(logits=torch.zeros(())).expand([3]))
        pyro.factor("f", torch.tensor(T) * z)


def torch_guide():
    a = pyro.param("a", torch.tensor(A))
    with pyro.plate("data", 3):
        pyro.sample("z", tdist.Bernoulli(logits=a).mask(torch.tensor(MASK)))


@pytest.mark.parametrize(
    ("spec", "slope"),
    [(ReinMax(), (B * (1 - P) + (1 - B) * P) / 2), (StraightThrough(), P * (1 - P))],
    ids=repr,
)
def test_a_bit(spec, slope):
    """d ELBO / da = slope (T - a) where the guide counts, slope T where its -log q is masked."""
    expected = -slope * (T - MASK * A)
    table = {"z": {"u": U[None]}}
    found = jax_gradients(InjectedJax({"z": spec}), jax_model, jax_guide, {"a": jnp.asarray(A)}, tables(table))[1][0]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    pyro.clear_param_store()
    twin = InjectedTorch({"z": spec})
    twin.randomness.table = table
    twin.loss_and_grads(torch_model, torch_guide)
    np.testing.assert_allclose(pyro.param("a").grad, expected, atol=1e-12)


def test_a_bit_under_a_bound():
    """A particle counts with its weight: the made-up slope in the value, and the gradient of −log q, which is kept."""
    u, z = np.stack([U, U[::-1]]), np.stack([B, (U[::-1] > 1 - P).astype(float)])
    log_w = np.log(0.5) + T * z - MASK * (z * A - np.log1p(np.exp(A)))
    weights = np.exp(log_w - np.logaddexp(*log_w))
    expected = -np.sum(weights * (P * (1 - P) * (T - MASK * A) - MASK * (z - P)), 0)
    options, table = {"num_particles": 2, "objective": ImportanceWeighted()}, {"z": {"u": u}}
    found = jax_gradients(
        InjectedJax({"z": StraightThrough()}, **options), jax_model, jax_guide, {"a": jnp.asarray(A)}, tables(table)
    )[1][0]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    pyro.clear_param_store()
    twin = InjectedTorch({"z": StraightThrough()}, **options)
    twin.randomness.table = table
    twin.loss_and_grads(torch_model, torch_guide)
    np.testing.assert_allclose(pyro.param("a").grad, expected, atol=1e-12)


def tables(table):
    return jax.tree.map(lambda x: x[None], table)


def test_a_count():
    """A Poisson site: (rate + x)/2 in log rate, times f' - d log q / dx; d log q / dx = log rate - digamma(x + 1)."""
    log_rate, x, t = 0.7, 3.0, 1.1

    def model():
        z = numpyro.sample("z", dist.Poisson(2.0))
        numpyro.factor("f", t * z)

    def guide():
        numpyro.sample("z", dist.Poisson(jnp.exp(numpyro.param("a", jnp.asarray(log_rate)))))

    def twin_model():
        z = pyro.sample("z", tdist.Poisson(torch.tensor(2.0)))
        pyro.factor("f", t * z)

    def twin_guide():
        pyro.sample("z", tdist.Poisson(pyro.param("a", torch.tensor(log_rate)).exp()))

    slope = (np.exp(log_rate) + x) / 2
    expected = -slope * (t + np.log(2.0) - digamma(x + 1) - (log_rate - digamma(x + 1)))
    table = {"z": {"value": np.array([x])}}
    elbo = InjectedJax({"z": SmoothedTriple()})
    found = jax_gradients(elbo, model, guide, {"a": jnp.asarray(log_rate)}, tables(table))[1][0]
    np.testing.assert_allclose(found, [expected], atol=1e-10)
    pyro.clear_param_store()
    twin = InjectedTorch({"z": SmoothedTriple()})
    twin.randomness.table = table
    twin.loss_and_grads(twin_model, twin_guide)
    np.testing.assert_allclose(pyro.param("a").grad, expected, atol=1e-10)
