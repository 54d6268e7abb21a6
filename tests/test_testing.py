"""The public test kit finds the exact gradient, knows a biased one, and says what is wrong with a program."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import numpyro.infer
import pyro
import pyro.distributions as tdist
import pyro.infer
import pytest
import torch

import ppl_estimators
from ppl_estimators import (
    RELAX,
    DisARM,
    Enumerate,
    EstimatorError,
    GeneralizedPathwise,
    ImportanceWeighted,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
    StraightThrough,
)
from ppl_estimators import numpyro as jax_side
from ppl_estimators import pyro as torch_side
from ppl_estimators.backends import of_program
from ppl_estimators.testing import (
    Biased,
    Differ,
    TooFewDraws,
    assert_same_gradient,
    assert_unbiased,
    exact_gradient,
    zoo,
)
from ppl_estimators.testing.power import Sums, Wanted, measure
from ppl_estimators.testing.zoo.oracle import gradient

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]
LIBRARIES = ("pyro", "numpyro")


# ---- exact_gradient: against sums in NumPy that know neither library -------------------------------------------------

IN_PYRO = (
    "chain scaled chain3 mixed delta subsample amortised masked_by_handler masked_by_distribution undeclared event "
    "crossed reentered summed auxiliary categories subsampled_bits branching switching branching_guide dynamic "
    "over_time local minibatch_global enumerated single_zero"
)
IN_NUMPYRO = "scaled mixed delta subsample masked_by_handler event crossed categories switching over_time"
CASES = [("pyro", n) for n in IN_PYRO.split()] + [("numpyro", n) for n in IN_NUMPYRO.split()]


@pytest.mark.parametrize(("library", "name"), CASES)
def test_exact_gradient_is_the_sum_over_states(library, name):
    case = zoo.CASES[name]
    model, guide = case.build(library)
    with pyro.validation_enabled(case.strict):
        exact = exact_gradient(model, guide)
    assert abs(exact.value + case.exact_elbo()) < 1e-9
    expected = case.exact_gradient()
    assert exact.gradient.keys() == expected.keys()
    for key, g in expected.items():
        np.testing.assert_allclose(exact.gradient[key], g, rtol=0, atol=1e-9, err_msg=key)
    assert exact.quadrature_error < 1e-9


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["mixture", "wrapped"])
def test_exact_gradient_of_mixtures_and_transforms(library, name):
    case = zoo.CASES[name]
    exact = exact_gradient(*case.build(library), nodes={"mixture": 120, "wrapped": 5}[name])
    for key, g in case.exact_gradient().items():
        np.testing.assert_allclose(exact.gradient[key], g, atol={"mixture": 2e-6, "wrapped": 1e-4}[name], err_msg=key)
        assert np.abs(exact.gradient[key] - g).max() <= exact.quadrature_error + 1e-9


def several(library, with_laplace):
    """Three coin flips at once, with a Laplace of constrained scale or a correlated pair."""
    ppl = zoo.language(library)
    d = ppl.dist
    param, start, constraints = (
        (pyro.param, torch.tensor, tdist.constraints)
        if library == "pyro"
        else (numpyro.param, jnp.asarray, jdist.constraints)
    )

    def model():
        k = ppl.sample("k", d.Binomial(3, probs=ppl.array(0.4)))
        if with_laplace:
            loc = ppl.sample("u", d.Normal(ppl.array(0.3), 1.5))
        else:
            v = ppl.sample("v", d.MultivariateNormal(ppl.array([0.1, -0.4]), ppl.array([[1.0, 0.3], [0.3, 2.0]])))
            loc = v[..., 0] - v[..., 1]
        ppl.sample("x", d.Normal(loc + k, 1.0), obs=ppl.array(0.7))

    def guide():
        ppl.sample("k", d.Binomial(3, logits=ppl.param("a", {"a": 0.6})))
        if with_laplace:
            b = param("b", start(0.8), constraint=constraints.positive)
            ppl.sample("u", d.Laplace(ppl.param("m", {"m": 0.2}), b))
        else:
            tril = ppl.array([[0.9, 0.0], [0.4, 0.7]])
            ppl.sample("v", d.MultivariateNormal(ppl.param("m", {"m": [0.5, -0.2]}), scale_tril=tril))

    return model, guide


def several_loss(p, with_laplace):
    """−ELBO of `several` up to a constant, at the unconstrained scale; variances add."""
    s, m = 1 / (1 + np.exp(-p["a"])), p["m"]
    if with_laplace:
        b = np.exp(p["b"])
        entropy_and_prior = np.log(b) - 0.5 * ((m - 0.3) ** 2 + 2 * b**2) / 2.25
        mean, variance = m, 2 * b**2
    else:
        d = m - np.array([0.1, -0.4])
        entropy_and_prior = -0.5 * d @ np.linalg.inv(np.array([[1.0, 0.3], [0.3, 2.0]])) @ d
        mean, variance = m[0] - m[1], 0.81 + 0.65 - 0.72
    kl = 3 * (s * np.log(s / 0.4) + (1 - s) * np.log((1 - s) / 0.6))
    return kl - entropy_and_prior + 0.5 * ((0.7 - mean - 3 * s) ** 2 + variance + 3 * s * (1 - s))


@pytest.mark.parametrize("with_laplace", [True, False])
@pytest.mark.parametrize("library", LIBRARIES)
def test_other_families_against_closed_forms(library, with_laplace):
    exact = exact_gradient(*several(library, with_laplace), nodes=40 if with_laplace else 6)
    point = {"a": 0.6, "m": 0.2, "b": np.log(0.8)} if with_laplace else {"a": 0.6, "m": [0.5, -0.2]}
    right = gradient(lambda p: several_loss(p, with_laplace), {k: np.asarray(v) for k, v in point.items()})
    assert exact.gradient.keys() == right.keys()
    for key, g in right.items():
        np.testing.assert_allclose(exact.gradient[key], g, atol=1e-4 if with_laplace else 1e-10, err_msg=key)
        assert np.abs(exact.gradient[key] - g).max() <= exact.quadrature_error + 1e-10


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_jump_in_a_continuous_latent_has_its_derivative(library):
    """log p(x | z) is 3 higher where z > 0.2; the derivative along reparameterised draws would miss that."""
    ppl = zoo.language(library)

    def model():
        z = ppl.sample("z", ppl.dist.Normal(ppl.array(0.0), 1.0))
        ppl.sample("x", ppl.dist.Normal(3.0 * (z > 0.2), 1.0), obs=ppl.array(2.5))

    def guide():
        ppl.sample("z", ppl.dist.Normal(ppl.param("m", {"m": 0.3}), 0.8))

    exact = exact_gradient(model, guide, nodes=60)
    density = np.exp(-(0.1**2) / (2 * 0.64)) / (0.8 * np.sqrt(2 * np.pi))
    assert abs(exact.gradient["m"] - (0.3 - 3 * density)) < 0.05  # the missed one is 1.5 off
    assert exact.quadrature_error > 1e-3


@pytest.mark.parametrize("library", LIBRARIES)
def test_params_move_the_point_and_are_constrained(library):
    model, guide = zoo.CASES["chain"].build(library)
    moved = {k: v + 0.3 for k, v in zoo.CASES["chain"].params.items()}
    exact = exact_gradient(model, guide, params=moved)
    expected = replace(zoo.CASES["chain"], params=moved).exact_gradient()
    for key, g in expected.items():
        np.testing.assert_allclose(exact.gradient[key], g, atol=1e-9)


@pytest.mark.parametrize("library", LIBRARIES)
def test_given_minibatches(library):
    """A partition has the mean of all minibatches; a single one is another gradient."""
    case = zoo.CASES["subsample"]
    model, guide = case.build(library)
    half = exact_gradient(model, guide, minibatches={"data": [[0, 3], [1, 2]]})
    one = exact_gradient(model, guide, minibatches={"data": [[0, 3]]})
    np.testing.assert_allclose(half.gradient["b"], case.exact_gradient()["b"], atol=1e-9)
    assert abs(one.gradient["b"] - half.gradient["b"]) > 0.05


def test_pyro_is_left_as_it_was():
    model, guide = zoo.CASES["chain"].build("pyro")
    elbo = torch_side.EstimatorELBO(Reinforce(MovingAverage()))
    elbo.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    before = {k: (store[k].unconstrained(), store[k].detach().clone()) for k in store.keys()}
    grads = {k: p.grad.clone() for k, (p, _) in before.items() if p.grad is not None}
    assert grads
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    exact_gradient(model, guide, params={"a": 1.3})
    assert_unbiased(elbo, model, guide, params={"a": 1.3}, able_to_see=0.9, max_draws=3000)
    assert_same_gradient((torch_side.EstimatorELBO(), model, guide), twin("chain"), draws=1)
    assert list(store.keys()) == list(before)
    for k, (p, value) in before.items():
        assert store[k].unconstrained() is p
        assert torch.equal(store[k], value)
        assert p.grad is None or torch.equal(p.grad, grads[k])
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()


def test_an_empty_store_stays_empty():
    model, guide = zoo.CASES["chain"].build("pyro")
    exact_gradient(model, guide)
    assert len(pyro.get_param_store()) == 0


# ---- which library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_is_found_by_whose_statements_run(library):
    model, guide = zoo.CASES["chain"].build(library)
    state = torch.random.get_rng_state()
    assert of_program(model, guide, (), {}) == library
    assert len(pyro.get_param_store()) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_program_of_neither_library():
    with pytest.raises(EstimatorError, match=r"neither the guide nor the model runs a sample statement.*backend="):
        exact_gradient(lambda: 1.0, lambda: 2.0)
    with pytest.raises(EstimatorError, match=r'backend=.jax. is not known. Write "pyro" or "numpyro"'):
        exact_gradient(lambda: 1.0, lambda: 2.0, backend="jax")


def test_importing_it_imports_neither_library():
    code = (
        "import sys, ppl_estimators.testing as kit; kit.zoo.CASES['chain'].exact_gradient(); "
        "bad = {'torch', 'jax', 'pyro', 'numpyro'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(ppl_estimators.__file__).parent.parent)


@pytest.mark.parametrize(("library", "absent"), [("pyro", "jax"), ("numpyro", "torch")])
def test_one_library_is_enough(library, absent):
    program = "import sys; from ppl_estimators.testing import *; "
    program += f"e = exact_gradient(*zoo.CASES['single'].build({library!r})); assert e.states == 2; "
    program += f"bad = [m for m in sys.modules if m.split('.')[0] == {absent!r}]; assert not bad, bad"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(ppl_estimators.__file__).parent.parent)


# ---- the user's mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_too_many_states(library):
    with pytest.raises(EstimatorError, match=r"1,099,511,627,776 states.*20,000: site 'z_0' 2.*and 32 sites more"):
        exact_gradient(*zoo.CASES["many_local"].build(library))
    with pytest.raises(EstimatorError, match=r"48 states, and max_states is 40: site 'z' 2\^2, .*'data' 6 minibatches"):
        exact_gradient(*zoo.CASES["subsample"].build(library), max_states=40)


@pytest.mark.parametrize("library", LIBRARIES)
def test_mistakes_are_named(library):
    ppl = zoo.language(library)
    model, guide = zoo.CASES["single"].build(library)

    def gamma():
        ppl.sample("z", ppl.dist.Gamma(ppl.array(2.0), 1.0))

    def poisson():
        ppl.sample("z", ppl.dist.Poisson(ppl.array(2.0)))

    def spoiled():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(z, 1.0, validate_args=False), obs=ppl.array(np.nan))

    with pytest.raises(EstimatorError, match=r"site 'z': exact_gradient cannot sum over Gamma.*quantile.*reference="):
        exact_gradient(gamma, gamma, backend=library)
    with pytest.raises(EstimatorError, match=r"site 'z': .*Poisson.*small finite support"):
        exact_gradient(poisson, poisson, backend=library)
    with pytest.raises(EstimatorError, match=r"the guide draws no latent site.*in this order"):
        exact_gradient(model, lambda: None, backend=library)
    with pytest.raises(EstimatorError, match="site 'z_forgotten': a latent site of the model that the guide does not"):
        exact_gradient(*zoo.CASES["forgotten"].build(library))
    with pyro.validation_enabled(False):
        with pytest.raises(
            EstimatorError, match=r"site 'x': its log p in the model is nan where the latents are \{'z': "
        ):
            exact_gradient(spoiled, guide)
    with pytest.raises(EstimatorError, match=r"params: 'a' has shape \(2,\), the program's is \(\)"):
        exact_gradient(model, guide, params={"a": [0.1, 0.2]})
    with pytest.raises(EstimatorError, match=r"params: the program declares no parameter \['b'\].*'a'"):
        exact_gradient(model, guide, params={"b": 0.1})
    with pytest.raises(EstimatorError, match="no subsampled plate is called"):
        exact_gradient(model, guide, minibatches={"data": [[0]]})
    with pytest.raises(EstimatorError, match=r"plate 'data': .*index sequences of length 2 below 4"):
        exact_gradient(*zoo.CASES["subsample"].build(library), minibatches={"data": [[0, 4]]})


# ---- assert_unbiased -------------------------------------------------------------------------------------------------


def particles(library):
    """A Pyro step costs the same with many; a NumPyro draw does not."""
    return {"num_particles": 800 if library == "pyro" else 4, "vectorize_particles": True}


def side(library):
    return (torch_side, pyro.infer) if library == "pyro" else (jax_side, numpyro.infer)


@pytest.mark.parametrize("library", LIBRARIES)
def test_ours_passes(library):
    model, guide = zoo.CASES["masked_by_handler"].build(library)
    elbo = side(library)[0].EstimatorELBO(**particles(library))
    found = assert_unbiased(elbo, model, guide)
    assert found.sees <= 0.05
    assert found.sigmas < 3.5


def test_the_same_seed_gives_the_same_answer():
    model, guide = zoo.CASES["single"].build("pyro")
    elbo = torch_side.EstimatorELBO(num_particles=200, vectorize_particles=True)
    one, again, other = (assert_unbiased(elbo, model, guide, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_an_estimator_keeps_is_held_and_not_compared(library):
    model, guide = zoo.CASES["masked_by_handler"].build(library)
    guide = side(library)[0].with_estimators(guide, {"z": RELAX(baseline=MovingAverage())})
    elbo = side(library)[0].EstimatorELBO(**particles(library))
    assert assert_unbiased(elbo, model, guide, able_to_see=0.2).sees <= 0.2


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_biased_estimator_is_found_and_named(library):
    model, guide = zoo.CASES["event"].build(library)
    elbo = side(library)[0].EstimatorELBO(StraightThrough(), **particles(library))
    message = r"is biased: .*of 3 entries.*1% false alarms(.|\n)*parameter 'a'\[\d\]: .* standard errors off: exact"
    with pytest.raises(Biased, match=message) as caught:
        assert_unbiased(elbo, model, guide)
    assert caught.value.sigmas["a"].shape == (3,)


class StretchedJax(jax_side.EstimatorELBO):
    """Gradients 5% too long, at the right loss."""

    def loss(self, *args, **kwargs):
        loss = super().loss(*args, **kwargs)
        return 1.05 * loss - jax.lax.stop_gradient(0.05 * loss)


class StretchedTorch(torch_side.EstimatorELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        for _, p in pyro.get_param_store().named_parameters():
            p.grad *= 1.05
        return loss


@pytest.mark.parametrize("library", LIBRARIES)
def test_five_percent_are_seen(library):
    model, guide = zoo.CASES["masked_by_handler"].build(library)
    kind = StretchedTorch if library == "pyro" else StretchedJax
    with pytest.raises(Biased, match="parameter 'a'"):
        assert_unbiased(kind(**particles(library)), model, guide)


DEFECTS = [
    ("numpyro", "TraceGraph_ELBO", "scaled"),
    ("numpyro", "TraceGraph_ELBO", "over_time"),
    ("numpyro", "TraceGraph_ELBO", "masked_by_handler"),
    ("numpyro", "TraceGraph_ELBO", "single_zero"),
    ("pyro", "Trace_ELBO", "auxiliary"),
    ("pyro", "TraceGraph_ELBO", "reentered_same_plate"),
]


@pytest.mark.parametrize(("library", "name", "case"), DEFECTS)
def test_defects_of_the_stock_elbos_are_found(library, name, case):
    elbo = getattr(side(library)[1], name)(**particles(library))
    model, guide = zoo.CASES[case].build(library)
    with pytest.raises(Biased):
        assert_unbiased(elbo, model, guide)


@pytest.mark.filterwarnings("ignore:Currently, SVI with RenyiELBO loss")
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_bound_needs_its_reference(library):
    case = zoo.CASES["chain"]
    model, guide = case.build(library)
    ours, theirs = side(library)
    with pytest.raises(EstimatorError, match=r"RenyiELBO: its objective is not the ELBO.*reference="):
        assert_unbiased(theirs.RenyiELBO(alpha=0, num_particles=2), model, guide)
    exact = zoo.bound(case, 2, 0.0).exact_gradient()
    found = exact_gradient(model, guide, objective=ImportanceWeighted(), num_particles=2)
    assert found.states == 4**2
    for name, wanted in exact.items():
        np.testing.assert_allclose(found.gradient[name], wanted, rtol=1e-3, atol=1e-4)
    elbo = ours.EstimatorELBO(num_particles=2, objective=ImportanceWeighted(), vectorize_particles=True)
    assert_unbiased(elbo, model, guide, able_to_see=0.6)  # the gradient of the ELBO is .77 of its length away
    with pytest.raises(Biased):
        assert_unbiased(theirs.RenyiELBO(alpha=0, num_particles=2), model, guide, reference=exact, able_to_see=0.5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_too_few_draws_is_a_failure(library):
    model, guide = zoo.CASES["chain"].build(library)
    elbo = side(library)[0].EstimatorELBO(Reinforce())
    with pytest.raises(
        TooFewDraws, match=r"cannot see a bias of 5%.*About [\d,]+ draws can, and max_draws is 500"
    ) as e:
        assert_unbiased(elbo, model, guide, max_draws=500)
    assert e.value.needed > 5000


@pytest.mark.parametrize("library", LIBRARIES)
def test_references_that_cannot_be_compared(library):
    model, guide = zoo.CASES["local"].build(library)
    elbo = side(library)[0].EstimatorELBO()
    for reference, message in [
        ({"a": np.zeros(2)}, r"parameter 'a': the reference has shape \(2,\), the gradient \(3,\)"),
        ({"a": np.full(3, np.nan)}, "parameter 'a': the reference is not finite"),
        ({"b": np.ones(3)}, r"the reference names 'b', the program's parameters are \['a'\]"),
        ({}, "names no parameter"),
        ({"a": np.zeros(3)}, "the exact gradient is zero.*Move the parameters"),
    ]:
        with pytest.raises(EstimatorError, match=message):
            assert_unbiased(elbo, model, guide, reference=reference)
    with pytest.raises(ValueError, match=r"able_to_see=.* between 0 and 1, got 5"):
        assert_unbiased(elbo, model, guide, able_to_see=5)
    with pytest.raises(ValueError, match=r"max_draws=.*2 or more"):
        assert_unbiased(elbo, model, guide, max_draws=1)


def test_a_gradient_that_is_not_finite_is_named():
    class Broken(jax_side.EstimatorELBO):
        def loss(self, key, params, *args, **kwargs):
            sometimes = jnp.where(jax.random.uniform(key) < 0.1, jnp.nan, 0.0)
            return super().loss(key, params, *args, **kwargs) + sometimes * params["t"]

    model, guide = zoo.CASES["single"].build("numpyro")
    with pytest.raises(Biased, match=r"parameter 't': the gradient is not finite in \d+ of 256 draws"):
        assert_unbiased(Broken(), model, guide)


# ---- its power -------------------------------------------------------------------------------------------------------

REPETITIONS = 200


def raised(shift, repetitions=REPETITIONS):
    """How often a bias is reported where the gradient is normal around (1, -0.5, 0.2), correlated, of deviations
    (3, 1, 0.2), and its mean is moved by ``shift``."""
    exact, root = (
        np.array([1.0, -0.5, 0.2]),
        np.diag([3.0, 1.0, 0.2]) @ np.linalg.cholesky(np.array([[1.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 1.0]])),
    )
    found = draws = 0
    for seed in range(repetitions):

        def source(first, n, seed=seed):
            d = shift + np.random.default_rng([seed, first]).normal(size=(n, 3)) @ root.T
            return Sums(n, d.sum(0), (d**2).sum(0), np.zeros(3))

        outcome = measure(source, float(np.linalg.norm(exact)), Wanted(), 10**6)
        assert outcome.draws >= outcome.needed
        found, draws = found + outcome.biased, draws + outcome.draws
    return found / repetitions, draws / repetitions


def beyond(rate, repetitions=REPETITIONS, sigmas=3.0):
    """How many standard deviations of a binomial."""
    return rate + sigmas * np.sqrt(rate * (1 - rate) / repetitions)


@pytest.mark.slow
def test_false_alarms_and_detections_are_as_promised():
    """1% and 99%, within three standard deviations of 200 repetitions; half the bias is seen less often."""
    length = float(np.linalg.norm([1.0, -0.5, 0.2]))
    hardest = np.array([3.0, 1.0, 0.2])
    hardest *= 0.05 * length / np.linalg.norm(hardest)
    alarms, _ = raised(np.zeros(3))
    assert alarms <= beyond(0.01)
    for direction in (hardest, np.array([0.05 * length, 0, 0])):
        seen, _ = raised(direction)
        assert 1 - seen <= beyond(0.01)
    half, _ = raised(0.4 * hardest)
    assert half < 0.8


# ---- assert_same_gradient --------------------------------------------------------------------------------------------


def twin(name, estimators=None, **options):
    return jax_side.EstimatorELBO(estimators, **options), *zoo.CASES[name].build("numpyro")


def torch_twin(name, estimators=None, **options):
    return torch_side.EstimatorELBO(estimators, **options), *zoo.CASES[name].build("pyro")


@pytest.mark.parametrize(
    ("name", "estimators"),
    [
        ("chain", {"*": DisARM()}),
        ("chain3", {"*": Enumerate()}),  # one compiled body for three groups
        ("mixed", None),
        ("subsample", {"*": Enumerate()}),
        ("masked_by_distribution", {"*": Reinforce()}),
        ("categories", {"*": Reinforce()}),
        ("mixture", {"*": Reinforce()}),
    ],
)
def test_twins_are_the_same(name, estimators):
    assert_same_gradient(torch_twin(name, estimators), twin(name, estimators), draws=2)


def test_twins_with_networks_are_the_same():
    choice = {"z*": RELAX(hidden=3)}
    elbo, model, guide = torch_twin("chain")
    there, jax_model, jax_guide = twin("chain")
    mine = torch_side.with_estimators(guide, choice)
    theirs = jax_side.with_estimators(jax_guide, choice)
    assert_same_gradient((elbo, model, mine), (there, jax_model, theirs), draws=1)


def gamma_twins():
    def model(sample, d):
        w = sample("w", d.Gamma(2.0, 1.0))
        sample("x", d.Normal(w, 1.0), obs=torch.tensor(0.7) if d is tdist else 0.7)

    def torch_guide():
        pyro.sample("w", tdist.Gamma(pyro.param("c", torch.tensor(1.5)), 1.0))

    def jax_guide():
        numpyro.sample("w", jdist.Gamma(numpyro.param("c", 1.5), 1.0))

    chosen = {"w": GeneralizedPathwise()}
    return (
        (torch_side.EstimatorELBO(chosen), lambda: model(pyro.sample, tdist), torch_guide),
        (jax_side.EstimatorELBO(chosen), lambda: model(numpyro.sample, jdist), jax_guide),
    )


def test_twins_that_ask_for_gamma_noise_get_the_same():
    assert_same_gradient(*gamma_twins(), draws=2)


def test_twins_that_differ_are_told_apart():
    with pytest.raises(Differ, match=r"draw 0: the gradient of '\w' is .* in Pyro and .* in NumPyro"):
        assert_same_gradient(torch_twin("chain", {"*": DisARM()}), (StretchedJax({"*": DisARM()}), *twin("chain")[1:]))
    case = zoo.CASES["masked_by_handler"]
    with pytest.raises(Differ, match="the loss is"):
        assert_same_gradient(
            torch_twin("masked_by_handler", {"*": Reinforce()}),
            (jax_side.EstimatorELBO({"*": Reinforce()}), numpyro.handlers.scale(case.build("numpyro")[0], scale=2.0),
             case.build("numpyro")[1]),
        )  # fmt: skip


def test_twins_that_cannot_be_compared():
    for one, other, message in [
        (torch_twin("chain"), twin("mixed"), r"different parameters: .*'u'.* only in Pyro, .*'m'.* only in NumPyro"),
        (torch_twin("chain"), (numpyro.infer.Trace_ELBO(), *twin("chain")[1:]), "must be ppl_estimators.numpyro.Est"),
        (
            torch_twin("chain", Reinforce(LeaveOneOut()), num_particles=2),
            twin("chain"),
            "compares one particle, got num_particles=2 in the pyro twin",
        ),
        (torch_twin("single", Reinforce()), twin("single", DisARM()), r"site 'z': the NumPyro twin draws 'u' here"),
    ]:
        with pytest.raises(EstimatorError, match=message):
            assert_same_gradient(one, other)
    with pytest.raises(ValueError, match=r"draws=.*1 or more"):
        assert_same_gradient(torch_twin("single"), twin("single"), draws=0)
