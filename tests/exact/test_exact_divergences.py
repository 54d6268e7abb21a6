"""Divergences in closed form: the same mean as log p − log q, and nothing of the site's own noise."""

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

from ppl_estimators import AnalyticKL, DisARM, Enumerate, EstimatorError, ImportanceWeighted, KLAnnealed, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

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
    numpyro.factor("f", 1.3 * x - 0.7 * y + 2.1 * x * y)


def guide():
    a = numpyro.param("a", jnp.asarray(A))
    x = numpyro.sample("x", dist.Bernoulli(logits=a[0]))
    numpyro.sample("y", dist.Bernoulli(logits=a[1] + a[2] * x))


def exact(a):
    loss = 0.0
    for x in (0.0, 1.0):
        for y in (0.0, 1.0):
            log_q = bernoulli(a[0], x) + bernoulli(a[1] + a[2] * x, y)
            log_p = bernoulli(0.3, x) + bernoulli(0.5 - x, y)
            loss -= jnp.exp(log_q) * (1.3 * x - 0.7 * y + 2.1 * x * y + log_p - log_q)
    return loss


of_the_elbo = jax.jit(jax.value_and_grad(exact))


@pytest.mark.parametrize("objective", [AnalyticKL(), AnalyticKL("y"), AnalyticKL("x")], ids=repr)
def test_the_mean_is_that_of_the_elbo(objective):
    px, py = (1 / (1 + np.exp(-a)) for a in (A[0], A[1] + A[2] * np.array([0.0, 1.0])))
    (u, v), weights = grid(cells(px, 1 - px), cells(*py, *(1 - py)))
    value, wanted = of_the_elbo(A)
    bits = (np.array([0.0, 1.0]), np.array([1 - px, px]))
    (b, w), of_bits = grid(bits, cells(*py, *(1 - py)))
    for chosen in (DisARM(), Enumerate(), Reinforce()):
        antithetic = chosen == DisARM()
        tables = {
            "x": {"u": u[:, None]} if antithetic else {"value": b[:, None]},
            "y": {"u": (v if antithetic else w)[:, None]},
        }
        elbo = InjectedJax({"x": chosen, "y": DisARM()}, objective=objective)
        loss, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(A)}, tables)
        share = weights if antithetic else of_bits
        np.testing.assert_allclose(share @ loss, value, atol=1e-12)
        np.testing.assert_allclose(share @ gradient, wanted, atol=1e-12, err_msg=repr(chosen))


M = np.array([0.5, -1.0, 2.0])


def jax_normals(infer=None):
    def model():
        with numpyro.plate("n", 6, subsample_size=3):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("c", dist.Bernoulli(logits=z.sum(-1)))

    def guide():
        m, s = numpyro.param("m", jnp.asarray(M)), numpyro.param("s", jnp.asarray(0.3))
        with numpyro.plate("n", 6, subsample_size=3):
            d = dist.Normal(jnp.stack([m, -m], -1), jnp.exp(s)).to_event(1)
            numpyro.sample("z", d, infer=infer or {})
            numpyro.sample("c", dist.Bernoulli(logits=m))

    return model, guide


