"""Pathwise sites under bounds: by quadrature over the noise of two particles, the mean of the doubly reparameterised
gradient is that of the plain one, which differentiates the bound itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, grid, jax_gradients

from ppl_estimators import (
    DisARM,
    DoublyReparameterized,
    EstimatorError,
    ImportanceWeighted,
    LeaveOneOut,
    Pathwise,
    Reinforce,
    Renyi,
    StickingTheLanding,
)

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

PARAMS = {"a": jnp.array([0.3, -0.5, 0.4]), "s": jnp.array(-0.2), "t": jnp.array(0.7)}


def model():
    t = numpyro.param("t", 0.7)
    b = numpyro.sample("b", dist.Bernoulli(0.4))
    z = numpyro.sample("z", dist.Normal(0.5 * b, 0.9))
    y = numpyro.sample("y", dist.Normal(z, 1.2))
    numpyro.sample("x", dist.Normal(t * y + 0.1 * z * z - b, 3.0), obs=0.8)


def guide():
    a, s = numpyro.param("a", jnp.zeros(3)), numpyro.param("s", 0.0)
    b = numpyro.sample("b", dist.Bernoulli(logits=a[2]))
    z = numpyro.sample("z", dist.Normal(a[0] + 0.6 * b, jnp.exp(s)))
    numpyro.sample("y", dist.Normal(a[1] + 0.8 * z, 1.1))


def mean(estimators, objective, nodes=16):
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    normal = (x, w / w.sum())
    (z1, y1, z2, y2), weights = grid(*[normal] * 4)
    value = {"b": np.tile([0.0, 1.0], (len(z1), 1)), "z": np.stack([z1, z2], -1), "y": np.stack([y1, y2], -1)}
    tables = {k: {"value": v} for k, v in value.items()}
    elbo = InjectedJax({"b": Reinforce(LeaveOneOut()), **estimators}, num_particles=2, objective=objective)
    loss, gradient = jax_gradients(elbo, model, guide, PARAMS, tables)
    return weights @ loss, weights @ gradient, weights @ gradient**2


@pytest.mark.parametrize("objective", [ImportanceWeighted(), Renyi(-0.5)], ids=repr)
def test_doubly_reparameterised(objective):
    loss, wanted, _ = mean({}, objective)
    for chosen in ({"*": DoublyReparameterized()}, {"z": StickingTheLanding(), "y": Pathwise()}):
        found_loss, found, square = mean(chosen, objective)
        np.testing.assert_allclose(found_loss, loss, rtol=1e-12)
        np.testing.assert_allclose(found, wanted, atol=1e-7)
    once = mean({"*": DoublyReparameterized()}, objective)[2]
    assert (square != once).any()  # other weights, the same mean


def test_chains_that_have_no_one_weight():
    def refused(estimators, match):
        with pytest.raises(EstimatorError, match=match):
            mean(estimators, ImportanceWeighted(), nodes=1)

    refused({"y": DoublyReparameterized()}, r"site 'y': .* site 'z' above it has Pathwise\(\)")
    refused({"z": DoublyReparameterized(), "y": Reinforce()}, r"site 'z': .* site 'y' has Reinforce\(\)")


def test_score_functions_above_keep_their_costs():
    """DisARM at b and the paths below it: over the noise of b too."""
    x, w = np.polynomial.hermite_e.hermegauss(9)
    p = float(1 / (1 + np.exp(-0.4)))
    edges = np.unique([0, p, 1 - p, 1])
    cell = ((edges[1:] + edges[:-1]) / 2, np.diff(edges))
    normal = (x, w / w.sum())
    (u1, u2, z1, y1, z2, y2), weights = grid(cell, cell, *[normal] * 4)
    tables = {"b": {"u": np.stack([u1, u2], -1)}, "z": {"value": np.stack([z1, z2], -1)},
              "y": {"value": np.stack([y1, y2], -1)}}  # fmt: skip
    found = []
    for path in (Pathwise(), DoublyReparameterized()):
        elbo = InjectedJax({"b": DisARM(), "*": path}, num_particles=2, objective=ImportanceWeighted())
        found.append(weights @ jax_gradients(elbo, model, guide, PARAMS, tables)[1])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
