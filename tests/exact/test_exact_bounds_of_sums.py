"""Bounds of several particles whose weights hold sums over sites of the model: over the noise of what is drawn, loss
and gradient are those of the bound written out. In both libraries."""

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
from injected import InjectedJax, InjectedTorch, cells, columns, grid, jax_gradients, torch_gradients

from ppl_estimators import DisARM, Enumerate, ImportanceWeighted, LeaveOneOut, Reinforce, Renyi

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

MARK = {"enumerate": "parallel"}
POINT = {"a": np.array([0.4, -0.6, 0.9]), "t": np.array([0.7, -0.4])}


class J:
    dist, sample, plate, array, mask = jdist, numpyro.sample, numpyro.plate, jnp.asarray, numpyro.handlers.mask
    param = staticmethod(lambda name: numpyro.param(name, jnp.asarray(POINT[name])))


class T:
    dist, sample, plate, mask = tdist, pyro.sample, pyro.plate, pyro.poutine.mask
    array = staticmethod(lambda x: torch.as_tensor(x, dtype=torch.get_default_dtype()))
    param = staticmethod(lambda name: pyro.param(name, torch.tensor(POINT[name])))


def bit(logits, v):
    return v * logits - jax.nn.softplus(logits)


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


def between(lib):
    """A bit, and a normal below it, around a bit that is summed out. By hand: log q of the bits of a particle, and log
    w, of the noise ``x`` and ``e``."""

    def model():
        t = lib.param("t")
        x = lib.sample("x", lib.dist.Bernoulli(logits=lib.array(0.3)))
        y = lib.sample("y", lib.dist.Bernoulli(logits=0.5 - x + t[1]), infer=MARK)
        w = lib.sample("w", lib.dist.Normal(0.4 * y + x, 1.1))
        lib.sample("o", lib.dist.Normal(x - t[0] * y + 0.5 * w, 0.8), obs=lib.array(0.4))

    def guide():
        a = lib.param("a")
        x = lib.sample("x", lib.dist.Bernoulli(logits=a[0]))
        lib.sample("w", lib.dist.Normal(a[1] + a[2] * x, 0.9))

    def by_hand(p, x, e):
        a, t = p["a"], p["t"]
        w, y = a[1] + a[2] * x + 0.9 * e, jnp.arange(2.0)
        inner = bit(0.5 - x + t[1], y) + normal(w, 0.4 * y + x, 1.1) + normal(0.4, x - t[0] * y + 0.5 * w, 0.8)
        log_q = bit(a[0], x)
        log_w = bit(0.3, x) + jax.nn.logsumexp(inner, axis=0) - log_q - normal(w, a[1] + a[2] * x, 0.9)
        return log_q, log_w

    return model, guide, by_hand


def above(lib):
    """A bit outside of a plate, in which others are summed out: one weight, which holds a product of sums."""

    def model():
        t = lib.param("t")
        x = lib.sample("x", lib.dist.Bernoulli(logits=lib.array(0.3)))
        with lib.plate("data", 2):
            y = lib.sample("y", lib.dist.Bernoulli(logits=0.5 - x + t[1]), infer=MARK)
            lib.sample("o", lib.dist.Normal(x - t[0] * y, 0.8), obs=lib.array([0.4, -0.7]))

    def guide():
        lib.sample("x", lib.dist.Bernoulli(logits=lib.param("a")[0]))

    def by_hand(p, x, e):
        a, t, y = p["a"], p["t"], jnp.arange(2.0)[:, None]
        each = normal(jnp.array([0.4, -0.7]), x - t[0] * y, 0.8)
        sums = jax.nn.logsumexp(bit(0.5 - x + t[1], y) + each, axis=0).sum()
        return bit(a[0], x), bit(0.3, x) + sums - bit(a[0], x)

    return model, guide, by_hand


def inside(lib):
    """Two of four data, of which the second is masked: a bound for each."""

    def model():
        t = lib.param("t")
        with lib.plate("data", 4, subsample_size=2), lib.mask(mask=lib.array([True, False]) == 1):
            x = lib.sample("x", lib.dist.Bernoulli(logits=lib.array([0.3, 0.3])))
            y = lib.sample("y", lib.dist.Bernoulli(logits=0.5 - x + t[1]), infer=MARK)
            lib.sample("o", lib.dist.Normal(x - t[0] * y, 0.8), obs=lib.array([0.4, -0.7]))

    def guide():
        with lib.plate("data", 4, subsample_size=2):
            lib.sample("x", lib.dist.Bernoulli(logits=lib.param("a")[:2]))

    def by_hand(p, x, e):
        a, t, y = p["a"], p["t"], jnp.arange(2.0)
        sum_ = jax.nn.logsumexp(bit(0.5 - x[0] + t[1], y) + normal(0.4, x[0] - t[0] * y, 0.8))
        log_q = bit(a[:2], x)
        return log_q.sum(), jnp.array([bit(0.3, x[0]) + sum_, 0.0]) - log_q

    return model, guide, by_hand


HERMITE = np.polynomial.hermite_e.hermegauss(4)
PROGRAMS = {between: ((), 4, 1.0), above: ((), 1, 1.0), inside: ((2,), 1, 2.0)}  # shape of x, nodes for w, N/B


