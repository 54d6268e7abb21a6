"""Estimators at sites that need care: counts, straight-through draws, float32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch

from ppl_estimators import (
    Average,
    EstimatorError,
    LeaveOneOut,
    MeasureValued,
    Pathwise,
    Reinforce,
    Repeat,
    SmoothedTriple,
    StickingTheLanding,
    StochasticTriple,
    SumAroundMode,
)
from ppl_estimators.numpyro.distributions import describe as jax_describe
from ppl_estimators.numpyro.distributions import score_norm as jax_score_norm
from ppl_estimators.pyro import EstimatorELBO
from ppl_estimators.pyro.distributions import describe, score_norm

pytestmark = pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning")


def step(estimator, law, prior, obs=0.5, **options):
    """One step in Pyro; the gradient of its parameter."""

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("x", tdist.Normal(1.0 * z.sum(), 1.0), obs=torch.tensor(obs))

    def guide():
        pyro.sample("z", law(pyro.param("l", torch.tensor([0.1, -0.2, 0.4]))))

    EstimatorELBO({"z": estimator}, **options).loss_and_grads(model, guide)
    return pyro.param("l").grad


COUNTS = {
    "poisson": (lambda a: tdist.Poisson(a.exp()).to_event(1), tdist.Poisson(torch.ones(3)).to_event(1)),
    "binomial": (
        lambda a: tdist.Binomial(4, logits=a).to_event(1),
        tdist.Binomial(4, torch.full((3,), 0.4)).to_event(1),
    ),
    "geometric": (lambda a: tdist.Geometric(logits=a).to_event(1), tdist.Geometric(torch.full((3,), 0.4)).to_event(1)),
}


@pytest.mark.parametrize("family", COUNTS)
def test_parts_of_a_composition_see_the_named_parameters(family):
    law, prior = COUNTS[family]
    for part in (StochasticTriple(), SumAroundMode(3), *([MeasureValued()] if family == "poisson" else [])):
        for estimator in (part, Repeat(2, part), Average((part, Reinforce())), Repeat(2, Average((part, part)))):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            gradient = step(estimator, law, prior)
            assert gradient.isfinite().all(), estimator
            assert (gradient != 0).any(), estimator


def test_a_composition_refuses_what_a_part_refuses():
    with pytest.raises(EstimatorError, match="site 'z': SumAroundMode needs a Poisson"):
        step(
            Repeat(2, SumAroundMode(3)),
            lambda a: tdist.Bernoulli(logits=a).to_event(1),
            tdist.Bernoulli(torch.full((3,), 0.4)).to_event(1),
        )


def test_smoothed_triple_shows_the_model_whole_numbers():
    """In float32 adding a slope and taking it away again is not nothing."""
    rates, seen = torch.linspace(0.1, 40.0, 2000), []

    def model():
        z = pyro.sample("z", tdist.Poisson(rates).to_event(1))
        seen.append((z.detach(),))  # a list of tensors would be put back after further runs

    def guide():
        pyro.sample("z", tdist.Poisson(rates * pyro.param("l", torch.tensor(1.1))).to_event(1))

    EstimatorELBO({"z": SmoothedTriple()}).loss_and_grads(model, guide)
    assert seen and all((z == z.round()).all() for (z,) in seen)


@pytest.mark.parametrize(
    "estimator", [StickingTheLanding(), Reinforce(LeaveOneOut()), Repeat(2, Reinforce())], ids=repr
)
@pytest.mark.parametrize("name", ["RelaxedOneHotCategoricalStraightThrough", "RelaxedBernoulliStraightThrough"])
def test_a_straight_through_draw_does_not_show_its_density(estimator, name):
    kind = getattr(tdist, name)

    def law(a):
        made = kind(torch.tensor(0.5), logits=a)
        return made if made.event_dim else made.to_event(1)

    with pytest.raises(EstimatorError, match=rf"site 'z': the value of a {name} is hard.*Use Pathwise\(\) here"):
        step(estimator, law, law(torch.zeros(3)), num_particles=2)
    pyro.clear_param_store()
    assert step(Pathwise(), law, law(torch.zeros(3)), num_particles=2).isfinite().all()


X = np.array([2.0, 0.0, 3.0])
LOGITS = np.array([0.3, -0.8, 1.1])
P = 1 / (1 + np.exp(-LOGITS))


def _scores(n):
    """d log q / d logit, as in the docstrings of the families."""
    return {
        "Binomial": X - 4 * P,
        "Geometric": 1 - P * (X + 1),
        "NegativeBinomial": X * (1 - P) - n * P,
    }


@pytest.mark.parametrize("given", ["probs", "logits"])
@pytest.mark.parametrize("name", ["Binomial", "Geometric", "NegativeBinomial"])
def test_the_norm_of_the_score_of_counts(name, given):
    """By hand, in the logit in Pyro whichever way the law was given and whatever of it was looked at."""
    of_logit = _scores(2.5)[name]
    counts = {"Binomial": 4.0, "Geometric": None, "NegativeBinomial": 2.5}[name]
    value = {"probs": P, "logits": LOGITS}[given]
    args = {} if counts is None else {"total_count": torch.tensor(counts, dtype=torch.double)}
    fn = getattr(tdist, name)(**args, **{given: torch.tensor(value)}, validate_args=False)
    x = torch.tensor(X)
    wanted = of_logit**2
    if name == "NegativeBinomial":  # its number of failures is a real number, and a parameter
        from scipy.special import digamma

        wanted = wanted + (digamma(X + 2.5) - digamma(2.5) + np.log1p(-P)) ** 2
    for look in (lambda: None, lambda: (fn.probs, fn.logits)):
        look()
        site = describe("z", fn.to_event(1), frozenset(), 1.0, {}, x)
        np.testing.assert_allclose(score_norm(site, fn.to_event(1), x), wanted.sum(), rtol=1e-10)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("given", ["probs", "logits"])
@pytest.mark.parametrize("name", ["Binomial", "Geometric", "NegativeBinomial"])
def test_the_norm_of_the_score_of_counts_in_numpyro(name, given):
    """In the parameter that was given."""
    args = {"Binomial": {"total_count": 4}, "Geometric": {}, "NegativeBinomial": {"total_count": 3}}[name]
    fn = getattr(jdist, name)(**args, **{given: jnp.asarray({"probs": P, "logits": LOGITS}[given])}).to_event(1)
    slope = 1.0 if given == "logits" else 1 / (P * (1 - P))
    site = jax_describe("z", fn, frozenset(), 1.0, {}, jnp.asarray(X))
    np.testing.assert_allclose(
        jax_score_norm(site, fn, jnp.asarray(X)), ((_scores(3)[name] * slope) ** 2).sum(), rtol=1e-9
    )
