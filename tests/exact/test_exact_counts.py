"""Estimators for counts and weak derivatives, summed or integrated over all their noise: two dependent elements."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import jax.scipy.stats as jstats
import numpy as np
import pytest
from scipy import special, stats

from ppl_estimators import (
    Constant,
    ImportanceSampled,
    MeasureValued,
    Reinforce,
    SmoothedTriple,
    StochasticTriple,
    SumAroundMode,
)
from ppl_estimators.core import families
from ppl_estimators.core.estimator import Measure
from ppl_estimators.core.keep import Kept
from ppl_estimators.core.site import Costs, Site
from ppl_estimators.numpyro.ops import OPS

pytestmark = pytest.mark.usefixtures("double_precision")


def cost(x):
    """Couples the two elements, and is linear in neither."""
    return jnp.sin(0.7 * x[..., 0] + 0.4) * (1 + 0.3 * x[..., 1]) + 0.02 * x[..., 1] ** 2 - 1.5


def site_of(family, parameters, count):
    arrays = {k: jnp.broadcast_to(jnp.asarray(v), (count, *np.shape(v))) for k, v in parameters.items()}
    logits = arrays.get("logits")
    event = np.shape(next(iter(parameters.values())))
    return Site(
        name="z",
        distribution=family,
        family=family,
        batch_shape=(),
        event_shape=event[:-1] if family == families.CATEGORICAL else event,
        plates=frozenset(),
        logits=logits,
        named=arrays,
        lead=1,
    )


def estimates(estimator, family, parameters, noise, f=cost, log_q=None):
    """The gradient in each parameter at each row of the noise, ``{name: [G, ...]}``."""
    return jax.jit(lambda noise: _estimates(estimator, family, parameters, noise, f, log_q))(noise)


def _estimates(estimator, family, parameters, noise, f, log_q):
    count = len(next(iter(noise.values())))
    site = site_of(family, parameters, count)
    draw = estimator.draw(OPS, site, noise)
    if estimator.value.moves:
        slope = jax.vmap(jax.grad(f))(jax.lax.stop_gradient(draw.value))

        def moving(arrays):
            return estimator.draw(OPS, site.filled(named=arrays, logits=arrays.get("logits")), noise).value

        return jax.grad(lambda arrays: jnp.sum(slope * moving(arrays)))(dict(site.named))
    values = [estimator.alternative(OPS, site, draw, jnp.asarray(i)) for i in range(estimator.alternatives(site).count)]
    costs = Costs(
        f(draw.value),
        jnp.stack([f(v) for v in values]) if values else None,
    )

    def surrogate(arrays):
        moved = site.filled(named=arrays, logits=arrays.get("logits"))
        if Measure.LOG_Q in estimator.measures:
            moved = moved.filled(log_q=log_q(arrays, draw.value))
            draw.extra.update({k: log_q(arrays, x) for k, x in estimator.scored(draw).items()})
        return jnp.sum(estimator.local(OPS, moved, draw, costs, Kept()).surrogate)

    return jax.grad(surrogate)(dict(site.named))


def moments(gradients, weights):
    weights = np.asarray(weights)
    np.testing.assert_allclose(weights.sum(), 1.0, atol=1e-9)
    mean = {k: np.tensordot(weights, np.asarray(g), 1) for k, g in gradients.items()}
    return mean, {k: np.tensordot(weights, (np.asarray(g) - mean[k]) ** 2, 1) for k, g in gradients.items()}


COUNTS = {
    families.POISSON: ({"rate": np.array([1.3, 2.4])}, 40, lambda p: [stats.poisson(r) for r in p["rate"]]),
    families.GEOMETRIC: ({"probs": np.array([0.45, 0.7])}, 60, lambda p: [stats.geom(q, loc=-1) for q in p["probs"]]),
    families.BINOMIAL: (
        {"total_count": np.array([5.0, 3.0]), "probs": np.array([0.35, 0.8])},
        6,
        lambda p: [stats.binom(n, q) for n, q in zip(p["total_count"], p["probs"], strict=True)],
    ),
    families.BERNOULLI: (
        {"logits": np.array([0.6, -1.1])},
        2,
        lambda p: [stats.bernoulli(special.expit(a)) for a in p["logits"]],
    ),
}


def states(family):
    parameters, size, laws = COUNTS[family]
    x = np.array(list(itertools.product(range(size), repeat=2)), dtype=float)
    weight = np.prod([law.pmf(x[:, i]) for i, law in enumerate(laws(parameters))], axis=0)
    return parameters, x, weight


def by_difference(family, name):
    """d E[f] / d parameter by Richardson differences of the sum."""

    def mean(parameters):
        _, x, _ = states(family)
        weight = np.prod([law.pmf(x[:, i]) for i, law in enumerate(COUNTS[family][2](parameters))], axis=0)
        return weight @ np.asarray(cost(x))

    parameters, found = COUNTS[family][0], []
    for i in range(2):

        def at(h, i=i):
            return mean({**parameters, name: parameters[name] + h * np.eye(2)[i]})

        first, second = ((at(h) - at(-h)) / (2 * h) for h in (1e-3, 5e-4))
        found.append((4 * second - first) / 3)
    return np.array(found)


SHARES = {
    families.POISSON: lambda p, x: p["rate"] + 0 * x,
    families.GEOMETRIC: lambda p, x: x,
    families.BINOMIAL: lambda p, x: (p["total_count"] - x) * p["probs"],
    families.BERNOULLI: lambda p, x: 0.5 * np.where(x > 0, special.expit(-p["logits"]), special.expit(p["logits"])),
}


@pytest.mark.parametrize("family", COUNTS)
def test_stochastic_triples_sum_to_the_gradient(family):
    """Over every value and every element that may be the one to move."""
    parameters, x, weight = states(family)
    share = SHARES[family](parameters, x)
    total = share.sum(-1, keepdims=True)
    chance = np.where(total > 0, share / np.where(total > 0, total, 1), 0.5)
    wins = np.array([[0.999, 1e-300], [1e-300, 0.999]])  # exponential clocks: the first, or the second
    noise = {
        "value": np.concatenate([x, x]),
        "which": np.repeat(wins, len(x), axis=0),
    }
    weights = np.concatenate([weight * chance[:, 0], weight * chance[:, 1]])
    ((name, gradient),) = (
        (k, g) for k, g in estimates(StochasticTriple(), family, parameters, noise).items() if k != "total_count"
    )
    mean, variance = moments({name: gradient}, weights)
    np.testing.assert_allclose(mean[name], by_difference(family, name), atol=1e-9)
    assert (variance[name] > 1e-4).all()


def test_the_element_that_moves_is_chosen_by_its_weight():
    t = (np.arange(300) + 0.5) / 300
    u = np.stack(np.meshgrid(t, t), -1).reshape(-1, 2)
    site = site_of(families.POISSON, {"rate": np.array([1.0, 3.0])}, len(u))
    noise = {"value": jnp.zeros(u.shape), "which": jnp.asarray(u)}
    chosen = StochasticTriple().draw(OPS, site, noise).extra["chosen"]
    np.testing.assert_allclose(chosen.mean(0), [0.25, 0.75], atol=2e-3)


CATEGORIES = np.array([[0.3, -0.8, 0.9, 0.1], [-0.4, 0.6, 0.2, -1.0]])
TABLE = np.random.default_rng(3).normal(size=(4, 4))
SOFTMAX = special.softmax(CATEGORIES, -1)


def exact_categorical(p):
    rows, columns = TABLE @ p[1], TABLE.T @ p[0]
    return np.stack([p[0] * (rows - p[0] @ rows), p[1] * (columns - p[1] @ columns)])


def table_of_indices(z):
    return jnp.asarray(TABLE)[z[..., 0], z[..., 1]]


def table_of_one_hots(z):
    return jnp.einsum("...i,ij,...j->...", z[..., 0, :], jnp.asarray(TABLE), z[..., 1, :])


@pytest.mark.parametrize("family", [families.CATEGORICAL, families.ONEHOT])
def test_stochastic_triples_of_categories(family):
    """Every pair of categories, either element, either side: weights by the inversion of the cumulative sums."""
    rows = []
    for v in itertools.product(range(4), repeat=2):
        sides = []
        for p, c in zip(SOFTMAX, v, strict=True):
            below, above = p[:c].sum(), p[c + 1 :].sum()
            sides.append(((below + p[c]) * above / p[c], (above + p[c]) * below / p[c]))
        total = sum(map(sum, sides))
        for element in range(2):
            for side in range(2):
                up = sides[element][0] / sum(sides[element])
                u = up / 2 if side == 0 else (1 + up) / 2
                other = [0.5, 0.5]
                other[element] = u
                chance = SOFTMAX[0][v[0]] * SOFTMAX[1][v[1]] * sides[element][side] / total
                rows.append((v, other, [0.999, 1e-300] if element == 0 else [1e-300, 0.999], chance))
    value, side, which, weights = (np.array(x) for x in zip(*rows, strict=True))
    value = np.eye(4)[value] if family == families.ONEHOT else value
    f = table_of_one_hots if family == families.ONEHOT else table_of_indices
    found = estimates(
        StochasticTriple(), family, {"logits": CATEGORIES}, {"value": value, "side": side, "which": which}, f
    )
    mean, _ = moments(found, weights)
    np.testing.assert_allclose(mean["logits"], exact_categorical(SOFTMAX), atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("family", [f for f in COUNTS if f != families.BERNOULLI])
def test_sums_around_the_mode(family, k):
    """Over every pair of values; half of a window may lie beyond the support."""
    parameters, x, weight = states(family)
    name = list(parameters)[-1]
    found = estimates(SumAroundMode(k), family, parameters, {"value": x})
    mean, variance = moments({name: found[name]}, weight)
    np.testing.assert_allclose(mean[name], by_difference(family, name), atol=1e-9)
    assert (variance[name] > 1e-4).all()


@pytest.mark.parametrize(("family", "k"), [(families.BINOMIAL, 4), (families.BINOMIAL, 9), (families.POISSON, 40)])
def test_a_window_of_the_whole_support_is_exact(family, k):
    """One element; the other weighs 1 whatever its value."""
    parameters, x, weight = states(family)
    name = list(parameters)[-1]

    def last(x):
        return jnp.sin(x[..., 1]) + 0.1 * x[..., 1] ** 2

    found = estimates(SumAroundMode(k), family, parameters, {"value": x}, last)[name][:, 1]
    found = np.asarray(found)[weight > 1e-9]
    np.testing.assert_allclose(found, found[0], rtol=1e-9)
    if family == families.BINOMIAL:
        n, p = parameters["total_count"][1], parameters["probs"][1]
        c = np.arange(n + 1)
        exact = stats.binom(n, p).pmf(c) @ (np.asarray(last(np.stack([c, c], -1))) * (c - n * p)) / (p * (1 - p))
        np.testing.assert_allclose(found[0], exact, rtol=1e-9)


def test_windows_around_the_mode_at_the_ends():
    """Rates and probabilities of 0 and 1, and beyond what a window can hold: finite, and no mass invented."""
    for family, parameters in {
        families.POISSON: {"rate": np.array([0.0, 1e-30, 3e4], np.float32)},
        families.GEOMETRIC: {"probs": np.array([1.0, 1e-6, 0.5], np.float32)},
        families.BINOMIAL: {
            "total_count": np.array([0.0, 3.0, 1e5], np.float32),
            "probs": np.array([0.0, 1.0, 0.5], np.float32),
        },
    }.items():
        noise = {"value": np.array([[0.0, 0.0, 1.0]], np.float32)}
        found = estimates(SumAroundMode(5), family, parameters, noise, lambda x: x[..., 0] - x[..., 2])
        assert all(np.isfinite(g).all() for g in found.values()), family


@pytest.mark.parametrize("family", COUNTS)
def test_smoothed_triples_are_biased_unless_the_cost_is_linear(family):
    parameters, x, weight = states(family)
    name = list(parameters)[-1]
    slope = np.array([1.5, -0.4])
    found = estimates(SmoothedTriple(), family, parameters, {"value": x}, lambda x: x @ jnp.asarray(slope))
    linear, _ = moments({name: found[name]}, weight)
    derivative = {
        families.POISSON: slope,
        families.GEOMETRIC: -slope / parameters[name] ** 2,
        families.BINOMIAL: slope * parameters.get("total_count", 1),
        families.BERNOULLI: slope * special.expit(parameters[name]) * special.expit(-parameters[name]),
    }[family]
    np.testing.assert_allclose(linear[name], derivative, atol=1e-9)
    bent, _ = moments({name: estimates(SmoothedTriple(), family, parameters, {"value": x})[name]}, weight)
    bias = bent[name] - by_difference(family, name)
    assert np.abs(bias).max() > 1e-4  # the sums are good to 1e-9
    assert not SmoothedTriple.unbiased


@pytest.mark.parametrize("family", [families.CATEGORICAL, families.ONEHOT])
def test_measure_valued_categories(family):
    v = np.array(list(itertools.product(range(4), repeat=2)))
    value = np.eye(4)[v] if family == families.ONEHOT else v
    f = table_of_one_hots if family == families.ONEHOT else table_of_indices
    found = estimates(MeasureValued(), family, {"logits": CATEGORIES}, {"value": value}, f)
    mean, _ = moments(found, SOFTMAX[0][v[:, 0]] * SOFTMAX[1][v[:, 1]])
    np.testing.assert_allclose(mean["logits"], exact_categorical(SOFTMAX), atol=1e-12)


@pytest.mark.parametrize("family", [families.POISSON, families.BERNOULLI])
def test_measure_valued_counts(family):
    parameters, x, weight = states(family)
    mean, _ = moments(estimates(MeasureValued(), family, parameters, {"value": x}), weight)
    (name,) = parameters
    np.testing.assert_allclose(mean[name], by_difference(family, name), atol=1e-9)


def legendre(n, low=0.0, high=1.0):
    x, w = np.polynomial.legendre.leggauss(n)
    return low + (high - low) * (x + 1) / 2, (high - low) * w / 2


def test_measure_valued_normal():
    """f = cos: E f = cos μ exp(−σ²/2), for one element; the noise of mean and scale is integrated in turn."""
    loc, scale = 0.4, 0.8
    w, ww = legendre(200, 0.0, 9.0)  # Rayleigh by its value
    u, wu = legendre(40)
    m, wm = legendre(120, 0.0, 9.0)

    def run(rayleigh, uniform, maxwell, sign):
        noise = {
            "w": np.exp(-(rayleigh**2) / 2)[:, None],
            "u": uniform[:, None],
            "m": np.stack([maxwell, 0 * maxwell, 0 * maxwell], -1)[:, None],
            "sign": sign[:, None],
        }
        parameters = {"loc": np.array([loc]), "scale": np.array([scale])}
        return estimates(MeasureValued(), families.NORMAL, parameters, noise, lambda z: jnp.cos(z[..., 0]))

    one = np.ones_like(w)
    mean, _ = moments(run(w, 0.5 * one, one, 0.3 * one), ww * w * np.exp(-(w**2) / 2))
    np.testing.assert_allclose(mean["loc"], -np.sin(loc) * np.exp(-(scale**2) / 2), atol=1e-10)

    grids = [g.ravel() for g in np.meshgrid(u, m, [0.2, 0.8], indexing="ij")]
    weights = np.einsum("i,j,k->ijk", wu, wm * np.sqrt(2 / np.pi) * m**2 * np.exp(-(m**2) / 2), [0.5, 0.5]).ravel()
    mean, _ = moments(run(np.ones_like(grids[0]), *grids), weights)
    np.testing.assert_allclose(mean["scale"], -scale * np.cos(loc) * np.exp(-(scale**2) / 2), atol=1e-10)


@pytest.mark.parametrize("family", [families.GAMMA, families.EXPONENTIAL])
def test_measure_valued_rates(family):
    """f = exp(−z): E f = (β / (1 + β))^α, for one element."""
    alpha, rate = (2.5 if family == families.GAMMA else 1.0), 1.4
    z, wz = legendre(300, 0.0, 40.0)
    e, we = legendre(100, 0.0, 30.0)
    zs, es = (g.ravel() for g in np.meshgrid(z, e, indexing="ij"))
    weights = np.einsum("i,j->ij", wz * stats.gamma(alpha, scale=1 / rate).pdf(z), we * np.exp(-e)).ravel()
    parameters = {"concentration": np.array([alpha]), "rate": np.array([rate])}
    parameters = parameters if family == families.GAMMA else {"rate": np.array([rate])}
    noise = {"value": zs[:, None], "e": np.exp(-es)[:, None]}
    mean, _ = moments(estimates(MeasureValued(), family, parameters, noise, lambda z: jnp.exp(-z[..., 0])), weights)
    value = (rate / (1 + rate)) ** alpha
    np.testing.assert_allclose(mean["rate"], alpha * value / (rate * (1 + rate)), atol=1e-8)
    if family == families.GAMMA:
        np.testing.assert_allclose(mean["concentration"], value * np.log(rate / (1 + rate)), atol=1e-7)


def graded(n, high):
    """Nodes that crowd at zero, where densities have roots."""
    t, w = legendre(n)
    return high * t**4, high * 4 * t**3 * w


# ---- an overdispersed proposal, one element ------------------------------------------------------------------------

LOG_Q = {
    families.NORMAL: lambda a, x: jstats.norm.logpdf(x, a["loc"], a["scale"]),
    families.POISSON: lambda a, x: jstats.poisson.logpmf(x, a["rate"]),
    families.GAMMA: lambda a, x: jstats.gamma.logpdf(x, a["concentration"], scale=1 / a["rate"]),
    families.BERNOULLI: lambda a, x: x * a["logits"] - jax.nn.softplus(a["logits"]),
}
ONE = {
    families.NORMAL: {"loc": np.array([0.4]), "scale": np.array([0.8])},
    families.POISSON: {"rate": np.array([1.7])},
    families.GAMMA: {"concentration": np.array([2.5]), "rate": np.array([1.4])},
    families.BERNOULLI: {"logits": np.array([1.2])},
}
GRID = {
    families.NORMAL: legendre(200, -12.0, 12.0),
    families.POISSON: (np.arange(60.0), np.ones(60)),
    families.GAMMA: graded(300, 120.0),
    families.BERNOULLI: (np.array([0.0, 1.0]), np.ones(2)),
}


def wider(family, tau):
    """The law of r, from the formulas of the paper; and the noise of ours that draws the value x."""
    p = {k: float(v[0]) for k, v in ONE[family].items()}
    if family == families.NORMAL:
        law = stats.norm(p["loc"], p["scale"] * np.sqrt(tau))
        return law.pdf, lambda x: (x - p["loc"]) / (p["scale"] * np.sqrt(tau))
    if family == families.POISSON:
        return stats.poisson(p["rate"] ** (1 / tau)).pmf, lambda x: x
    if family == families.BERNOULLI:
        return stats.bernoulli(special.expit(p["logits"] / tau)).pmf, lambda x: np.where(x > 0, 1 - 1e-9, 1e-9)
    rate = p["rate"] / tau
    return stats.gamma((p["concentration"] + tau - 1) / tau, scale=1 / rate).pdf, lambda x: np.log(x * rate)


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("family", ONE)
def test_overdispersed_proposals(family, tau):
    """Both draws over their whole grids, against the score function by itself."""

    def f(x):
        return jnp.exp(-0.3 * x[..., 0]) - 0.7

    x, width = GRID[family]
    q = width * np.exp(np.asarray(LOG_Q[family](ONE[family], x)))
    density, noise_of = wider(family, tau)
    r = width * density(x)
    zq, zr = (g.ravel() for g in np.meshgrid(x, x, indexing="ij"))
    noise = {"value": zq[:, None], "wide": noise_of(zr)[:, None]}

    def log_q(arrays, value):
        return LOG_Q[family](arrays, value)[..., 0]

    estimator = ImportanceSampled(Reinforce(Constant(0.2)), tau)
    mean, _ = moments(estimates(estimator, family, ONE[family], noise, f, log_q), np.outer(q, r).ravel())
    exact, plain = moments(estimates(Reinforce(), family, ONE[family], {"value": x[:, None]}, f, log_q), q)
    for name in exact:
        np.testing.assert_allclose(mean[name], exact[name], atol=1e-8)
        assert (plain[name] > 0).all()
