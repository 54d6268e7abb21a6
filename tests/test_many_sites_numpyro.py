"""A guide with many sites: random numbers of sites that are alike come out of one operation, whatever their number."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ppl_estimators import ARMS, DisARM, Enumerate, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO
from ppl_estimators.numpyro.library import NumPyroLibrary, _side_by_side
from ppl_estimators.numpyro.run import key_of, keys_of


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


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")], ids=str)
def test_keys_of_one_key_are_of_its_kind(key):
    names = [f"site {i}" for i in range(30)]
    keys = keys_of(key, names)
    assert (keys.dtype, keys.shape) == (key.dtype, (30, *key.shape))
    np.testing.assert_array_equal(jax.random.uniform(keys[7]), jax.random.uniform(key_of(key, names[7])))
    drawn = jax.vmap(lambda k: jax.random.uniform(k, (2_000,)))(keys)
    assert len(np.unique(drawn)) > 0.99 * drawn.size


@pytest.mark.parametrize("count", [1, 4, 5, 7, 12, 13])
def test_jobs_in_chunks_of_one_size(count):
    """The program holds one copy of the job, and does the last one again where the chunks do not come out even."""
    traced, over = [], {"a": jnp.arange(count), "b": jnp.linspace(0.0, 1.0, count)}

    def one(job):
        traced.append(job)
        return {"sum": job["a"] + job["b"], "twice": 2 * job["a"]}

    found = _side_by_side(one, over, 4)
    np.testing.assert_array_equal(found["sum"], over["a"] + over["b"])
    np.testing.assert_array_equal(found["twice"], 2 * np.arange(count))
    assert len(traced) == 1


def test_keys_are_independent():
    """Also those of the keys that the seeds 0, 1, 2, ... make, whose bits hardly differ."""
    names = [f"site {i}" for i in range(30)]
    draws = jax.vmap(lambda s: jax.vmap(jax.random.uniform)(keys_of(jax.random.key(s), names)))(jnp.arange(400)).T
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=1)]))  # of names, and of seeds
    assert np.abs(correlation[~np.eye(60, dtype=bool)]).max() < 4.5 / np.sqrt(400)


@pytest.mark.usefixtures("double_precision")
def test_one_compiled_body_serves_every_level(monkeypatch):
    """The levels of a hierarchy evaluated by one body, and each by a copy of the program of its own: the same gradient
    from the same key. Pathwise sites between (of a transformed distribution, which keeps intermediates), a plate, and
    estimators with several values each."""
    data = jnp.array([0.3, -0.2, 1.1])

    def program(site, log_normal):
        top = site("top", dist.Bernoulli, jnp.asarray(0.3))
        w = log_normal("w", 0.4 * top - 0.1)
        mid = site("mid", dist.Categorical, jnp.array([0.2, -0.4, 0.1]) * (1 + w))
        with numpyro.plate("data", 3):
            low = site("low", dist.Bernoulli, 0.5 * mid - w)
            v = numpyro.sample("v", dist.Normal(low + top, 0.7))
            last = site("last", dist.Bernoulli, 0.2 * v - 0.3)
        return mid + 2.0 * last + v

    def site(name, kind, logits):
        return numpyro.sample(name, kind(logits=logits))

    def model():
        mean = program(site, lambda name, loc: numpyro.sample(name, dist.LogNormal(loc, 1.0)))
        with numpyro.plate("data", 3):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=data)

    def guide():
        a, m = numpyro.param("a", jnp.asarray(0.3)), numpyro.param("m", jnp.asarray(0.1))
        program(
            lambda name, kind, logits: site(name, kind, a + 1.3 * logits),
            lambda name, loc: numpyro.sample(name, dist.LogNormal(loc + m, 0.5)),
        )

    elbo = EstimatorELBO({"mid": Enumerate(), "top": ARMS(3), "l*": DisARM()}, max_parallel=4)
    params = {"a": jnp.asarray(0.3), "m": jnp.asarray(0.1)}
    assert len(elbo.step(jax.random.key(0), params, model, guide, (), {}).library.plan().groups) > 2

    def gradients():
        one = jax.value_and_grad(lambda p, key: elbo.loss(key, p, model, guide))
        return jax.jit(jax.vmap(one, (None, 0)))(params, jax.random.split(jax.random.key(1), 64))

    together = gradients()
    monkeypatch.setattr(NumPyroLibrary, "compiled", None)
    apart = gradients()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), together, apart)
    assert np.std(together[1]["a"]) > 0.1
