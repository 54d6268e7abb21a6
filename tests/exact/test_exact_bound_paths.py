"""Pathwise sites under bounds: by quadrature over the noise of two particles, the mean of the doubly reparameterised
gradient is that of the plain one, which differentiates the bound itself."""

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
from injected import (
    FromTableJax,
    FromTableTorch,
    InjectedJax,
    InjectedTorch,
    grid,
    jax_gradients,
    legendre,
    torch_gradients,
)
from scipy.stats import binom

from ppl_estimators import (
    DisARM,
    DoublyReparameterized,
    EstimatorError,
    GumbelSoftmax,
    GumbelStraightThrough,
    ImplicitPathwise,
    ImportanceWeighted,
    LeaveOneOut,
    Pathwise,
    Reinforce,
    RejectionPathwise,
    Renyi,
    StickingTheLanding,
)
from ppl_estimators.numpyro import EstimatorELBO

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


# ---- draws of an estimator's own ------------------------------------------------------------------------------------


class RelaxedJax(FromTableJax):
    """Mixtures take their draws as they are, relaxed bits uniform noise."""

    def value(self, name, fn, key, step=None):
        x = jnp.asarray(self.table[name]["value"])[self.row]
        if isinstance(fn, dist.TransformedDistribution):
            x = jax.nn.sigmoid(fn.base_dist.loc + fn.base_dist.scale * jax.scipy.special.logit(x))
        return x, []


class OwnJax(InjectedJax):
    source = RelaxedJax


class RelaxedTorch(FromTableTorch):
    def value(self, name, fn, *args, **kwargs):
        x = torch.as_tensor(np.array(self.table[name]["value"]))[self.row]
        relaxed = isinstance(fn, td.RelaxedBernoulli)
        return torch.sigmoid((fn.base_dist.logits + x.logit()) / fn.base_dist.temperature) if relaxed else x


class OwnTorch(InjectedTorch):
    source = RelaxedTorch


WHERE = {"m": np.array([-0.8, 0.7]), "w": np.array(0.3)}


def mixture():
    def cost(z, sin):
        return sin(1.3 * z) - 0.2 * z**2

    def model():
        numpyro.factor("f", cost(numpyro.sample("z", dist.Normal(0.2, 1.3)), jnp.sin))

    def guide():
        m, w = numpyro.param("m", jnp.zeros(2)), numpyro.param("w", 0.0)
        fn = dist.MixtureSameFamily(dist.Categorical(logits=jnp.stack([w, -w])), dist.Normal(m, jnp.array([0.7, 1.1])))
        numpyro.sample("z", fn)

    def model_torch():
        pyro.factor("f", cost(pyro.sample("z", td.Normal(torch.tensor(0.2), 1.3)), torch.sin))

    def guide_torch():
        m, w = (pyro.param(k, torch.tensor(WHERE[k])) for k in "mw")
        parts = td.Normal(m, torch.tensor([0.7, 1.1]))
        pyro.sample("z", td.MixtureSameFamily(td.Categorical(logits=torch.stack([w, -w])), parts))

    def density(z):
        share, scale = jax.nn.softmax(jnp.array([0.3, -0.3])), jnp.array([0.7, 1.1])
        return jax.nn.logsumexp(dist.Normal(WHERE["m"], scale).log_prob(z[:, None]) + jnp.log(share), axis=-1)

    z = np.linspace(-7, 7, 101)
    return (model, guide), (model_torch, guide_torch), (z, 0.14 * np.exp(np.asarray(density(jnp.asarray(z)))))


def relaxed_bit():
    """A Concrete site in guide and model: the library's own draw, whose density is its own."""

    def model():
        y = numpyro.sample("z", dist.RelaxedBernoulliLogits(0.6, 0.4))
        numpyro.factor("f", 1.4 * y + jnp.sin(3 * y))

    def guide():
        m, w = numpyro.param("m", jnp.zeros(2)), numpyro.param("w", 0.0)
        numpyro.sample("z", dist.RelaxedBernoulliLogits(0.8, m[0] + w * m[1]))

    def model_torch():
        y = pyro.sample("z", td.RelaxedBernoulli(torch.tensor(0.6), logits=torch.tensor(0.4)))
        pyro.factor("f", 1.4 * y + torch.sin(3 * y))

    def guide_torch():
        m, w = (pyro.param(k, torch.tensor(WHERE[k])) for k in "mw")
        pyro.sample("z", td.RelaxedBernoulli(torch.tensor(0.8), logits=m[0] + w * m[1]))

    return (model, guide), (model_torch, guide_torch), legendre(40)


