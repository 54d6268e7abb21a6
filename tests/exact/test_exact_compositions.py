"""Compositions of estimators, summed over all draws of all parts: the exact gradient, and the variance they promise."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, OneAfterAnother, cells, grid, jax_gradients, moments

from ppl_estimators import (
    ARM,
    REBAR,
    Antithetic,
    Average,
    Combine,
    Constant,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorError,
    ImportanceSampled,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Pathwise,
    Reinforce,
    Repeat,
)
from ppl_estimators.numpyro import with_estimators

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

LOGITS = np.array([0.9, -0.6])
P = 1 / (1 + np.exp(-LOGITS))
STATES = np.array(list(itertools.product([0.0, 1.0], repeat=2)))
PROBABILITY = np.prod(np.where(STATES == 1, P, 1 - P), axis=-1)
F = np.array([0.3, -1.2, 2.0, 0.7])  # of the four states: not a sum over bits
EXACT = np.array([PROBABILITY @ (F * (STATES[:, i] - P[i])) for i in range(2)])


def program(estimator):
    def model():
        with numpyro.handlers.mask(mask=False):
            b = numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(2)).to_event(1))
        numpyro.factor("f", jnp.asarray(F)[(2 * b[0] + b[1]).astype(int)])

    def guide():
        a = numpyro.param("a", jnp.asarray(LOGITS))
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("b", dist.Bernoulli(logits=a).to_event(1))

    return model, with_estimators(guide, {"b": estimator})


def gradients(estimator, tables, **state):
    particles = next(iter(tables.values())).shape[1]
    model, guide = program(estimator)
    elbo = OneAfterAnother({"b": estimator}, num_particles=particles)
    return -jax_gradients(elbo, model, guide, {"a": jnp.asarray(LOGITS)}, {"b": tables}, **state)[1]


def draws(n, particles=1):
    """Every outcome of n independent draws in each particle."""
    index = np.array(list(itertools.product(range(4), repeat=n * particles)))
    return {"value": STATES[index].reshape(-1, particles, n, 2)}, PROBABILITY[index].prod(-1)


def uniforms(*labels):
    """Cells of two uniforms for each label, exact for whatever is constant between thresholds and mirrored ones."""
    axes = [cells(P[i], 1 - P[i]) for _ in labels for i in range(2)]
    values, weights = grid(*axes)
    return {k: np.stack(values[2 * j : 2 * j + 2], -1)[:, None] for j, k in enumerate(labels)}, weights


def test_repeats_are_independent_draws():
    _, single = moments(gradients(Reinforce(Constant(0.4)), draws(1)[0]), draws(1)[1])
    tables, weights = draws(3)
    mean, variance = moments(gradients(Repeat(3, Reinforce(Constant(0.4))), tables), weights)
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)
    np.testing.assert_allclose(variance, single / 3, rtol=1e-12)


@pytest.mark.parametrize("baseline", [LeaveOneOut(), MovingAverage(), None], ids=repr)
def test_repeats_are_particles_of_one_site(baseline):
    """Repeat(3) with one particle is three particles: leave-one-out compares the repeats."""
    tables, weights = draws(3)
    state = {"b$state": {"mean": jnp.asarray(0.8), "started": jnp.asarray(1.0)}} if baseline == MovingAverage() else {}
    one = gradients(Repeat(3, Reinforce(baseline)), tables, **state)
    three = gradients(Reinforce(baseline), {"value": tables["value"].reshape(-1, 3, 1, 2)}, **state)
    np.testing.assert_allclose(one, three, atol=1e-13)
    np.testing.assert_allclose(moments(one, weights)[0], EXACT, atol=1e-12)


def test_repeats_and_particles():
    tables, weights = draws(2, particles=2)
    mean, _ = moments(gradients(Repeat(2, Reinforce(LeaveOneOut())), tables), weights)
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)


def test_repeated_disarm():
    _, single = moments(gradients(DisARM(), uniforms("u")[0]), uniforms("u")[1])
    tables, weights = uniforms("0_u", "1_u")
    mean, variance = moments(gradients(Repeat(2, DisARM()), tables), weights)
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)
    np.testing.assert_allclose(variance, single / 2, rtol=1e-12)


def test_antithetic_pairs():
    """The two draws mirror each other: exact by cells, and by hand the mean of the two single estimates."""
    tables, weights = uniforms("value")
    found = gradients(Antithetic(Reinforce(Constant(0.4))), tables)
    np.testing.assert_allclose(moments(found, weights)[0], EXACT, atol=1e-12)
    u = tables["value"][:, 0]
    by_hand = 0
    for x in (u, 1 - u):
        b = x > 1 - P
        by_hand = by_hand + 0.5 * (F[(2 * b[:, 0] + b[:, 1]).astype(int)] - 0.4)[:, None] * (b - P)
    np.testing.assert_allclose(found, by_hand, atol=1e-13)


def test_averages_of_different_estimators():
    parts = (DisARM(), Reinforce(Constant(0.4)))
    (u, wu), (value, wv) = uniforms("0_u"), draws(1)
    i, j = (x.ravel() for x in np.meshgrid(range(len(wu)), range(len(wv)), indexing="ij"))
    tables = {"0_u": u["0_u"][i], "value": value["value"][j]}
    mean, variance = moments(gradients(Average(parts), tables), wu[i] * wv[j])
    np.testing.assert_allclose(mean, EXACT, atol=1e-12)
    alone = [moments(gradients(parts[0], {"u": u["0_u"]}), wu)[1], moments(gradients(parts[1], value), wv)[1]]
    np.testing.assert_allclose(variance, (alone[0] + alone[1]) / 4, rtol=1e-12)


def test_combined_weights_minimise_the_variance():
    """With the true second moments as its past, the mean stays exact and the variance is that of the best weights."""
    parts = (DisARM(), Reinforce(Constant(0.4)))
    (u, wu), (value, wv) = uniforms("0_u"), draws(1)
    i, j = (x.ravel() for x in np.meshgrid(range(len(wu)), range(len(wv)), indexing="ij"))
    tables, weights = {"0_u": u["0_u"][i], "value": value["value"][j]}, wu[i] * wv[j]
    g = np.stack([gradients(parts[0], {"u": u["0_u"]})[i], gradients(parts[1], value)[j]])
    second = np.einsum("g,jgi,kgi->jk", weights, g, g)
    w = np.linalg.solve(second, np.ones(2))
    best = np.einsum("j,jgi->gi", w / w.sum(), g)
    for scale in (1.0, 250.0):  # the level of the moments says nothing
        state = {"b$state": {"moments": jnp.asarray(scale * second)}}
        found = gradients(Combine(parts), tables, **state)
        np.testing.assert_allclose(moments(found, weights)[0], EXACT, atol=1e-12)
        np.testing.assert_allclose(moments(found, weights)[1].sum(), moments(best, weights)[1].sum(), rtol=1e-3)
    alone = moments(g[0], weights)[1].sum()
    assert moments(best, weights)[1].sum() < 0.97 * alone
    first = gradients(Combine(parts), tables, **{"b$state": {"moments": jnp.zeros((2, 2))}})
    np.testing.assert_allclose(first, g.mean(0), atol=1e-13)


def test_combine_keeps_moments_of_the_past_only():
    """The new state is a running mean of this step's products; this step's weights come from the state before it."""
    parts = (DisARM(), Reinforce())
    model, guide = program(Combine(parts, decay=0.9))
    elbo = InjectedJax({"b": Combine(parts, decay=0.9)})
    tables = {"0_u": jnp.asarray([[0.3, 0.95]]), "value": jnp.asarray([[1.0, 0.0]])}
    elbo.randomness.table = {"b": tables}
    old = jnp.asarray([[2.0, 0.5], [0.5, 3.0]])
    params = {"a": jnp.asarray(LOGITS), "b$state": {"moments": old}}
    out = elbo.loss_with_mutable_state(jax.random.key(0), params, model, guide)
    value = {k: np.asarray(x)[None] for k, x in tables.items()}
    g = [gradients(DisARM(), {"u": value["0_u"]})[0], gradients(Reinforce(), {"value": value["value"][:, :, None]})[0]]
    now = [[x @ y for y in g] for x in g]
    np.testing.assert_allclose(out["mutable_state"]["b$state"]["moments"], 0.9 * old + 0.1 * np.array(now), atol=1e-12)


def wide(tau):
    """Cells of the proposal's uniforms, its logits divided by ``tau``."""
    return [cells(1 - 1 / (1 + np.exp(-a / tau))) for a in LOGITS]


