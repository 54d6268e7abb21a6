"""A guide with many sites: random numbers of sites that are alike come out of one operation, whatever their number."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ppl_estimators import DisARM, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO
from ppl_estimators.numpyro.run import Keys, site_key


def program(sites):
    def model():
        total = sum(numpyro.sample(f"z{i}", dist.Bernoulli(0.3)) for i in range(sites))
        numpyro.sample("x", dist.Normal(total, 1.0), obs=1.0)

    def guide():
        a = numpyro.param("a", jnp.zeros(sites))
        for i in range(sites):
            numpyro.sample(f"z{i}", dist.Bernoulli(logits=a[i]))

    return model, guide, {"a": jnp.linspace(-1.0, 1.0, sites)}


def occurrences(jaxpr, names):
    """How many equations, nested ones too, have a primitive of these names."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name in names
        for p in eqn.params.values():
            for inner in p if isinstance(p, (tuple, list)) else (p,):
                inner = getattr(inner, "jaxpr", inner)
                count += occurrences(inner, names) if hasattr(inner, "eqns") else 0
    return count


def random_operations(sites, estimator):
    model, guide, params = program(sites)
    elbo = EstimatorELBO(estimator, num_particles=2)
    traced = jax.make_jaxpr(lambda p, key: elbo.loss(key, p, model, guide))(params, jax.random.key(0))
    return occurrences(traced.jaxpr, ("random_fold_in", "random_bits", "random_split"))


def test_random_operations_do_not_grow_with_the_sites():
    few, many = (random_operations(n, DisARM()) for n in (3, 12))
    assert 0 < few == many


@pytest.mark.filterwarnings("ignore:.*score function without a baseline")
def test_a_librarys_own_draws_cost_one_operation_a_site():
    few, many = (random_operations(n, Reinforce()) for n in (3, 12))
    assert many - few == 12 - 3  # each distribution has its own sampler


def test_the_compiled_program_grows_with_the_sites_and_not_with_their_square():
    """XLA would take the product that credits the costs apart, and repeat it at every site."""
    elbo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)

    def instructions(sites):
        model, guide, params = program(sites)
        step = jax.jit(jax.grad(lambda p, key: elbo.loss(key, p, model, guide)))
        return step.lower(params, jax.random.key(0)).compile().as_text().count("\n")

    assert instructions(20) < 2.3 * instructions(10)  # 3.5 times without the barrier


def test_keys_made_together_are_those_made_one_by_one():
    names = ["z", "w_1", "a long name / with a scope"]
    keys = Keys(jax.random.key(3), names)
    for name in names:
        one = site_key(keys.guide, name)
        np.testing.assert_array_equal(jax.random.key_data(keys.known[name]), jax.random.key_data(one))
    folded = jax.random.key_data(keys.folded(names[1:], 2))
    for row, name in zip(folded, names[1:], strict=True):
        one = jax.random.fold_in(site_key(keys.guide, name), 2)
        np.testing.assert_array_equal(row, jax.random.key_data(one))
