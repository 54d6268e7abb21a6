"""What a user gives a baseline: one number, or one row, for each plate element; every other shape is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch

from ppl_estimators import EstimatorError, Given, Learned, MovingAverage, Reinforce, Repeat
from ppl_estimators.core.keep import Kept
from ppl_estimators.core.site import Plate, Site
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro import with_estimators as jax_hook
from ppl_estimators.numpyro.ops import OPS as JAX
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.pyro import with_estimators as torch_hook
from ppl_estimators.pyro.ops import OPS as TORCH

PLATE, OUTER = Plate("p", -1, 5), Plate("o", -3, 4)
ALONE = Site("z", "Bernoulli", "bernoulli", (), (), frozenset(), lead=1)
ROW = Site("z", "Bernoulli", "bernoulli", (5,), (), frozenset({PLATE}), lead=1)
NESTED = Site("z", "Bernoulli", "bernoulli", (4, 2, 5), (), frozenset({PLATE, OUTER}), lead=1)  # -2 has no plate
FREE = Site("z", "Bernoulli", "bernoulli", (2,), (), frozenset(), lead=1)

#: site, shape of what is given, shape of the prediction; of three particles
GIVEN = [
    (ALONE, (3,), (3,)),
    (ALONE, (), (1,)),
    (ROW, (3, 5), (3, 5)),
    (ROW, (3, 1), (3, 1)),
    (ROW, (3, 5, 1), (3, 5)),
    (ROW, (3,), (3, 1)),
    (ROW, (5,), (1, 5)),  # no particle axis
    (NESTED, (3, 4, 1, 5), (3, 4, 1, 5)),
    (NESTED, (3, 5), (3, 1, 1, 5)),
    (NESTED, (4, 1, 5), (1, 4, 1, 5)),
    (FREE, (3,), (3, 1)),
]
ROWS = [
    (ALONE, (3, 7), (3, 7)),
    (ALONE, (3, 2, 7), (3, 14)),
    (ROW, (3, 5, 7), (3, 5, 7)),
    (ROW, (3, 5), (3, 5, 1)),
    (ROW, (3, 1, 7), (3, 1, 7)),
    (ROW, (5, 7), (1, 5, 7)),
    (NESTED, (3, 4, 1, 5, 7), (3, 4, 1, 5, 7)),
    (FREE, (3, 2), (3, 1, 2)),
]
REFUSED = [(ALONE, (3, 2)), (ROW, (3, 4)), (ROW, (3, 5, 2)), (NESTED, (3, 4, 2, 5)), (FREE, (3, 2))]


def costs(site, particles=3):
    return np.zeros((particles, *site.plate_shape))


@pytest.mark.parametrize("ops", [JAX, TORCH], ids=["jax", "torch"])
def test_what_fits(ops):
    for site, shape, wanted in GIVEN:
        kept = Kept(given={"value": ops.asarray(np.random.default_rng(0).normal(size=shape))})
        found = Given(None).predict(ops, site, ops.asarray(costs(site)), kept)
        assert tuple(found.shape) == wanted, (shape, wanted)
        twice = Given(None).predict(ops, site, ops.asarray(costs(site, 6)), kept)  # two draws in each particle
        if wanted[0] == 3:
            np.testing.assert_array_equal(np.asarray(twice), np.concatenate([np.asarray(found)] * 2))
    for site, shape, wanted in ROWS:
        seen = []

        def network(x, seen=seen):
            seen.append(tuple(x.shape))
            return x[..., 0]

        kept = Kept(given={"inputs": ops.asarray(np.ones(shape))}, networks={"baseline": network})
        Learned().predict(ops, site, ops.asarray(costs(site)), kept)
        assert seen == [wanted], (shape, seen, wanted)


@pytest.mark.parametrize("ops", [JAX, TORCH], ids=["jax", "torch"])
def test_what_does_not_fit(ops):
    for site, shape in REFUSED:
        kept = Kept(given={"value": ops.asarray(np.ones(shape))})
        with pytest.raises(EstimatorError, match=r"site 'z': Given\(value\) got the shape .*Give one number for each"):
            Given(None).predict(ops, site, ops.asarray(costs(site)), kept)
    for site, shape in [(ROW, (3, 4, 7)), (ROW, (3,)), (NESTED, (3, 4, 2, 5, 7))]:
        kept = Kept(given={"inputs": ops.asarray(np.ones(shape))})
        with pytest.raises(EstimatorError, match=r"site 'z': Learned\(inputs=...\) got the shape .*Give one row"):
            Learned().predict(ops, site, ops.asarray(costs(site)), kept)


def program(sample, plate, d, one):
    def model(_):
        with plate("n", 5):
            sample("x", d.Normal(1.0 * sample("z", d.Bernoulli(0.4 * one)), 1.0), obs=one * 0.3)

    def guide(_):
        with plate("n", 5):
            sample("z", d.Bernoulli(0.6 * one))

    return model, guide


@pytest.mark.parametrize("wrap", [Reinforce, lambda b: Repeat(2, Reinforce(b))], ids=["alone", "repeated"])
@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [(Given, (5,), (5, 2)), (lambda f: MovingAverage() + Learned(inputs=f, hidden=3), (5, 7), (4, 7))],
    ids=["Given", "Learned"],
)
def test_both_libraries_refuse_by_name(make, right, wrong, wrap):
    estimator = wrap(make(lambda x: x))
    message = r"site 'z': (Given|Learned).* got the shape \(\d, [45], \d\)"
    model, guide = program(numpyro.sample, numpyro.plate, jdist, jnp.ones(5))

    def loss(shape):
        hook = jax_hook(guide, {"z": estimator})
        svi = numpyro.infer.SVI(model, hook, numpyro.optim.SGD(0.1), JaxELBO(num_particles=3))
        x = jnp.ones(shape)
        return svi.update(svi.init(jax.random.key(0), x), x)[1]

    assert np.isfinite(loss(right))
    with pytest.raises(EstimatorError, match=message):
        loss(wrong)
    model, guide = program(pyro.sample, pyro.plate, tdist, torch.ones(5))
    for options in ({}, {"vectorize_particles": True, "max_plate_nesting": 1}):
        pyro.clear_param_store()
        hook = torch_hook(guide, {"z": estimator})
        assert np.isfinite(TorchELBO(num_particles=3, **options).loss_and_grads(model, hook, torch.ones(right)))
        pyro.clear_param_store()
        with pytest.raises(EstimatorError, match=r"site 'z': (Given|Learned).* got the shape"):
            TorchELBO(num_particles=3, **options).loss_and_grads(model, hook, torch.ones(wrong))
