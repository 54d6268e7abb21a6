"""The sleep phase: the guide learns from data that the model dreams. By hand, over every dream, in both libraries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as td
import pytest
import torch
from injected import InjectedJax, grid, jax_gradients
from numpyro.contrib.control_flow import scan

from ppl_estimators import EstimatorError, LeaveOneOut, Reinforce, WakeSleep
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.testing import assert_unbiased, exact_gradient

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

N, B, T, A = 3, 2, 0.4, np.array([0.3, -0.8])
X = np.array([1.0, 0.0, 1.0])
ASLEEP = WakeSleep(wake_theta=0.0, wake_phi=0.0, sleep_phi=1.3)


def model(x):
    t = numpyro.param("t", T)
    with numpyro.plate("data", N, subsample_size=B) as i:
        z = numpyro.sample("z", dist.Bernoulli(logits=t))
        numpyro.sample("x", dist.Bernoulli(logits=1.5 * z - 0.5 + t), obs=x[i])


def guide(x, observations=None):
    a = numpyro.param("a", jnp.asarray(A))
    with numpyro.plate("data", N, subsample_size=B) as i:
        x = observations["x"] if observations else x[i]
        numpyro.sample("z", dist.Bernoulli(logits=a[0] + a[1] * x))


def torch_model(x):
    t = pyro.param("t", torch.tensor(T))
    with pyro.plate("data", N, subsample_size=B) as i:
        z = pyro.sample("z", td.Bernoulli(logits=t))
        pyro.sample("x", td.Bernoulli(logits=1.5 * z - 0.5 + t), obs=x[i])


def torch_guide(x, observations=None):
    a = pyro.param("a", torch.tensor(A))
    with pyro.plate("data", N, subsample_size=B) as i:
        x = observations["x"] if observations else x[i]
        pyro.sample("z", td.Bernoulli(logits=a[0] + a[1] * x))


def log_p(b, logits):
    return b * logits - jax.nn.softplus(logits)


def dreams(a):
    """−N E_p[log q(z | x)], by hand."""
    z, x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]).T
    p = jnp.exp(log_p(z, T) + log_p(x, 1.5 * z - 0.5 + T))
    return -N * jnp.sum(p * log_p(z, a[0] + a[1] * x))


def test_sleep_by_hand():
    """Over the noise of a particle and of its dream; the same in Pyro, by every state."""
    by_hand = 1.3 * jax.grad(dreams)(jnp.asarray(A))

    cells = [(np.arange(2.0), np.full(2, 0.5))] * 4  # of two elements z and x, weighed below
    (z1, z2, x1, x2), even = grid(*cells)
    z, x = np.stack([z1, z2], -1), np.stack([x1, x2], -1)
    weights = 16 * even * np.exp(np.sum(log_p(z, T) + log_p(x, 1.5 * z - 0.5 + T), -1))
    tables = {
        "z": {"value": np.zeros((16, 2, 2))},  # of which nothing counts
        "dreamt z": {"value": np.stack([z, z], 1)},
        "dreamt x": {"value": np.stack([x, x], 1)},
    }
    elbo = InjectedJax(num_particles=2, objective=ASLEEP)
    params = {"a": jnp.asarray(A), "t": jnp.asarray(T)}
    _, gradient = jax_gradients(
        elbo, lambda: model(jnp.asarray(X)), lambda **k: guide(jnp.asarray(X), **k), params, tables
    )
    np.testing.assert_allclose(weights @ gradient, [*by_hand, 0.0], atol=1e-12)
    for exact in (
        exact_gradient(model, guide, jnp.asarray(X), objective=ASLEEP, num_particles=2),
        exact_gradient(torch_model, torch_guide, torch.tensor(X), objective=ASLEEP, num_particles=2),
    ):
        np.testing.assert_allclose(exact.gradient["a"], by_hand, atol=1e-12)
        assert exact.gradient["t"] == 0


def test_phases_add_up():
    """Each phase with its own weight, in both libraries."""
    one, other = WakeSleep(2.0, 0.5, 0.7), [WakeSleep(2.0, 0.5), WakeSleep(0.0, 0.0, 0.7)]
    found = {}
    for name, program in {
        "jax": (model, guide, jnp.asarray(X)),
        "torch": (torch_model, torch_guide, torch.tensor(X)),
    }.items():
        whole, wake, sleep = (exact_gradient(*program, objective=o, num_particles=2) for o in (one, *other))
        found[name] = np.concatenate([np.ravel(whole.gradient[k]) for k in "at"])
        parts = [np.ravel(wake.gradient[k] + sleep.gradient[k]) for k in "at"]
        np.testing.assert_allclose(found[name], np.concatenate(parts), atol=1e-12)
        assert whole.value == wake.value and abs(wake.gradient["t"]) > 0.1
    np.testing.assert_allclose(found["jax"], found["torch"], atol=1e-12)


def test_drawn_dreams_of_pyro():
    """Particles side by side: observations have their axis."""
    program = torch_model, torch_guide, torch.tensor(X)
    reference = exact_gradient(*program, objective=ASLEEP, num_particles=2).gradient
    elbo = TorchELBO(objective=ASLEEP, num_particles=50, vectorize_particles=True)
    assert_unbiased(elbo, *program, reference=reference, able_to_see=0.2)


def test_drawn_dreams_of_numpyro():
    objective = WakeSleep(0.7, 0.5, 1.3)
    assert_unbiased(JaxELBO(objective=objective, num_particles=2), model, guide, jnp.asarray(X), able_to_see=0.1)


def test_dreams_of_a_scan():
    """Observed steps inside of it are drawn too."""

    def chain(x):
        def step(z, x):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.8 * z - 0.3))
            numpyro.sample("x", dist.Bernoulli(logits=1.5 * z - 0.5), obs=x)
            return z, None

        scan(step, 0, x)

    def along(x, observations=None):
        a = numpyro.param("a", jnp.asarray(A))
        scan(lambda c, x: (c, numpyro.sample("z", dist.Bernoulli(logits=a[0] + a[1] * x))),
             0, observations["x"] if observations else x)  # fmt: skip

    x = jnp.array([1.0, 0.0])
    exact = exact_gradient(chain, along, x, objective=ASLEEP, num_particles=2)

    def by_hand(a):
        z0, x0, z1, x1 = np.array([[i >> b & 1 for b in range(4)] for i in range(16)]).T
        p = sum(log_p(z, 0.8 * up - 0.3) + log_p(x, 1.5 * z - 0.5) for up, z, x in ((0, z0, x0), (z0, z1, x1)))
        return -1.3 * jnp.sum(jnp.exp(p) * (log_p(z0, a[0] + a[1] * x0) + log_p(z1, a[0] + a[1] * x1)))

    np.testing.assert_allclose(exact.gradient["a"], jax.grad(by_hand)(jnp.asarray(A)), atol=1e-12)
    elbo = JaxELBO(Reinforce(LeaveOneOut()), objective=ASLEEP, num_particles=50)
    assert_unbiased(elbo, chain, along, x, reference=exact.gradient, able_to_see=0.2)


def test_no_dream_moves_the_model():
    """Not by values with a derivative either, in both libraries."""
    elbos = [E(objective=ASLEEP, num_particles=2) for E in (JaxELBO, TorchELBO)]

    def guide(d, sample, param, observations=None):
        scale = 1.0 if observations is None else 1.0 + observations["x"] ** 2
        sample("z", d.Normal(param("a"), scale))

    def model(d, sample, param, observed):
        z = sample("z", d.Normal(param("t"), 1.0))
        sample("x", d.Normal(z * param("t"), 1.0), obs=observed)

    jax_program = (
        lambda: model(dist, numpyro.sample, lambda n: numpyro.param(n, 0.5), 0.3),
        lambda observations=None: guide(dist, numpyro.sample, lambda n: numpyro.param(n, 0.2), observations),
    )
    found = jax.grad(lambda p: elbos[0].loss(jax.random.key(0), p, *jax_program))({"a": 0.2, "t": 0.5})
    assert found["t"] == 0 and abs(found["a"]) > 1e-3
    pyro.clear_param_store()
    torch_program = (
        lambda: model(td, pyro.sample, lambda n: pyro.param(n, torch.tensor(0.5)), torch.tensor(0.3)),
        lambda observations=None: guide(td, pyro.sample, lambda n: pyro.param(n, torch.tensor(0.2)), observations),
    )
    elbos[1].loss_and_grads(*torch_program)
    t, a = (pyro.param(n).grad for n in "ta")
    assert (t is None or t == 0) and abs(a) > 1e-3


def test_wake_and_sleep_of_one_particle():
    """The first of these algorithms: one draw of the guide for the model, one dream for the guide. By default no
    evaluation is spent on costs, of which nothing counts."""
    whole = WakeSleep(wake_phi=0.0, sleep_phi=1.0)
    exact = exact_gradient(model, guide, jnp.asarray(X), objective=whole, num_particles=1).gradient
    elbo = exact_gradient(model, guide, jnp.asarray(X)).gradient
    np.testing.assert_allclose(exact["t"], elbo["t"], atol=1e-12)
    np.testing.assert_allclose(exact["a"], jax.grad(dreams)(jnp.asarray(A)), atol=1e-12)
    assert_unbiased(JaxELBO(objective=whole), model, guide, jnp.asarray(X), reference=exact)
    assert TorchELBO(objective=whole).loss_and_grads(torch_model, torch_guide, torch.tensor(X)) > 0
    for lib, program in (
        (lambda *p: JaxELBO(objective=WakeSleep()).loss(jax.random.key(0), {}, *p), (model, guide, jnp.asarray(X))),
        (TorchELBO(objective=WakeSleep()).loss, (torch_model, torch_guide, torch.tensor(X))),
    ):
        with pytest.raises(
            EstimatorError, match=r"has mean zero, got num_particles=1. Pass num_particles=2 or more, or WakeSleep\(w"
        ):
            lib(*program)