PLAIN = Reinforce(Constant(0.4))
WIDE = ImportanceSampled(PLAIN, 2.0)
#: estimator, how many draws of the site's own, and the cells of what other noise it asks for
NESTED = [
    (Average((WIDE, DisARM())), 1, {"0_wide": wide(2.0), "1_u": [cells(p, 1 - p) for p in P]}),
    (Average((Reinforce(), WIDE)), 2, {"1_wide": wide(2.0)}),
    (Repeat(2, WIDE), 2, {"0_wide": wide(2.0), "1_wide": wide(2.0)}),
    (Combine((WIDE, PLAIN)), 2, {"0_wide": wide(2.0)}),
    (Combine((Repeat(2, Reinforce(LeaveOneOut())), PLAIN)), 3, {}),
    (Average((PLAIN, Repeat(2, Reinforce(LeaveOneOut())))), 3, {}),
    (Average((Repeat(2, Reinforce(LeaveOneOut())), PLAIN)), 3, {}),
    (Repeat(2, Average((PLAIN, Reinforce()))), 4, {}),
    (Repeat(2, Repeat(2, PLAIN)), 4, {}),
    (Average((Antithetic(PLAIN), PLAIN)), 1, {"0_value": [cells(p, 1 - p) for p in P]}),
    (Combine((Average((PLAIN, Enumerate())), PLAIN)), 3, {}),
]


