"""Sites whose elements depend on each other without an event dimension, and scales that are arrays: the exact mean,
summed over every outcome."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, grid, jax_gradients, legendre

from ppl_estimators import (
    RELAX,
    ControlVariate,
    DeltaMethod,
    EstimatorError,
    Given,
    Learned,
    LeaveOneOut,
    PastSteps,
    Stein,
)
from ppl_estimators.core.keep import Kept
from ppl_estimators.core.relaxation import conditional, unconditional
from ppl_estimators.core.site import Costs, Draw, Plate, Site
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.numpyro.ops import OPS as JAX
from ppl_estimators.pyro.ops import OPS as TORCH

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

LOGITS = np.array([0.4, -0.3])
STATES = np.array(list(itertools.product([0.0, 1.0], repeat=2)))
P = 1 / (1 + np.exp(-LOGITS))
PROBABILITY = np.prod(np.where(STATES == 1, P, 1 - P), axis=-1)


def joint(z):
    """A cost that couples the two elements of ``z [..., 2]``."""
    return 1.3 * z[..., 0] - 0.7 * z[..., 1] + 1.9 * z[..., 0] * z[..., 1]


def undeclared(estimator, scale=1.0):
    """Two bits in a batch dimension that no plate declares."""

    def model():
        with numpyro.handlers.scale(scale=scale):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.3 * jnp.ones(2)))
        numpyro.factor("f", joint(z))

    def guide():
        with numpyro.handlers.scale(scale=scale):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.asarray(LOGITS))))

    return model, with_estimators(guide, {"z": estimator})


SCALE = np.array([0.5, 3.0])


def scaled(estimator):
    return undeclared(estimator, SCALE)


def moved(guide, size=0.8):
    """What the hook declares, its networks away from zero, where they do nothing."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    kept = {k: s["value"] for k, s in trace.items() if "$" in k}
    for i, k in enumerate(sorted(kept)):
        if jnp.ndim(kept[k]):
            kept[k] = kept[k] + size * jax.random.normal(jax.random.key(i), kept[k].shape, dtype=float)
    return kept


def exact(scale=1.0):
    def loss(a):
        total = 0.0
        for z in STATES:
            log_q = dist.Bernoulli(logits=a).log_prob(z)
            cost = scale * (dist.Bernoulli(logits=0.3).log_prob(z) - log_q)
            total -= jnp.exp(log_q.sum()) * (cost.sum() + joint(z))
        return total

    return np.asarray(jax.jit(jax.grad(loss))(LOGITS))


def outcomes(particles):
    index = np.array(list(itertools.product(range(4), repeat=particles)))
    return {"z": {"value": STATES[index]}}, PROBABILITY[index].prod(-1)


def mean_of(program, estimator, particles=1, noise=None):
    model, guide = program(estimator)
    tables, weights = outcomes(particles) if noise is None else noise
    kept = moved(guide)
    elbo = InjectedJax(num_particles=particles)
    return weights @ jax_gradients(elbo, model, guide, {"a": jnp.asarray(LOGITS)}, tables, **kept)[1]


def h(z):
    return 1.5 * z


def mean_of_h(d):
    return 1.5 * d.mean


@pytest.mark.parametrize(
    ("estimator", "particles"),
    [
        (ControlVariate(h, mean_of_h, -0.7), 1),
        (ControlVariate(h, mean_of_h, -0.7, baseline=LeaveOneOut()), 2),
        (ControlVariate(h, mean_of_h), 3),
    ],
    ids=repr,
)
def test_the_mean_of_h_counts_once(estimator, particles):
    np.testing.assert_allclose(mean_of(undeclared, estimator, particles), exact(), atol=1e-10)


def test_the_mean_of_the_expansion_counts_once():
    """z ~ N(m, 0.7²) in two dependent dimensions, cost quadratic: exact over Gauss-Hermite nodes and all signs."""
    m = np.array([0.4, -0.2])

    def model():
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0))
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=0.5)

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("m", jnp.asarray(m)), 0.7))

    x, w = np.polynomial.hermite_e.hermegauss(8)
    axes = list(itertools.product(range(8), range(8), (0.2, 0.8), (0.2, 0.8)))
    values = np.array([[x[i], x[j]] for i, j, *_ in axes])
    signs = np.array([s for _, _, *s in axes])
    weights = np.array([w[i] * w[j] for i, j, *_ in axes]) / (2 * np.pi) / 4
    estimator = DeltaMethod(PastSteps(0.9))
    moments = {"weight": 1.0, "f": 0.0, "h": 0.0, "fh": 0.8, "hh": 1.0}
    state = {"z$state": {k: jnp.asarray(v) for k, v in moments.items()}}
    found = jax_gradients(
        InjectedJax(),
        model,
        with_estimators(guide, {"z": estimator}),
        {"m": jnp.asarray(m)},
        {"z": {"value": values[:, None], "sign": signs[:, None]}},
        **state,
    )[1]
    np.testing.assert_allclose(weights @ found, m - (0.5 - m.sum()), atol=1e-10)


