"""The gradient of the model's own parameters, averaged over the values that an estimator evaluates: its exact mean and
variance, integrated over the noise."""

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
from injected import InjectedJax, OneAfterAnother, cells, grid, jax_gradients

from ppl_estimators import (
    ARMS,
    ARSM,
    Antithetic,
    Average,
    Combine,
    Constant,
    DisARM,
    Enumerate,
    EstimatorWarning,
    GumbelSoftmax,
    ImportanceSampled,
    Reinforce,
    Repeat,
    SumAndSample,
    UnorderedSet,
)
from ppl_estimators.core.errors import EstimatorError
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

pytestmark = pytest.mark.usefixtures("double_precision")

P = 0.3
LOGIT = float(np.log(P / (1 - P)))
LOGITS = np.log(np.array([0.2, 0.5, 0.3]))


def bit():
    """The ELBO's gradient in theta is b."""
    theta = numpyro.param("theta", jnp.asarray(0.4))
    b = numpyro.sample("z", dist.Bernoulli(logits=0.2))
    numpyro.factor("f", theta * b)


def bit_guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.asarray(LOGIT))))


TAU = 2.0
R = 1 / (1 + np.exp(-LOGIT / TAU))  # the proposal's
SHARE = P / (P + R)  # q / (q + r) at 1
WIDE = ImportanceSampled(Reinforce(), TAU)
#: composition, draws of its own, cells of other noise, and the variance of the mean over its values
COMPOSED = [
    (Repeat(3, Reinforce()), 3, {}, P * (1 - P) / 3),
    (Repeat(2, DisARM()), 0, {"0_u": (P, 1 - P), "1_u": (P, 1 - P)}, P * (1 - 2 * P) / 4),
    (Antithetic(Reinforce()), 0, {"value": (P, 1 - P)}, P * (1 - 2 * P) / 2),
    (Average((DisARM(), Reinforce())), 1, {"0_u": (P, 1 - P)}, (4 * P * (1 - 2 * P) / 2 + P * (1 - P)) / 9),
    (Average((Enumerate(), Reinforce())), 2, {}, P * (1 - P) / 4),
    (Average((Repeat(2, Reinforce()), Enumerate())), 3, {}, P * (1 - P) / 8),
    (Combine((Reinforce(), Enumerate())), 2, {}, P * (1 - P) / 4),
    (WIDE, 1, {"wide": (1 - R,)}, SHARE**2 * (P * (1 - P) + R * (1 - R))),
    (Repeat(2, WIDE), 2, {"0_wide": (1 - R,), "1_wide": (1 - R,)}, SHARE**2 * (P * (1 - P) + R * (1 - R)) / 2),
]


@pytest.mark.parametrize(("spec", "count", "noise", "variance"), COMPOSED, ids=lambda x: repr(x) if callable(x) else "")
def test_compositions_average_over_all_that_they_evaluate(spec, count, noise, variance):
    own = [(np.array([0.0, 1.0]), np.array([1 - P, P]))] * count
    values, weight = grid(*own, *(cells(*breaks) for breaks in noise.values()))
    tables = {label: x[:, None] for label, x in zip(noise, values[count:], strict=True)}
    if count:
        tables["value"] = np.stack(values[:count], -1)[:, None]
    elbo = OneAfterAnother({"z": spec}, average_model=True)
    params = {"a": jnp.asarray(LOGIT), "theta": jnp.asarray(0.4)}
    state = {"z$state": {"moments": jnp.eye(2)}} if isinstance(spec, Combine) else {}
    guide = with_estimators(bit_guide, {"z": spec})
    found = jax_gradients(elbo, bit, guide, params, {"z": tables}, **state)[1][:, -1]
    np.testing.assert_allclose(-(weight @ found), P, atol=1e-10)
    np.testing.assert_allclose(weight @ found**2 - P**2, variance, atol=1e-10)