@pytest.mark.parametrize(("program", "own"), [(mixture, ImplicitPathwise()), (relaxed_bit, Pathwise())])
def test_draws_with_a_density_of_their_own_are_exact(program, own):
    """By quadrature over two particles; and the same in Pyro at some of the nodes."""
    (model, guide), twin, nodes = program()
    (z1, z2), weights = grid(nodes, nodes)
    tables = {"z": {"value": np.stack([z1, z2], -1)}}
    params = {k: jnp.asarray(v) for k, v in WHERE.items()}
    few = np.argsort(-weights)[::300][:3]  # not where a relaxed bit is all but 1
    for objective in (ImportanceWeighted(), Renyi(-0.5)):
        found = []
        for estimator in (own, DoublyReparameterized(own)):
            elbo = OwnJax({"z": estimator}, num_particles=2, objective=objective)
            loss, gradient = jax_gradients(elbo, model, guide, params, tables)
            found.append((weights @ loss, weights @ gradient, weights @ gradient**2))
            pyro.clear_param_store()
            elbo = OwnTorch({"z": estimator}, num_particles=2, objective=objective)
            some = {"z": {"value": tables["z"]["value"][few]}}
            losses, gradients = torch_gradients(elbo, *twin, WHERE, some)
            np.testing.assert_allclose(losses, loss[few], rtol=1e-9)
            np.testing.assert_allclose(gradients, gradient[few], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-12)
        np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-6)
        assert np.abs(found[0][1]).min() > 0.01
        assert (found[1][2] != found[0][2]).any()


def bits():
    """A bit and one that depends on it, for each datum: one bound for each."""
    data = np.array([0.3, -0.8, 1.1])

    def model():
        with numpyro.plate("data", 3):
            b = numpyro.sample("b", dist.Bernoulli(logits=0.3))
            c = numpyro.sample("c", dist.Bernoulli(logits=0.5 - b))
            numpyro.factor("f", jnp.sin(2 * b + data) - 1.4 * b * c + c * data)

    def guide():
        a = numpyro.param("a", jnp.zeros(3))
        with numpyro.plate("data", 3):
            b = numpyro.sample("b", dist.Bernoulli(logits=a[0] + data))
            numpyro.sample("c", dist.Bernoulli(logits=a[1] + a[2] * b))

    def model_torch():
        x = torch.tensor(data)
        with pyro.plate("data", 3):
            b = pyro.sample("b", td.Bernoulli(logits=torch.tensor(0.3)))
            c = pyro.sample("c", td.Bernoulli(logits=0.5 - b))
            pyro.factor("f", torch.sin(2 * b + x) - 1.4 * b * c + c * x)

    def guide_torch():
        a = pyro.param("a", torch.tensor(BITS))
        with pyro.plate("data", 3):
            b = pyro.sample("b", td.Bernoulli(logits=a[0] + torch.tensor(data)))
            pyro.sample("c", td.Bernoulli(logits=a[1] + a[2] * b))

    def log_w(a, fixed, soften, u):
        """``u [2, K, data]``; the parameters of log q are ``fixed``."""

        def log_prob(logits, v):
            return v * logits - jax.nn.softplus(logits)

        b = soften(a[0] + data, u[0])
        c = soften(a[1] + a[2] * b, u[1])
        log_p = log_prob(0.3, b) + log_prob(0.5 - b, c) + jnp.sin(2 * b + data) - 1.4 * b * c + c * data
        return log_p - log_prob(fixed[0] + data, b) - log_prob(fixed[1] + fixed[2] * b, c)

    return (model, guide), (model_torch, guide_torch), log_w


BITS = np.array([0.4, -0.6, 0.9])


