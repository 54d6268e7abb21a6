"""Where a baseline costs more than it saves."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, jax_gradients, moments

from ppl_estimators import Enumerate, LeaveOneOut, Reinforce

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]


@pytest.mark.parametrize(("p", "times"), [(0.5, 2.0), (0.3, 6.4), (0.1, 82.0)])
def test_leave_one_out_at_a_nearly_decided_bit(p, times):
    """f(1) = 0: with no baseline ½ f(0)² p³ q, with the other particle's cost f(0)² p q (½ − p q)."""

    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.factor("f", 3.0 * (1 - b))

    def guide():
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("a", 0.0)))

    states = np.array(list(itertools.product([0.0, 1.0], repeat=2)))
    weights = np.prod(np.where(states == 1, p, 1 - p), axis=-1)
    params = {"a": jnp.asarray(np.log(p / (1 - p)))}
    variance = []
    for estimator in (Reinforce(), Reinforce(LeaveOneOut()), Enumerate()):
        elbo = InjectedJax({"b": estimator}, num_particles=2)
        found = jax_gradients(elbo, model, guide, params, {"b": {"value": states}})[1]
        mean, of_this = moments(found, weights)
        np.testing.assert_allclose(mean, 3.0 * p * (1 - p), atol=1e-12)
        variance.append(of_this.item())
    np.testing.assert_allclose(variance, [4.5 * p**3 * (1 - p), 9 * p * (1 - p) * (0.5 - p * (1 - p)), 0], atol=1e-12)
    np.testing.assert_allclose(variance[1] / variance[0], times, rtol=0.01)
