"""A weight on the KL part: the exact mean over the noise, a schedule counted in both libraries."""

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
from injected import InjectedJax, cells, grid, jax_gradients

from ppl_estimators import DisARM, Enumerate, EstimatorError, KLAnnealed, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro import with_estimators as jax_hook
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.pyro import with_estimators as torch_hook

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

A = np.array([0.4, -0.6, 1.1])


def bernoulli(a, b):
    return b * a - jax.nn.softplus(a)


def model():
    x = numpyro.sample("x", dist.Bernoulli(logits=0.3))
    y = numpyro.sample("y", dist.Bernoulli(logits=0.5 - x))
    numpyro.sample("o", dist.Bernoulli(logits=1.3 * x - 0.7 * y + 2.1 * x * y), obs=1.0)
    numpyro.factor("f", 0.4 * x)


def guide():
    a = numpyro.param("a", jnp.asarray(A))
    x = numpyro.sample("x", dist.Bernoulli(logits=a[0]))
    numpyro.sample("y", dist.Bernoulli(logits=a[1] + a[2] * x))


def exact(a, beta):
    loss = 0.0
    for x in (0.0, 1.0):
        for y in (0.0, 1.0):
            log_q = bernoulli(a[0], x) + bernoulli(a[1] + a[2] * x, y)
            kl = bernoulli(0.3, x) + bernoulli(0.5 - x, y) - log_q
            seen = bernoulli(1.3 * x - 0.7 * y + 2.1 * x * y, 1.0) + 0.4 * x
            loss -= jnp.exp(log_q) * (seen + beta * kl)
    return loss


of_the_weight = jax.jit(jax.value_and_grad(exact))


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_a_weight_on_the_kl_part(beta):
    px, py = (1 / (1 + np.exp(-a)) for a in (A[0], A[1] + A[2] * np.array([0.0, 1.0])))
    u, v = cells(px, 1 - px), cells(*py, *(1 - py))
    value, wanted = of_the_weight(A, beta)
    bits = (np.array([0.0, 1.0]), np.array([1 - px, px]))
    for x_noise, chosen in ((u, DisARM()), (bits, Enumerate()), (bits, Reinforce())):
        (x, y), weights = grid(x_noise, v)
        tables = {"x": {"u" if chosen == DisARM() else "value": x[:, None]}, "y": {"u": y[:, None]}}
        elbo = InjectedJax({"x": chosen, "y": DisARM()}, objective=KLAnnealed(beta))
        loss, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(A)}, tables)
        np.testing.assert_allclose(weights @ loss, value, atol=1e-12)
        np.testing.assert_allclose(weights @ gradient, wanted, atol=1e-12, err_msg=repr(chosen))


def test_enumerated_sites_of_the_guide_are_latent_too():
    """Nothing is drawn, so one evaluation is exact."""
    marked, beta = {"enumerate": "parallel"}, 0.3
    value, wanted = of_the_weight(A, beta)

    def jax_marked():
        a = numpyro.param("a", jnp.asarray(A))
        x = numpyro.sample("x", dist.Bernoulli(logits=a[0]), infer=marked)
        numpyro.sample("y", dist.Bernoulli(logits=a[1] + a[2] * x), infer=marked)

    elbo = JaxELBO(objective=KLAnnealed(beta))
    found = jax.value_and_grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, jax_marked))(jnp.asarray(A))
    np.testing.assert_allclose(found[0], value, atol=1e-12)
    np.testing.assert_allclose(found[1], wanted, atol=1e-12)

    def torch_model():
        x = pyro.sample("x", tdist.Bernoulli(logits=torch.tensor(0.3)))
        y = pyro.sample("y", tdist.Bernoulli(logits=0.5 - x))
        pyro.sample("o", tdist.Bernoulli(logits=1.3 * x - 0.7 * y + 2.1 * x * y), obs=torch.tensor(1.0))
        pyro.factor("f", 0.4 * x)

    def torch_marked():
        a = pyro.param("a", torch.tensor(A))
        x = pyro.sample("x", tdist.Bernoulli(logits=a[0]), infer=marked)
        pyro.sample("y", tdist.Bernoulli(logits=a[1] + a[2] * x), infer=marked)

    pyro.clear_param_store()
    loss = TorchELBO(objective=KLAnnealed(beta), max_plate_nesting=0).loss_and_grads(torch_model, torch_marked)
    np.testing.assert_allclose(loss, value, atol=1e-12)
    np.testing.assert_allclose(pyro.param("a").grad, wanted, atol=1e-12)


def schedule(step):
    return 1 - 0.5**step


def test_a_schedule_counts_the_steps_of_svi():
    """Enumerated, the loss of every step is exact: 1 − 2^−n is the weight of step n."""
    objective = KLAnnealed(schedule)

    def single():
        numpyro.sample("x", dist.Bernoulli(logits=numpyro.param("a", jnp.asarray(0.4))))

    def prior():
        x = numpyro.sample("x", dist.Bernoulli(logits=0.3))
        numpyro.factor("f", 0.4 * x)

    def torch_single():
        pyro.sample("x", tdist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4))))

    def torch_prior():
        x = pyro.sample("x", tdist.Bernoulli(logits=torch.tensor(0.3)))
        pyro.factor("f", 0.4 * x)

    @jax.jit
    @jax.grad
    def gradient(a, beta):
        return -sum(
            jnp.exp(bernoulli(a, x)) * (0.4 * x + beta * (bernoulli(0.3, x) - bernoulli(a, x))) for x in (0.0, 1.0)
        )

    wanted = [float(gradient(0.4, schedule(n))) for n in range(4)]

    svi = numpyro.infer.SVI(
        prior, jax_hook(single, objective=objective), numpyro.optim.SGD(0.0), JaxELBO(Enumerate(), objective=objective)
    )

    @jax.jit
    def slope_and_next(state):
        params = {**svi.get_params(state), **state.mutable_state}
        loss = lambda a: svi.loss.loss(jax.random.key(1), {**params, "a": a}, svi.model, svi.guide)  # noqa: E731
        return jax.grad(loss)(params["a"]), svi.update(state)[0]

    state, found = svi.init(jax.random.key(0)), []
    for _ in range(4):
        slope, state = slope_and_next(state)
        found.append(float(slope))
    np.testing.assert_allclose(found, wanted, atol=1e-12)

    pyro.clear_param_store()
    elbo, hooked = TorchELBO(Enumerate(), objective=objective), torch_hook(torch_single, objective=objective)
    found = []
    for _ in range(4):
        elbo.loss(torch_prior, hooked)  # counts nothing
        elbo.loss_and_grads(torch_prior, hooked)
        a = pyro.param("a").unconstrained()
        found.append(float(a.grad))
        a.grad = None
    np.testing.assert_allclose(found, wanted, atol=1e-12)

    with pytest.raises(EstimatorError, match=r"KLAnnealed\(schedule\) counts the steps.*with_estimators\(guide, objec"):
        JaxELBO(objective=objective).loss(jax.random.key(0), {}, numpyro.handlers.seed(model, 0), guide)


def test_weights_that_are_none():
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"KLAnnealed\(weight\) needs a number of 0 or more"):
            KLAnnealed(weight)