def test_every_exchange_of_arsm_is_a_draw():
    """Sampled: the mean over the four values of three categories, which single draws miss by twice as much."""
    u = np.random.default_rng(0).uniform(size=(200_000, 1, 3))
    params, p = {"a": jnp.asarray(LOGITS), "theta": jnp.asarray(0.4)}, np.exp(LOGITS)
    elbo = InjectedJax({"z": ARSM()}, average_model=True)
    found = -jax_gradients(elbo, category, category_guide, params, {"z": {"u": u}})[1][:, -1]
    assert abs(found.mean() - p @ VALUE) < 5 * found.std() / 200_000**0.5
    assert found.var() < 0.6 * (p @ VALUE**2 - (p @ VALUE) ** 2)


@pytest.mark.parametrize("law", ["Normal", "Poisson"])
def test_draws_of_any_law_are_averaged(law):
    """Repeat() of a score function, at sites without logits: the mean over its draws, in both libraries."""
    given = (0.0, 1.0) if law == "Normal" else (1.0,)
    x, theta = jnp.asarray([2.0, 1.0]), {"theta": jnp.asarray(0.4)}

    def model(sample, factor, theta):
        z = sample()
        seen.append(z)
        factor("f", theta * z)

    def draw():
        return numpyro.sample("z", getattr(dist, law)(*given))

    elbo = OneAfterAnother({"z": Repeat(2, Reinforce())}, average_model=True)
    elbo.randomness.table, seen = {"z": {"value": x[None]}}, []

    def loss(p):
        return elbo.loss(jax.random.key(0), p, lambda: model(draw, numpyro.factor, numpyro.param("theta", 0.0)), draw)

    np.testing.assert_allclose(jax.grad(loss)(theta)["theta"], -x.mean(), atol=1e-12)

    def torch_draw():
        return pyro.sample("z", getattr(tdist, law)(*map(torch.tensor, given)))

    pyro.clear_param_store()
    elbo, parameter = TorchELBO({"z": Repeat(2, Reinforce())}, average_model=True), torch.tensor(0.4)
    for _ in range(2):  # the first step looks at the structure too
        seen, parameter.grad = [], None
        parameter.requires_grad_()
        elbo.loss_and_grads(lambda: model(torch_draw, pyro.factor, parameter), torch_draw)
    assert len(seen) == 2
    np.testing.assert_allclose(parameter.grad, -sum(seen).detach() / 2, atol=1e-12)


def torch_factor(name, x):
    pyro.factor(name, x, has_rsample=True)