def torch_normals(infer=None):
    def model():
        with pyro.plate("n", 6, subsample_size=3):
            z = pyro.sample("z", tdist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("c", tdist.Bernoulli(logits=z.sum(-1)))

    def guide():
        m, s = pyro.param("m", torch.tensor(M)), pyro.param("s", torch.tensor(0.3))
        with pyro.plate("n", 6, subsample_size=3):
            d = tdist.Normal(torch.stack([m, -m], -1), s.exp()).to_event(1)
            pyro.sample("z", d, infer=infer or {})
            pyro.sample("c", tdist.Bernoulli(logits=m))

    return model, guide


def kl(m, s):
    """2 Σ KL(N(±m, e^s) ‖ N(0, 1)): every datum counts twice."""
    return 2 * 2 * jnp.sum(0.5 * (m**2 + jnp.exp(2 * s) - 1) - s)


def test_what_a_site_asks_for_and_what_the_objective_does():
    """In minibatches, with events and beside an enumerated site that the divergence has no part in."""
    asks = {"kl": "analytic"}

    def jax_gradient(infer, objective):
        model, guide = jax_normals(infer)
        elbo, p = JaxELBO({"c": Enumerate()}, objective=objective), {"m": jnp.asarray(M), "s": jnp.asarray(0.3)}
        return jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(1), p, model, guide)))(p)

    def torch_gradient(infer, objective):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model, guide = torch_normals(infer)
        TorchELBO({"c": Enumerate()}, objective=objective).loss_and_grads(model, guide)
        return {n: pyro.param(n).unconstrained().grad.numpy() for n in "ms"}

    for gradient in (jax_gradient, torch_gradient):
        found = [gradient(None, AnalyticKL("z")), gradient(asks, None), gradient(asks, KLAnnealed(1.0))]
        for n in "ms":
            np.testing.assert_allclose(found[1][n], found[0][n], atol=1e-12)
            np.testing.assert_allclose(found[2][n], found[0][n], atol=1e-12)
        assert abs(gradient(None, None)["s"] - found[0]["s"]) > 1e-3  # with the noise of log p − log q