@pytest.mark.parametrize("objective", [ImportanceWeighted(), Renyi(-0.5)], ids=repr)
@pytest.mark.parametrize("own", [GumbelSoftmax(0.6), GumbelStraightThrough(0.6)], ids=repr)
def test_relaxed_draws_doubly_reparameterised(own, objective):
    """At each noise, in both libraries: Σ_k (α w̃ + (1 − α) w̃²) ∂ log w through the values only."""
    program, twin, log_w = bits()
    u = np.random.default_rng(0).uniform(size=(4, 2, 5, 3))  # [G, sites, K, data]
    tables = {"b": {"u": u[:, 0]}, "c": {"u": u[:, 1]}}

    def soften(logits, u):
        soft = jax.nn.sigmoid((logits + jax.scipy.special.logit(u)) / 0.6)
        return soft if own == GumbelSoftmax(0.6) else soft + jax.lax.stop_gradient((soft > 0.5) - soft)

    def exact(u):
        def total(a):
            w = log_w(a, jnp.asarray(BITS), soften, u)
            share = jax.nn.softmax((1 - objective.alpha) * w, axis=0)
            path = objective.alpha * share + (1 - objective.alpha) * share**2
            return -jnp.sum(jax.lax.stop_gradient(path) * w)

        return jax.grad(total)(jnp.asarray(BITS))

    wanted = np.stack([exact(x) for x in u])
    chosen = {"estimators": {"*": DoublyReparameterized(own)}, "num_particles": 5, "objective": objective}
    params = {"a": jnp.asarray(BITS)}
    loss, gradient = jax_gradients(InjectedJax(**chosen), *program, params, tables)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
    pyro.clear_param_store()
    losses, gradients = torch_gradients(InjectedTorch(**chosen), *twin, params, tables)
    np.testing.assert_allclose(losses, loss, rtol=1e-10)
    np.testing.assert_allclose(gradients, wanted, rtol=1e-9, atol=1e-12)


def test_relaxed_draws_doubly_reparameterised_vanish_with_the_gradient_of_the_bound():
    """One bit, 20 particles: a tenth of the noise, and of the bias, to which the mean of the score adds."""
    k, a, draws = 20, -0.7, 4000

    def f(z):
        return 1.72 * z + 0.4 * jnp.sin(3 * z + 0.5)

    def model():
        numpyro.factor("f", f(numpyro.sample("z", dist.Bernoulli(logits=0.3))))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.0)))

    def bound(a):
        n, z = jnp.arange(k + 1), jnp.array([0.0, 1.0])
        log_w = z * 0.3 - jax.nn.softplus(0.3) + f(z) - z * a + jax.nn.softplus(a)
        chance = n * jax.nn.log_sigmoid(a) + (k - n) * jax.nn.log_sigmoid(-a)
        ways = binom.pmf(np.arange(k + 1), k, 0.5) * 2.0**k
        return jnp.sum(ways * jnp.exp(chance) * jnp.log((jnp.exp(log_w[1]) * n + jnp.exp(log_w[0]) * (k - n)) / k))

    def sampled(estimator):
        elbo = EstimatorELBO({"z": estimator}, num_particles=k, objective=ImportanceWeighted())
        one = jax.grad(lambda a, key: -elbo.loss(key, {"a": a}, model, guide))
        found = jax.jit(jax.vmap(one, (None, 0)))(a, jax.random.split(jax.random.key(0), draws))
        return float(found.mean()), float(found.std())

    exact = float(jax.grad(bound)(a))
    (plain, noise), (ours, less) = sampled(GumbelSoftmax(0.3)), sampled(DoublyReparameterized(GumbelSoftmax(0.3)))
    assert exact > 0.03
    assert plain - exact > 0.05 + 5 * noise / draws**0.5
    assert abs(ours - exact) + 5 * less / draws**0.5 < 0.008
    assert less < noise / 10


def test_what_draws_may_stand_in():
    with pytest.raises(ValueError, match=r"DoublyReparameterized\(estimator\) needs an estimator whose value carries"):
        DoublyReparameterized(Reinforce())
    with pytest.raises(ValueError, match=r"StickingTheLanding\(estimator\) .* got RejectionPathwise\(\)"):
        StickingTheLanding(RejectionPathwise())
    assert not DoublyReparameterized(GumbelSoftmax()).unbiased
    assert StickingTheLanding(ImplicitPathwise()).unbiased