def noise(program, estimator, k):
    """Every tuple of bits, or every cell of their noise, and nodes for the normals, of k particles."""
    shape, nodes, _ = PROGRAMS[program]
    p = 1 / (1 + np.exp(-POINT["a"][: 2 if shape else 1]))
    of_bits = [cells(q, 1 - q) if estimator == DisARM() else (np.arange(2.0), np.array([1 - q, q])) for q in p] * k
    of_normals = [(HERMITE[0], HERMITE[1] / HERMITE[1].sum()) if nodes > 1 else (np.zeros(1), np.ones(1))] * k
    found, weights = grid(*of_bits, *of_normals)
    bits, normals = columns(found[: len(of_bits)], k, *shape), columns(found[len(of_bits) :], k)
    return {"x": {"u" if estimator == DisARM() else "value": bits}, "w": {"value": normals}}, weights


def exactly(program, objective, k):
    """Loss, and its gradient, of all tuples."""
    by_hand, outer = program(J)[2], PROGRAMS[program][2]
    tables, weights = noise(program, None, k)
    x, e = jnp.asarray(tables["x"]["value"]), jnp.asarray(tables["w"]["value"])

    def loss(p):
        log_q, log_w = jax.vmap(jax.vmap(lambda *noise: by_hand(p, *noise)))(x, e)
        inner = jax.nn.logsumexp((1 - objective.alpha) * log_w, axis=1) - jnp.log(k)
        chance = jnp.exp(log_q.sum(1))
        chance = chance * weights / jax.lax.stop_gradient(chance)  # the nodes' own weights
        return -outer * jnp.sum(chance * inner.reshape(len(x), -1).sum(-1)) / (1 - objective.alpha)

    value, slope = jax.value_and_grad(loss)({n: jnp.asarray(v) for n, v in POINT.items()})
    return value, np.concatenate([slope["a"], slope["t"]])


CELLS = [
    (between, DisARM(), 2, ImportanceWeighted(), "J"),
    (between, Reinforce(LeaveOneOut()), 2, Renyi(-0.5), "T"),
    (above, Enumerate(), 5, Renyi(0.5), "T"),
    (above, DisARM(), 3, ImportanceWeighted(), "J"),
    (inside, DisARM(), 2, Renyi(0.5), "J"),
    (inside, Enumerate(), 2, ImportanceWeighted(), "T"),
    (inside, Reinforce(LeaveOneOut()), 3, Renyi(2.0), "J"),
]


@pytest.mark.parametrize(("program", "estimator", "k", "objective", "libraries"), CELLS)
def test_sums_below_bounds(program, estimator, k, objective, libraries):
    value, wanted = exactly(program, objective, k)
    tables, weights = noise(program, estimator, k)
    chosen = {"estimators": {"x": estimator}, "num_particles": k, "objective": objective}
    for lib in libraries:
        pyro.clear_param_store()
        if lib == "J":
            params = {n: jnp.asarray(v) for n, v in POINT.items()}
            loss, gradient = jax_gradients(InjectedJax(**chosen), *program(J)[:2], params, tables)
        else:
            elbo = InjectedTorch(max_plate_nesting=1, **chosen)
            T.param("a"), T.param("t")
            loss, gradient = torch_gradients(elbo, *program(T)[:2], POINT, tables)
        np.testing.assert_allclose(weights @ loss, value, atol=1e-11)
        np.testing.assert_allclose(weights @ gradient, wanted, atol=1e-11)


@pytest.mark.parametrize("lib", [J, T])
def test_enumerated_values_carry_from_one_element_of_a_plate_to_the_others(lib):
    """A bit in a plate moves how probable the values of a site outside of it are, and these move all data."""

    def model():
        with lib.plate("data", 2):
            lib.sample("x", lib.dist.Bernoulli(logits=lib.array([0.3, -0.5])))
        y = lib.sample("y", lib.dist.Bernoulli(logits=lib.array(0.2)))
        with lib.plate("data", 2):
            lib.sample("o", lib.dist.Normal(lib.param("t")[0] - 1.5 * y, 0.8), obs=lib.array([0.4, -0.7]))

    def guide():
        a, both = lib.param("a"), lib.array([0.9, -1.3])
        with lib.plate("data", 2):
            x = lib.sample("x", lib.dist.Bernoulli(logits=a[:2]))
        lib.sample("y", lib.dist.Bernoulli(logits=a[2] + (both * x).sum(-1)), infer=MARK)

    x, weights = grid(*((np.arange(2.0), np.array([1 - q, q])) for q in 1 / (1 + np.exp(-POINT["a"][:2]))))
    x = np.stack(x, -1)

    def exact(p):
        def cost(x):
            y, log_q = jnp.arange(2.0), bit(p["a"][:2], x).sum()
            log_y = bit(p["a"][2] + (jnp.array([0.9, -1.3]) * x).sum(), y)
            data = sum(normal(o, p["t"][0] - 1.5 * y, 0.8) for o in (0.4, -0.7))
            rest = bit(jnp.array([0.3, -0.5]), x).sum() - log_q
            return jnp.exp(log_q) * jnp.sum(jnp.exp(log_y) * (rest + bit(0.2, y) + data - log_y))

        return -jnp.sum(jax.vmap(cost)(jnp.asarray(x)))

    value, slope = jax.value_and_grad(exact)({n: jnp.asarray(v) for n, v in POINT.items()})
    tables = {"x": {"value": x[:, None]}}
    if lib is J:
        params = {n: jnp.asarray(v) for n, v in POINT.items()}
        loss, gradient = jax_gradients(InjectedJax(Reinforce()), model, guide, params, tables)
    else:
        pyro.clear_param_store()
        loss, gradient = torch_gradients(InjectedTorch(Reinforce(), max_plate_nesting=1), model, guide, POINT, tables)
    np.testing.assert_allclose(weights @ loss, value, atol=1e-12)
    np.testing.assert_allclose(weights @ gradient, np.concatenate([slope["a"], slope["t"]]), atol=1e-12)
