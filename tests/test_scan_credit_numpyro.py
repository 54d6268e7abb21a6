"""Sites inside NumPyro's scan are credited with the costs of their own and of later steps, and nothing that they can
move is left out: other directions, sites after the scan, plates inside."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from ppl_estimators import Learned, LeaveOneOut, MovingAverage, Reinforce
from ppl_estimators.core.credit import Graph
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.testing import exact_gradient

DATA = jnp.array([0.3, -1.0, 1.4, 0.2])
POINT = {"a": jnp.array([0.5, -0.3, 0.2, 0.4]), "b": jnp.asarray(0.6)}
DRAWS = 20_000


def program(*, guide_reversed=False, model_reversed=False, after=False, later=False):
    """z_t depends on z_{t-1} in guide and model; ``after``: an observation of the end and of the first step;
    ``later``: a site of the guide that the whole path moves, and that moves every step of the model."""

    def model():
        shift = numpyro.sample("w", dist.Bernoulli(0.5)) if later else 0.0

        def step(carry, y):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.7 * carry - 0.2))
            with numpyro.plate("pair", 2):
                numpyro.sample("x", dist.Normal(z + 0.3 * carry + 0.8 * shift, 1.0), obs=y + jnp.arange(2.0))
            return z + 0.4 * carry, z

        end, path = scan(step, 0.0, DATA, reverse=model_reversed)
        if after:
            numpyro.sample("end", dist.Normal(path[0] + end, 1.0), obs=1.0)

    def guide():
        a, b = numpyro.param("a", POINT["a"]), numpyro.param("b", POINT["b"])

        def step(carry, logit):
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=logit + b * carry))
            return z, z

        _, path = scan(step, 0.0, a, reverse=guide_reversed)
        if later:
            numpyro.sample("w", dist.Bernoulli(logits=path[0] - path[3] - 0.5))

    return model, guide


def gradients(elbo, model, guide):
    kept = {}
    with numpyro.handlers.seed(rng_seed=0):
        trace = numpyro.handlers.trace(guide).get_trace()
    noise = np.random.default_rng(0)
    for name, msg in trace.items():
        if msg["type"] == "param" and name not in POINT:  # networks are moved from zero, where they do nothing
            kept[name] = msg["value"] + 0.15 * noise.normal(size=msg["value"].shape)
        elif msg["type"] == "mutable":
            kept[name] = msg["value"]

    def loss(p, key):
        return elbo.loss_with_mutable_state(key, {**kept, **p}, model, guide)["loss"]

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(POINT, jax.random.split(jax.random.key(1), DRAWS))
    return np.concatenate([np.asarray(found["a"]), np.asarray(found["b"])[:, None]], axis=1)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    "how", [{"after": True}, {"later": True}, {"model_reversed": True}, {"guide_reversed": True}], ids=str
)
def test_nothing_that_a_step_moves_is_left_out(how):
    model, guide = program(**how)
    exact = exact_gradient(model, guide, params=POINT).gradient
    exact = np.append(exact["a"], exact["b"])
    programs = [(EstimatorELBO(num_particles=2), guide)]
    if "later" not in how:  # whose noise would hide all
        learned = {"z": Reinforce(MovingAverage() + Learned(hidden=4))}  # its inputs are the step's own parameters
        programs.append((EstimatorELBO(num_particles=3), with_estimators(guide, learned)))
    for elbo, hooked in programs:
        found = gradients(elbo, model, hooked)
        error = found.std(0) / DRAWS**0.5
        np.testing.assert_array_less(np.abs(found.mean(0) - exact), 5 * error)
        assert error.max() < 0.1 * np.abs(exact).max()


@pytest.mark.usefixtures("double_precision")
def test_the_costs_of_earlier_steps_are_left_out(monkeypatch):
    model, guide = program()
    elbo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)
    own = gradients(elbo, model, guide).var(0)
    monkeypatch.setattr(Graph, "ordered", lambda self, site, term: False)
    whole = gradients(elbo, model, guide).var(0)
    assert own[3] < 0.5 * whole[3]  # the last step
    assert own.sum() < 0.8 * whole.sum()
    np.testing.assert_allclose(own[0], whole[0], rtol=0.1)  # every cost is of the first step or later