@pytest.mark.parametrize(
    ("h", "mean", "message"),
    [
        (
            lambda z: z.sum(),
            mean_of_h,
            r"site 'z': h of ControlVariate returned the shape \(\), and \(2,\) is the batch",
        ),
        (h, lambda d: d.mean.sum(), r"site 'z': mean of ControlVariate returned the shape \(\)"),
        (lambda z: z[:, None] * jnp.ones(2), mean_of_h, r"returned the shape \(2, 2\).*Return one number for each"),
    ],
)
def test_a_function_of_the_wrong_shape_is_refused(h, mean, message):
    with pytest.raises(EstimatorError, match=message):
        mean_of(undeclared, ControlVariate(h, mean, 0.5))


# ---- scales that are arrays ------------------------------------------------------------------------------------------


def test_stein_networks_are_one_number_for_each_plate_element():
    np.testing.assert_allclose(mean_of(scaled, Stein(hidden=4), 2), exact(SCALE), atol=1e-10)


def test_a_relaxed_network_is_one_number_for_each_plate_element():
    """Exact over u and v of both elements."""
    axes = [legendre(10, 1 - p) for p in P] + [legendre(10)] * 2
    values, weights = grid(*axes)
    noise = {"u": np.stack(values[:2], -1)[:, None], "v": np.stack(values[2:], -1)[:, None]}
    found = mean_of(scaled, RELAX(1.0, hidden=4, baseline=None), noise=({"z": noise}, weights))
    np.testing.assert_allclose(found, exact(SCALE), atol=1e-6)


@pytest.mark.parametrize("ops", [JAX, TORCH], ids=["jax", "torch"])
def test_the_unit_of_a_site(ops):
    """Whatever the rank of the scale: one number for each plate element, its mean where the site has no plate."""
    plate = Plate("p", -1, 3)
    site = Site("z", "Bernoulli", "bernoulli", (4, 3), (), frozenset({plate}), lead=1)
    alone = Site("z", "Bernoulli", "bernoulli", (), (), frozenset(), lead=1)
    like, row = ops.asarray([1.5]), [0.5, 1.0, 3.0]
    column = [[[[2.0], [4.0], [6.0], [8.0]]]]
    for where, scale, wanted in (
        (site, 2.5, [[[2.5]]]),
        (site, ops.asarray(2.5), [[[2.5]]]),
        (site, ops.asarray([row]), [[row]]),
        (site, ops.asarray([row, [2.0, 4.0, 6.0]]), [[row], [[2.0, 4.0, 6.0]]]),  # a row for each of two particles
        (site, ops.asarray(column[0]), [[[5.0]]]),
        (site, ops.asarray([column[0], column[0]])[None] * 0.5, [[[2.5]]]),
        (alone, ops.asarray([row]), [1.5]),
        (alone, 2.5, [2.5]),
        (alone, 0.0, [1.0]),
    ):
        found = where.filled(scale=scale).unit(ops, like)
        assert found.dtype == like.dtype
        np.testing.assert_allclose(np.asarray(found), wanted)


def test_a_scale_of_higher_rank_than_the_site():
    """handlers.scale(array) makes several costs of a scalar site's log probabilities; two particles."""

    def model():
        with numpyro.handlers.scale(scale=SCALE):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
        numpyro.factor("f", 1.3 * z)

    def guide():
        with numpyro.handlers.scale(scale=SCALE):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.8)))

    p = 1 / (1 + np.exp(-0.8))
    wanted = -p * (1 - p) * (SCALE.sum() * (0.3 - 0.8) + 1.3)
    guide = with_estimators(guide, {"z": RELAX(1.0, hidden=4, baseline=None)})
    (u, v), weights = grid(legendre(50, 1 - p), legendre(50))
    half = np.full_like(u, 0.37)
    tables = {"z": {"u": np.stack([u, half], 1), "v": np.stack([v, half], 1)}}
    elbo, params = InjectedJax(num_particles=2), {"a": jnp.asarray(0.8)}
    both = weights @ jax_gradients(elbo, model, guide, params, tables, **moved(guide))[1]
    one = {"z": {k: np.full((1, 2), 0.37) for k in "uv"}}
    second = jax_gradients(elbo, model, guide, params, one, **moved(guide))[1][0] / 2
    np.testing.assert_allclose(both - second, wanted / 2, atol=1e-9)


