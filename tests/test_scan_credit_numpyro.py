"""Sites inside NumPyro's scan: what credit by steps is worth, baselines for each step, and what is refused
(tests/exact/test_exact_scans.py has that the rest is exact)."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from ppl_estimators import (
    REBAR,
    DisARM,
    EstimatorError,
    Learned,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
)
from ppl_estimators.core.credit import Graph
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

#: NumPyro's `SVI.init` replays kept state into a scan
replays_state = pytest.mark.filterwarnings("ignore:shape requires ndarray")

DATA = jnp.array([0.3, -1.0, 1.4, 0.2])
POINT = {"a": jnp.array([0.5, -0.3, 0.2, 0.4]), "b": jnp.asarray(0.6)}
DRAWS = 20_000


def program(data=DATA, infer=None):
    """z_t depends on z_{t-1} in guide and model. ``infer``: of the guide's site, given what it carries and a datum."""

    def model():
        def step(carry, y):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.7 * carry - 0.2))
            with numpyro.plate("pair", 2):
                numpyro.sample("x", dist.Normal(z + 0.3 * carry, 1.0), obs=y + jnp.arange(2.0))
            return z + 0.4 * carry, None

        scan(step, 0.0, data)

    def guide():
        a, b = numpyro.param("a", jnp.resize(POINT["a"], data.shape)), numpyro.param("b", POINT["b"])

        def step(carry, x):
            own = {} if infer is None else infer(carry, x[1])
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=x[0] + b * carry), infer=own)
            return z, z

        scan(step, 0.0, (a, data))

    return model, guide


def gradients(elbo, model, guide):
    def loss(p, key):
        return elbo.loss(key, p, model, guide)

    found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(POINT, jax.random.split(jax.random.key(1), DRAWS))
    return np.concatenate([np.asarray(found["a"]), np.asarray(found["b"])[:, None]], axis=1)


@pytest.mark.usefixtures("double_precision")
def test_the_costs_of_earlier_steps_are_left_out(monkeypatch):
    model, guide = program()
    elbo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)
    own = gradients(elbo, model, guide).var(0)
    monkeypatch.setattr(Graph, "window", lambda self, site, term: None)
    whole = gradients(elbo, model, guide).var(0)
    assert own[3] < 0.5 * whole[3]  # the last step
    assert own.sum() < 0.8 * whole.sum()
    np.testing.assert_allclose(own[0], whole[0], rtol=0.1)  # every cost is of the first step or later


def run(model, guide, steps=5):
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), EstimatorELBO())
    return svi.run(jax.random.key(0), steps, progress_bar=False)


@replays_state
def test_each_step_has_its_own_average_and_a_network_sees_what_the_site_names():
    """The spec is made inside the step, of what the scan carries."""
    seen = []

    def infer(carry, y):
        inputs = jnp.stack([carry, y, carry * y])
        seen.append(inputs.shape)
        return {"estimator": Reinforce(MovingAverage() + Learned(inputs=inputs, hidden=4))}

    result = run(*hooked(*program(infer=infer)))
    assert result.params["z$1_baseline.w1"].shape == (3, 4)
    assert float(jnp.abs(result.params["z$1_baseline.w2"]).max()) > 0  # it is trained
    mean = result.state.mutable_state["z$state"]["0_mean"]
    assert mean.shape == (4,)
    assert mean[3] > mean[0] + 3  # of fewer costs
    assert seen


def hooked(model, guide, estimators=None):
    return model, with_estimators(guide, estimators)


def test_inputs_from_outside_have_a_row_for_each_step():
    rows = Reinforce(Learned(inputs=lambda: jnp.arange(8.0).reshape(4, 2), hidden=3))
    result = run(*hooked(*program(), {"z": rows}))
    assert result.params["z$baseline.w1"].shape == (2, 3)


@replays_state
def test_a_series_of_another_length_has_other_averages():
    estimators = {"z": Reinforce(MovingAverage())}
    result = run(*hooked(*program(), estimators))
    model, guide = hooked(*program(data=jnp.ones(3)), estimators)
    state = {**POINT, **result.state.mutable_state, "a": jnp.ones(3)}
    with pytest.raises(EstimatorError, match=r"site 'z': MovingAverage\(\) keeps .* 4 steps.*are 3.*Pad the series"):
        EstimatorELBO().loss(jax.random.key(0), state, model, guide)


def test_what_a_scan_refuses():
    model, guide = program()
    with pytest.raises(EstimatorError, match=r"site 'z': REBAR .* steps of a scan.*Use RELAX\(\)"):
        EstimatorELBO({"z": REBAR()}).loss(jax.random.key(0), POINT, model, with_estimators(guide, {"z": REBAR()}))
    with (
        jax.disable_jit(),
        pytest.raises(EstimatorError, match=r"site 'z': DisARM takes the steps of a scan one"),
    ):
        EstimatorELBO({"z": DisARM()}).loss(jax.random.key(0), POINT, model, guide)