@pytest.mark.parametrize(
    ("estimator", "count", "noise"), NESTED, ids=lambda x: repr(x) if x and x not in (1, 2) else ""
)
def test_compositions_of_compositions(estimator, count, noise):
    """Each part is scored at its own draw, whatever it is made of."""
    values, weight = draws(count)
    points, cell = grid(*(axis for axes in noise.values() for axis in axes)) if noise else ([], np.ones(1))
    i, j = (x.ravel() for x in np.meshgrid(range(len(weight)), range(len(cell)), indexing="ij"))
    tables = {"value": values["value"][i]}
    for k, label in enumerate(noise):
        tables[label] = np.stack(points[2 * k : 2 * k + 2], -1)[j][:, None]
    uneven = {"b$state": {"moments": jnp.asarray([[2.0, 0.5], [0.5, 3.0]])}}
    found = gradients(estimator, tables, **(uneven if isinstance(estimator, Combine) else {}))
    np.testing.assert_allclose(moments(found, weight[i] * cell[j])[0], EXACT, atol=1e-12)


def test_what_cannot_be_composed_is_refused():
    tables = {"0_u": np.full((1, 1, 2), 0.3), "value": np.zeros((1, 1, 1, 2))}
    for estimator, message in (
        (Antithetic(DisARM()), r"site 'b': DisARM\(\) compares draws"),
        (Antithetic(ARM()), r"site 'b': ARM\(\) compares draws that are mirrored already"),
        (Antithetic(Reinforce(LeaveOneOut())), r"site 'b': Reinforce\(LeaveOneOut\(\)\) takes the mirrored draw"),
        (Antithetic(Repeat(2, Reinforce(LeaveOneOut()))), r"site 'b': Repeat\(.* takes the mirrored draw"),
        (Average((DisARM(), ControlVariate(abs, abs, 0.5))), r"it cannot with ControlVariate"),
        (
            ImportanceSampled(Reinforce(OptimalConstant(PastSteps(0.9)))),
            r"site 'b': ImportanceSampled has no score norm",
        ),
        (Repeat(2, Repeat(2, Reinforce(OptimalConstant(PastSteps(0.9))))), r"site 'b': Repeat has no score norm"),
        (Repeat(2, Pathwise()), "site 'b': Repeat evaluates several draws"),
        (Average((DisARM(), Reinforce(OptimalConstant(PastSteps(0.9))))), "site 'b': Average has no score norm"),
        (Average((DisARM(), Reinforce(LeaveOneOut()))), "site 'b': LeaveOneOut needs at least two particles"),
    ):
        with pytest.raises(EstimatorError, match=message):
            gradients(estimator, tables)
    for bad in (
        lambda: Repeat(1, DisARM()),
        lambda: Average((DisARM(),)),
        lambda: Combine((DisARM(), REBAR()), decay=1),
    ):
        with pytest.raises(ValueError, match=r"needs"):
            bad()
    with pytest.raises(TypeError, match="takes estimators"):
        Average((DisARM(), LeaveOneOut()))