def test_a_divergence_has_no_noise():
    """Nothing but the KL: the exact gradient, whatever is drawn."""
    wanted = jax.grad(kl, (0, 1))(jnp.asarray(M), 0.3)

    def prior():
        with numpyro.plate("n", 6, subsample_size=3):
            numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def posterior():
        m, s = numpyro.param("m", jnp.asarray(M)), numpyro.param("s", jnp.asarray(0.3))
        with numpyro.plate("n", 6, subsample_size=3):
            numpyro.sample("z", dist.Normal(jnp.stack([m, -m], -1), jnp.exp(s)).to_event(1))

    elbo = JaxELBO(objective=AnalyticKL())
    p = {"m": jnp.asarray(M), "s": jnp.asarray(0.3)}
    value, found = jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(5), p, prior, posterior)))(p)
    np.testing.assert_allclose(value, kl(jnp.asarray(M), 0.3), rtol=1e-12)
    np.testing.assert_allclose(found["m"], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(found["s"], wanted[1], rtol=1e-12)


def test_masked_elements_have_no_divergence():
    """In both libraries: of bits and normals, by an array and by False; a mask on one side is no divergence."""
    a, b, mask = np.array([0.4, -1.1]), np.array([-0.3, 0.8]), np.array([True, False])

    def program(lib, sample, plate, masked, array, logits, mask=mask, both=True):
        def part():
            with plate("n", 4, subsample_size=2):
                if not both and logits is b:
                    return draw()
                with masked(mask=array(mask)):
                    draw()

        def draw():
            sample("x", lib.Bernoulli(logits=array(logits)))
            sample("z", lib.Normal(array(logits), 0.5))

        return part

    def kl(a, b):  # of a bit, and of a normal of scale one half
        p = 1 / (1 + np.exp(-a))
        return p * (a - b) + np.logaddexp(0, b) - np.logaddexp(0, a) + 2 * (a - b) ** 2

    one = dist, numpyro.sample, numpyro.plate, numpyro.handlers.mask, jnp.asarray
    two = tdist, pyro.sample, pyro.plate, pyro.poutine.mask, torch.as_tensor
    jax_elbo, torch_elbo = (ELBO({"x": Reinforce()}, objective=AnalyticKL()) for ELBO in (JaxELBO, TorchELBO))
    for lib, loss in (
        (one, lambda *p: jax_elbo.loss(jax.random.key(0), {}, *p)),
        (two, torch_elbo.loss),
    ):
        for m in (mask, np.array(False)):
            found = loss(program(*lib, b, m), program(*lib, a, m))
            np.testing.assert_allclose(float(found), 2 * np.sum(m * kl(a, b)), rtol=1e-12, atol=1e-12)
        with pytest.raises(EstimatorError, match=r"site 'x': a closed divergence.*or mask it"):
            loss(program(*lib, b, both=False), program(*lib, a))


def test_a_scale_of_one_side_only_leaves_no_divergence():
    def program(sample, law, scale, factor):
        def part():
            with scale(scale=factor):
                sample("z", law(0.3, 1.0))

        return part

    jax_elbo, torch_elbo = (ELBO(objective=AnalyticKL()) for ELBO in (JaxELBO, TorchELBO))
    one = numpyro.sample, dist.Normal, numpyro.handlers.scale
    two = pyro.sample, tdist.Normal, pyro.poutine.scale
    for lib, loss in (
        (one, lambda *p: jax_elbo.loss(jax.random.key(0), {}, *p)),
        (two, torch_elbo.loss),
    ):
        assert float(loss(program(*lib, 3.0), program(*lib, 3.0))) == 0
        with pytest.raises(EstimatorError, match=r"site 'z': a closed divergence.*scale it differently"):
            loss(program(*lib, 3.0), program(*lib, 1.0))


@pytest.mark.parametrize("what", ["scale", "mask"])
def test_arrays_are_compared_by_value(what):
    """Within a minibatch, too; what a compiled step cannot know beforehand shows in its loss."""

    def program(sample, plate, handler, array, law, factors):
        def part(x=None):
            with plate("n", 4, subsample_size=2), handler(**{what: array(factors) if x is None else x}):
                sample("z", law(array([0.3, 0.4]), 1.0).mask(True).expand((2,)))

        return part

    one, other = ([3.0, 2.0], [3.0, 1.0]) if what == "scale" else ([True, True], [True, False])

    def elbo(ELBO):
        return ELBO(objective=AnalyticKL())

    ours = numpyro.sample, numpyro.plate, getattr(numpyro.handlers, what), jnp.asarray, dist.Normal
    theirs = pyro.sample, pyro.plate, getattr(pyro.poutine, what), torch.as_tensor, tdist.Normal
    for lib, loss in (
        (ours, lambda *p: elbo(JaxELBO).loss(jax.random.key(0), {}, *p)),
        (theirs, lambda *p: elbo(TorchELBO).loss(*p)),
        (theirs, lambda *p: elbo(TorchELBO).loss_and_grads(*p)),
    ):
        assert float(loss(program(*lib, one), program(*lib, one))) == 0
        with pytest.raises(EstimatorError, match=r"site 'z': a closed divergence.*scale it differently, or mask it"):
            loss(program(*lib, one), program(*lib, other))

    jax_elbo, torch_elbo = elbo(JaxELBO), elbo(TorchELBO)
    model, guide = program(*theirs, one), program(*theirs, other)
    assert float(torch_elbo.loss_and_grads(model, model)) == 0
    assert np.isnan(float(torch_elbo.loss_and_grads(model, guide)))  # no step waits to look again
    model, guide = program(*ours, one), program(*ours, other)
    compiled = jax.jit(lambda x, y: jax_elbo.loss(jax.random.key(0), {}, lambda: model(x), lambda: guide(y)))
    assert float(compiled(jnp.asarray(one), jnp.asarray(one))) == 0
    assert np.isnan(float(compiled(jnp.asarray(one), jnp.asarray(other))))


def test_where_there_is_none():
    def loss(model, guide, objective, particles=1):
        JaxELBO(objective=objective, num_particles=particles).loss(jax.random.key(0), {}, model, guide)

    def gamma():
        numpyro.sample("z", dist.Gamma(2.0, 1.0))

    def half():
        numpyro.sample("z", dist.HalfNormal(1.0))

    with pytest.raises(EstimatorError, match=r"site 'z': no divergence of HalfNormal from Gamma is known"):
        loss(gamma, half, AnalyticKL())

    def turned():
        y = numpyro.sample("y", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Bernoulli(0.3 + 0.2 * y))

    with pytest.raises(EstimatorError, match=r"site 'x': .* its law in the model depends on 'y', which"):
        loss(turned, guide, AnalyticKL("x"))

    def asking():
        numpyro.sample("z", dist.HalfNormal(1.0), infer={"kl": "analytic"})

    with pytest.raises(EstimatorError, match=r"site 'z': .* ImportanceWeighted\(\) is no sum of cost terms"):
        loss(half, asking, ImportanceWeighted(), 2)
    with pytest.raises(TypeError, match=r"AnalyticKL\(...\) takes names"):
        AnalyticKL(3)
