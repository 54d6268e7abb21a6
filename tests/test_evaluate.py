"""`EstimatorELBO.evaluate`: bounds of many particles in chunks, by batch, with their error and the weights' tail."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch

from ppl_estimators import DisARM, GumbelSoftmax
from ppl_estimators.measure.evaluation import evaluation, pareto_k
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

X = np.array([0.3, -1.0, 1.4, 2.5], dtype=np.float32)


def jax_model(x, slope=1):
    with numpyro.plate("data", len(x)):
        b = numpyro.sample("b", jdist.Bernoulli(0.3))
        numpyro.sample("x", jdist.Normal(2.0 * slope * b, 1.0), obs=x)


def jax_guide(x, slope=1):
    with numpyro.plate("data", len(x)):
        numpyro.sample("b", jdist.Bernoulli(logits=0.8 * x - 1.0))


def torch_model(x, slope=1):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", tdist.Bernoulli(0.3))
        pyro.sample("x", tdist.Normal(2.0 * slope * b, 1.0), obs=x)


def torch_guide(x, slope=1):
    with pyro.plate("data", len(x)):
        pyro.sample("b", tdist.Bernoulli(logits=0.8 * x - 1.0))


def log_likelihood(x):
    density = [p * np.exp(-0.5 * (x - m) ** 2) / math.sqrt(2 * math.pi) for p, m in ((0.3, 2.0), (0.7, 0.0))]
    return np.log(sum(density))


def evaluate(library, **options):
    estimators = {"b": options.pop("estimator", DisARM())}
    if library == "numpyro":
        batches = options.pop("batches", [X])
        batches = [jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, b) for b in batches]
        elbo = JaxELBO(estimators)
        return elbo.evaluate(jax.random.key(0), {}, jax_model, jax_guide, batches=batches, **options)
    pyro.set_rng_seed(0)
    batches = [tuple(torch.tensor(a) if isinstance(a, np.ndarray) else a for a in (b if type(b) is tuple else (b,)))
               for b in options.pop("batches", [X])]  # fmt: skip
    elbo = TorchELBO(estimators, vectorize_particles=True, max_plate_nesting=1)
    return elbo.evaluate(torch_model, torch_guide, batches=batches, **options)


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_the_bound_of_many_particles_is_the_log_likelihood(library):
    found = evaluate(library, num_particles=3000, chunk=700)
    exact = log_likelihood(X)
    assert found.particles == 3000
    assert found.each.shape == found.pareto_k.shape == (4,)
    assert 0 < found.standard_error < 0.1
    assert abs(found.value - exact.sum()) < 4 * found.standard_error
    np.testing.assert_allclose(found.each, exact, atol=0.1)
    assert found.elbo < found.value - 0.1
    assert (found.pareto_k < 0.7).all()
    # batch after batch, an argument that is no array, an estimator whose values are relaxed
    apart = evaluate(library, num_particles=3000, batches=[(X[:3], 1), (X[3:], 1)], estimator=GumbelSoftmax())
    assert abs(apart.value - exact.sum()) < 4 * apart.standard_error
    assert apart.each.shape == (4,)


def test_the_standard_error_is_that_of_the_draws():
    rng = np.random.default_rng(0)
    found = [evaluation([(rng.normal(0, 0.5, size=(400, 3)), 2.0)]) for _ in range(300)]
    spread = np.std([f.value for f in found])
    assert abs(np.mean([f.standard_error for f in found]) / spread - 1) < 0.15
    np.testing.assert_allclose(np.mean([f.value for f in found]), 6 * 0.125, atol=4 * spread / math.sqrt(300))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_tail_of_the_weights(shape):
    """Pareto weights u^−k have the index k; ten observations' worth of ½ draw towards it."""
    rng = np.random.default_rng(1)
    found = [pareto_k(-shape * np.log(rng.uniform(size=5000))) for _ in range(20)]
    tail = 3 * math.sqrt(5000)
    np.testing.assert_allclose(np.mean(found), (tail * shape + 5) / (tail + 10), atol=0.05)
    assert math.isnan(pareto_k(np.zeros(10)))
    assert pareto_k(np.zeros(100)) == -math.inf


@pytest.mark.parametrize("options", [{"num_particles": 1}, {"chunk": 0}, {"batches": []}], ids=str)
def test_evaluations_of_nothing(options):
    with pytest.raises(ValueError, match=r"evaluate"):
        evaluate("pyro", **options)