@pytest.mark.parametrize("library", ["numpyro", "pyro"])
def test_a_factor_of_the_guide_is_a_cost(library):
    """Its own gradient is averaged as that of any cost: of theta z, over both values of an enumerated bit."""

    def program(p, d, factor, one):
        def model():
            p.sample("z", d.Bernoulli(logits=0.2 * one))
            p.sample("x", d.Normal(0.0 * one, 1.0), obs=0.5 * one)

        def guide():
            theta = p.param("theta", 0.4 * one)
            factor("f", theta * p.sample("z", d.Bernoulli(logits=LOGIT * one)))
            p.sample("y", d.Normal(theta, 1.0), obs=0.5 * one, infer={"is_auxiliary": True})

        return model, guide

    wanted = P + (0.5 - 0.4)  # the loss holds log q
    if library == "numpyro":
        model, guide = program(numpyro, dist, numpyro.factor, jnp.asarray(1.0))
        elbo = InjectedJax({"z": Enumerate()}, average_model=True)
        tables = {"z": {"value": np.array([[0.0], [1.0]])}}
        found = jax_gradients(elbo, model, guide, {"theta": jnp.asarray(0.4)}, tables)[1][:, 0]
    else:
        model, guide = program(pyro, tdist, torch_factor, torch.tensor(1.0))
        elbo, found = TorchELBO({"z": Enumerate()}, average_model=True), []
        for seed in range(4):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            elbo.loss_and_grads(model, guide)
            found.append(pyro.param("theta").grad.item())
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_constant_schedule_is_a_temperature():
    """The gradient of a relaxed site below a pair, averaged over the pair: the same whichever way 0.5 is given."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        y = numpyro.sample("y", dist.Bernoulli(logits=0.3 - z))
        numpyro.sample("x", dist.Normal(numpyro.param("w", 0.7) * (z + 2 * y), 1.0), obs=1.3)

    def guide():
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.4)))
        numpyro.sample("y", dist.Bernoulli(logits=numpyro.param("b", 0.2) + 0.5 * z))

    rng = np.random.default_rng(0)
    tables = {n: {"u": rng.uniform(size=(6, 1))} for n in "zy"}
    params = {"a": jnp.asarray(0.4), "b": jnp.asarray(0.2), "w": jnp.asarray(0.7)}
    found = []
    for temperature, state in ((0.5, {}), (lambda step: 0.5 + 0 * step, {"y$state": {"steps": jnp.asarray(3.0)}})):
        spec = {"z": DisARM(), "y": GumbelSoftmax(temperature)}
        elbo = InjectedJax(spec, average_model=True)
        found.append(jax_gradients(elbo, model, with_estimators(guide, spec), params, tables, **state)[1])
    np.testing.assert_allclose(found[0], found[1], atol=1e-14)


VALUE = np.array([1.0, -2.0, 0.5])


def category():
    theta = numpyro.param("theta", jnp.asarray(0.4))
    k = numpyro.sample("z", dist.Categorical(logits=jnp.zeros(3)))
    numpyro.factor("f", theta * jnp.asarray(VALUE)[k])


def category_guide():
    numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", jnp.asarray(LOGITS))))


def moments(elbo, model, guide, params, tables, weight):
    """Exact mean and variance of the gradient in theta."""
    found = jax_gradients(elbo, model, guide, params, tables)[1][:, -1]
    return -(weight @ found), weight @ found**2 - (weight @ found) ** 2


@pytest.mark.parametrize(("average", "variance"), [(False, P * (1 - P)), (True, P * (1 - 2 * P) / 2)])
def test_a_pair_of_disarm(average, variance):
    """b alone has variance p (1 - p); (b + b~)/2 with b~ of the mirrored noise has p (1 - 2p) / 2."""
    u, weight = cells(P, 1 - P)
    elbo = InjectedJax({"z": DisARM()}, average_model=average)
    params = {"a": jnp.asarray(LOGIT), "theta": jnp.asarray(0.4)}
    mean, found = moments(elbo, bit, bit_guide, params, {"z": {"u": u[:, None]}}, weight)
    np.testing.assert_allclose(mean, P, atol=1e-10)
    np.testing.assert_allclose(found, variance, atol=1e-10)


@pytest.mark.parametrize(("average", "variance"), [(False, P * (1 - P)), (True, 0.0)])
def test_an_enumerated_bit(average, variance):
    elbo = InjectedJax({"z": Enumerate()}, average_model=average)
    params = {"a": jnp.asarray(LOGIT), "theta": jnp.asarray(0.4)}
    tables = {"z": {"value": np.array([[0.0], [1.0]])}}
    mean, found = moments(elbo, bit, bit_guide, params, tables, np.array([1 - P, P]))
    np.testing.assert_allclose(mean, P, atol=1e-10)
    np.testing.assert_allclose(found, variance, atol=1e-10)


@pytest.mark.parametrize("spec", [Enumerate(), UnorderedSet(3), SumAndSample(2)], ids=repr)
def test_a_set_of_all_categories_has_no_variance(spec):
    rng = np.random.default_rng(0)
    u = rng.uniform(size=(50, 1, 3))
    tables = {"z": {"u": u, "value": np.argmax(LOGITS - np.log(-np.log(u)), -1)}}
    params = {"a": jnp.asarray(LOGITS), "theta": jnp.asarray(0.4)}
    elbo = InjectedJax({"z": spec}, average_model=True)
    found = jax_gradients(elbo, category, category_guide, params, tables)[1][:, -1]
    np.testing.assert_allclose(-found, np.exp(LOGITS) @ VALUE, atol=1e-12)


@pytest.mark.parametrize(("spec", "pairs"), [(UnorderedSet(2), False), (SumAndSample(1), True)], ids=repr)
def test_two_of_three_categories(spec, pairs):
    """Exact over the orders in which Gumbel noise can put the categories: p_i p_j / (1 - p_i) for the first two."""
    p = np.exp(LOGITS)
    orders = [(i, j, 3 - i - j) for i in range(3) for j in range(3) if i != j]
    weight = np.array([p[i] * p[j] / (1 - p[i]) for i, j, _ in orders])
    perturbed = np.array([[3.0 - order.index(c) for c in range(3)] for order in orders])  # LOGITS - log(-log u)
    u = np.exp(-np.exp(LOGITS - perturbed))
    params = {"a": jnp.asarray(LOGITS), "theta": jnp.asarray(0.4)}
    tables = {"z": {"u": u[:, None]}}
    alone = moments(InjectedJax({"z": spec}), category, category_guide, params, tables, weight)
    mean, found = moments(
        InjectedJax({"z": spec}, average_model=True), category, category_guide, params, tables, weight
    )
    np.testing.assert_allclose([mean, alone[0]], p @ VALUE, atol=1e-10)
    np.testing.assert_allclose(alone[1], p @ VALUE**2 - (p @ VALUE) ** 2, atol=1e-10)
    top = 1  # the likeliest category
    if pairs:  # p_top v_top + (1 - p_top) v_r, r from the rest
        r = [c for c in range(3) if c != top]
        q = p[r] / (1 - p[top])
        expected = (1 - p[top]) ** 2 * (q @ VALUE[r] ** 2 - (q @ VALUE[r]) ** 2)
    else:  # the mean of the first draw given the set {i, j}
        expected = -((p @ VALUE) ** 2)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            first, second = p[i] * p[j] / (1 - p[i]), p[i] * p[j] / (1 - p[j])
            expected += (first * VALUE[i] + second * VALUE[j]) ** 2 / (first + second)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_impossible_values_cost_nothing():
    """A category that guide and model both give probability zero leaves a finite gradient."""

    def model():
        k = numpyro.sample("z", dist.Categorical(probs=jnp.array([0.5, 0.5, 0.0])))
        numpyro.sample("x", dist.Normal(numpyro.param("theta", jnp.asarray(0.4)) * k, 1.0), obs=1.0)

    def guide():
        a = numpyro.param("a", jnp.asarray(0.3))
        numpyro.sample("z", dist.Categorical(logits=jnp.stack([a, 0.0 * a, -jnp.inf])))

    params = {"a": jnp.asarray(0.3), "theta": jnp.asarray(0.4)}
    tables = {"z": {"value": np.array([[0], [1]])}}
    elbo = InjectedJax({"z": Enumerate()}, average_model=True)
    loss, gradient = jax_gradients(elbo, model, guide, params, tables)
    assert np.isfinite(loss).all()
    p = 1 / (1 + np.exp(0.3))  # of category 1
    np.testing.assert_allclose(gradient[:, 1], -p * (1 - 0.4), atol=1e-12)


def torch_model():
    theta = pyro.param("theta", torch.tensor([0.4, 0.1], dtype=torch.double))
    with pyro.plate("data", 2):
        z = pyro.sample("z", tdist.Bernoulli(torch.tensor(0.4)).expand([2]))
        pyro.sample("x", tdist.Normal(theta * z, 1.0), obs=torch.tensor([1.0, -1.0]))


def torch_guide():
    a = pyro.param("a", torch.tensor([0.3, -0.7], dtype=torch.double))
    with pyro.plate("data", 2):
        pyro.sample("z", tdist.Bernoulli(logits=a))


def torch_gradient(elbo, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    elbo.loss_and_grads(torch_model, torch_guide)
    return pyro.get_param_store()["theta"].unconstrained().grad


@pytest.mark.parametrize("estimator", [ARMS(5), Enumerate()], ids=repr)
def test_chunks_and_one_after_another_agree_in_pyro(estimator):
    options = ({"max_parallel": 1}, {"max_parallel": 3, "vectorize_particles": True, "max_plate_nesting": 1})
    one, other = (torch_gradient(TorchELBO({"z": estimator}, average_model=True, **o), 3) for o in options)
    drawn = torch_gradient(TorchELBO({"z": estimator}), 3)
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert not np.allclose(one, drawn)


def test_nothing_to_average_is_said():
    with pytest.warns(EstimatorWarning, match=r"average_model=True.*does nothing.*DisARM"):
        TorchELBO({"z": Reinforce(Constant(1.0))}, average_model=True, num_particles=1).loss(torch_model, torch_guide)
    with pytest.warns(EstimatorWarning, match=r"average_model=True.*does nothing.*DisARM"):
        JaxELBO({"z": Reinforce(Constant(1.0))}, average_model=True).loss(
            jax.random.key(0), {"a": jnp.asarray(0.1), "theta": jnp.asarray(0.4)}, bit, bit_guide
        )


def test_a_branch_on_a_drawn_value_is_refused():
    def model():
        if pyro.sample("z", tdist.Bernoulli(0.5)):
            pyro.sample("x", tdist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", tdist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0))))

    with pytest.raises(EstimatorError, match=r"average_model=True.*decides.*Leave average_model=False"):
        TorchELBO({"z": DisARM()}, average_model=True).loss_and_grads(model, guide)


@pytest.mark.parametrize("event", [True, False])
def test_two_dependent_elements(event):
    """Lanes move one at a time: each alternative counts for its lane only, and every lane as much as the others."""
    a = np.array([[0.4, -0.7, 0.2], [-0.5, 0.3, 1.1]])
    table = np.array([[1.0, -2.0, 0.5], [0.3, 2.2, -1.0], [1.7, 0.1, 0.9]])
    p = np.exp(a) / np.exp(a).sum(-1, keepdims=True)

    def sample(logits):
        law = dist.Categorical(logits=logits)
        return numpyro.sample("z", law.to_event(1) if event else law)

    def model():
        theta = numpyro.param("theta", jnp.asarray(0.4))
        z = sample(jnp.zeros((2, 3)))
        numpyro.factor("f", theta * jnp.asarray(table)[z[0], z[1]])

    def guide():
        sample(numpyro.param("a", jnp.asarray(a)))

    states = np.array([(i, j) for i in range(3) for j in range(3)])
    weight = p[0, states[:, 0]] * p[1, states[:, 1]]
    tables, params = {"z": {"value": states[:, None]}}, {"a": jnp.asarray(a), "theta": jnp.asarray(0.4)}
    found = {
        average: moments(InjectedJax({"z": Enumerate()}, average_model=average), model, guide, params, tables, weight)
        for average in (False, True)
    }
    f = table[states[:, 0], states[:, 1]]
    by_hand = (p[0] @ table[:, states[:, 1]] + p[1] @ table[states[:, 0]].T) / 2
    np.testing.assert_allclose([found[False][0], found[True][0]], weight @ f, atol=1e-10)
    np.testing.assert_allclose(found[True][1], weight @ by_hand**2 - (weight @ f) ** 2, atol=1e-10)
    assert found[True][1] < 0.7 * found[False][1]


@pytest.mark.parametrize("library", ["numpyro", "pyro"])
def test_a_value_that_cannot_occur_is_not_evaluated(library):
    """The cost is infinite at category 2, which has probability zero: 0 times infinity is no gradient."""
    p = 1 / (1 + np.exp(0.3))  # of category 1
    expected = -((1 - p) / 2 + p)

    def model(sample, factor, theta, logits, d):
        factor("f", theta / (2.0 - sample("z", d.Categorical(logits=logits))))

    if library == "numpyro":
        elbo = InjectedJax({"z": Enumerate()}, average_model=True)
        possible = jnp.array([0.3, 0.0, -jnp.inf])
        found = jax_gradients(
            elbo,
            lambda: model(numpyro.sample, numpyro.factor, numpyro.param("theta", 0.4), jnp.zeros(3), dist),
            lambda: numpyro.sample("z", dist.Categorical(logits=possible + 0 * numpyro.param("a", jnp.asarray(0.3)))),
            {"a": jnp.asarray(0.3), "theta": jnp.asarray(0.4)},
            {"z": {"value": np.array([[0], [1]])}},
        )[1][:, 1]
    else:
        logits, found = torch.tensor([0.3, 0.0, -torch.inf]), []
        for seed in range(6):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            TorchELBO({"z": Enumerate()}, average_model=True).loss_and_grads(
                lambda: model(pyro.sample, pyro.factor, pyro.param("theta", torch.tensor(0.4)), torch.zeros(3), tdist),
                lambda: pyro.sample("z", tdist.Categorical(logits=logits)),
            )
            found.append(pyro.param("theta").grad.item())
    np.testing.assert_allclose(found, expected, atol=1e-10)