# ---- elements of a plate that a cost couples -------------------------------------------------------------------------


PAIR = Plate("p", -1, 2)
COUPLED = Site("z", "Bernoulli", "bernoulli", (2,), (), frozenset(), coupled=frozenset({PAIR}), lead=1)


def row_by_row(x):
    """A network that sees one element of the plate, and not its place."""
    return 1.7 * jnp.tanh(x @ jnp.asarray([1.1, -0.6])) - 0.4


def test_what_is_kept_does_not_know_what_is_coupled():
    """The hook, which sees the guide alone, declares the same as the loss uses."""
    in_plate = Site("z", "Bernoulli", "bernoulli", (2,), (), frozenset({PAIR}))
    logits = jnp.asarray(LOGITS)
    for estimator, given in (
        (RELAX(), {}),
        (Learned(), {}),
        (Learned(inputs=jnp.ones((2, 5))), {"inputs": jnp.ones((2, 5))}),
    ):
        both = [s.filled(lead=0, logits=logits, named={"logits": logits}) for s in (in_plate, COUPLED)]
        declared = [{k: n.features for k, n in estimator.keeps(s, given).networks.items()} for s in both]
        assert declared[0] == declared[1]
        assert set(declared[0].values()) <= {1, 2, 5}


def test_baselines_of_coupled_elements_are_summed():
    cost, kept = jnp.zeros((3, 1)), {"networks": {"baseline": row_by_row}}
    x = jax.random.normal(jax.random.key(0), (3, 2, 2))
    found = Learned().predict(JAX, COUPLED, cost, Kept(given={"inputs": x}, **kept))
    np.testing.assert_allclose(found, row_by_row(x).sum(-1, keepdims=True))
    found = Given(None).predict(JAX, COUPLED, cost, Kept(given={"value": x[..., 0]}))
    np.testing.assert_allclose(found, x[..., 0].sum(-1, keepdims=True))


def test_a_network_of_coupled_elements_is_one_number():
    """RELAX where a cost couples two elements of a plate: exact over u and v of both."""
    axes = [legendre(10, 1 - p) for p in P] + [legendre(10)] * 2
    values, weights = grid(*axes)
    u, v = jnp.stack(values[:2], -1), jnp.stack(values[2:], -1)
    estimator = RELAX(1.0, baseline=None)
    kept = Kept({"log_temperature": jnp.asarray(0.0)}, {"control": row_by_row})

    def one(u, v):
        def surrogate(a):
            site = COUPLED.filled(logits=a[None], named={"logits": a[None]}, scale=1.5)
            draw = estimator.draw(JAX, COUPLED.filled(lead=0, logits=jax.lax.stop_gradient(a)), {"u": u, "v": v})
            draw = Draw(draw.value[None], {k: x[None] for k, x in draw.extra.items()})
            return JAX.sum(estimator.local(JAX, site, draw, Costs(joint(draw.value)[:, None]), kept).surrogate)

        return jax.grad(surrogate)(jnp.asarray(LOGITS))

    def by_hand(u, v):
        """(f − Σ_j c(z̃_j)) (b_i − p_i) + ∂_i c(z_i) − ∂_i c(z̃_i)"""
        a = jnp.asarray(LOGITS)
        b = (u > 1 - P).astype(float)

        def c(soft):
            return row_by_row(jnp.stack([2 * soft - 1, 2 * P - 1], -1))

        soft = [lambda a: JAX.sigmoid(unconditional(JAX, "bernoulli", a, u))]
        soft.append(lambda a: JAX.sigmoid(conditional(JAX, "bernoulli", a, v, b)))
        slopes = [jax.grad(lambda a, s=s: c(s(a)).sum())(a) for s in soft]
        return (joint(b) - 1.5 * c(soft[1](a)).sum()) * (b - P) + 1.5 * (slopes[0] - slopes[1])

    np.testing.assert_allclose(*jax.jit(lambda u, v: (one(u, v), by_hand(u, v)))(u[77], v[77]), atol=1e-12)
    found = jax.jit(lambda u, v: jax.lax.map(lambda n: one(*n), (u, v), batch_size=5000))(u, v)
    mean = [PROBABILITY @ (joint(STATES) * (STATES[:, i] - P[i])) for i in range(2)]
    np.testing.assert_allclose(weights @ np.asarray(found), mean, atol=1e-6)
