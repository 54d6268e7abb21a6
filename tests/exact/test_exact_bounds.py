"""The learning signal of a bound of K particles: the bound of the others, for each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_estimators import ImportanceWeighted, Renyi
from ppl_estimators.numpyro.ops import OPS as JAX
from ppl_estimators.pyro.ops import OPS as TORCH

pytestmark = pytest.mark.usefixtures("double_precision")

INF = np.inf
LOG_WEIGHTS = [
    [1.0, 2.0],
    [0.3, -1.2, 0.8],
    [-800.0, 0.0, 3.0, -1e5],  # no difference of sums shows what is left without the third
    [900.0, 100.0, 100.5],
    [0.0, -INF, -INF],
    [500.0] * 5,
]


@pytest.mark.parametrize(("ops", "array"), [(JAX, jnp.asarray), (TORCH, torch.tensor)], ids=["jax", "torch"])
@pytest.mark.parametrize("bound", [ImportanceWeighted(), Renyi(0.5), Renyi(3.0)], ids=repr)
def test_each_particle_is_left_out_in_turn(ops, array, bound):
    order = 1 - bound.alpha
    for log_w in LOG_WEIGHTS:
        x = np.array(log_w)
        if order < 0 and np.isinf(x).any():
            continue  # an infinite bound
        k = len(x)
        whole = (np.logaddexp.reduce(order * x) - np.log(k)) / order
        others = [(np.logaddexp.reduce(order * np.delete(x, i)) - np.log(k - 1)) / order for i in range(k)]
        value, _ = bound.combine(ops, array(log_w), 2.0)
        np.testing.assert_allclose(np.asarray(value), 2 * whole, rtol=1e-12)
        baseline = np.where(np.isfinite(others), others, 0)  # without weight it is none
        found = costs(bound, ops, array(log_w), 2.0)
        np.testing.assert_allclose(np.asarray(found), 2 * k * (whole - baseline), rtol=1e-9, atol=1e-11)


def costs(bound, ops, log_w, scale=1.0):
    return bound.costs(ops, log_w, bound.others(ops, log_w), scale)


def test_plates_beside_the_particles():
    x = np.random.default_rng(0).normal(size=(6, 3, 4))
    signal = costs(ImportanceWeighted(), JAX, jnp.asarray(x))
    one = costs(ImportanceWeighted(), JAX, jnp.asarray(x[:, 1, 2]))
    np.testing.assert_allclose(signal[:, 1, 2], one, rtol=1e-12)


def test_the_signal_of_many_particles_is_linear_in_their_number():
    """Every pair of a million particles would be a terabyte."""
    signal = costs(ImportanceWeighted(), TORCH, torch.linspace(0, 1, 1_000_000))
    assert signal.isfinite().all()
    compiled = jax.jit(lambda x: costs(ImportanceWeighted(), JAX, x))
    assert compiled.lower(jnp.zeros(4096)).compile().memory_analysis().temp_size_in_bytes < 4096 * 8 * 100
