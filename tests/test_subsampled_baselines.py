"""Baselines that remember costs remember those of one element: minibatches may be of any size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as nd
import pyro
import pyro.distributions as pd
import pytest
import torch
from numpyro.infer import SVI
from numpyro.optim import SGD

from ppl_estimators import Learned, MovingAverage, OptimalConstant, PastSteps, Reinforce
from ppl_estimators import numpyro as ours_numpyro
from ppl_estimators import pyro as ours_pyro
from ppl_estimators.core.site import Plate, Site
from ppl_estimators.estimators.baselines.base import Baseline
from ppl_estimators.numpyro.ops import OPS

N, COST = 8, 3.0
REMEMBER = pytest.mark.parametrize("baseline", [MovingAverage(), OptimalConstant(PastSteps(0.9))], ids=repr)


def minibatch(size: int) -> Site:
    site = Site("z", "Bernoulli", "bernoulli", (size,), (), frozenset({Plate("n", -1, size, N / size)}), lead=1)
    site.score_norm = jnp.ones((1, size))
    return site


@REMEMBER
def test_what_one_minibatch_taught_holds_for_another(baseline: Baseline) -> None:
    """An element costs 3: 6 as one of four of eight, 24 alone."""
    from ppl_estimators.core.keep import Kept

    kept = Kept(state={k: jnp.zeros(v.shape) for k, v in baseline.keeps(minibatch(4), {}).state.items()})
    for size in (4, 4, 1, 2):
        site, cost = minibatch(size), jnp.full((1, size), COST * N / size)
        found = baseline.evaluate(OPS, site, cost, kept)
        kept = Kept(state=found.state)
    assert np.asarray(found.value) == pytest.approx(COST * N / 2, rel=1e-6)


def test_the_second_of_two_baselines_learns_what_the_first_leaves() -> None:
    """Running means of the past (law 6), read before they are updated: by hand."""
    from ppl_estimators.core.keep import Kept

    both, site = MovingAverage(0.5) + MovingAverage(0.8), minibatch(N)
    kept = Kept(state={k: jnp.zeros(v.shape) for k, v in both.keeps(site, {}).state.items()})
    first = second = 0.0
    for step, cost in enumerate((4.0, 6.0, 5.0, 9.0)):
        found = both.evaluate(OPS, site, jnp.full((1, N), cost), kept)
        assert np.asarray(found.value) == pytest.approx(first + second, rel=1e-6)
        left = cost - first
        first = cost if step == 0 else 0.5 * first + 0.5 * cost
        second = left if step == 0 else 0.8 * second + 0.2 * left
        kept = Kept(state=found.state)


def pyro_gradients(baseline: Baseline, sizes: list[int]) -> list[float]:
    def program(index: Any, logit: Any, observed: bool) -> None:
        with pyro.plate("n", N, subsample=index):
            z = pyro.sample("z", pd.Bernoulli(logits=logit))
            if observed:
                pyro.factor("cost", COST + 0 * z)

    elbo = ours_pyro.EstimatorELBO({"z": Reinforce(baseline)})
    found = []
    for size in sizes:
        parameter = pyro.param("a", torch.tensor(0.4))
        parameter.grad = None
        index = torch.arange(size)
        elbo.loss_and_grads(
            lambda i: program(i, torch.tensor(0.4), True), lambda i: program(i, pyro.param("a"), False), index
        )
        found.append(float(parameter.grad))
    return found


def numpyro_gradients(baseline: Baseline, sizes: list[int]) -> list[float]:
    def program(size: int, logit: Any, observed: bool) -> None:
        with numpyro.plate("n", N, subsample_size=size):
            z = numpyro.sample("z", nd.Bernoulli(logits=logit))
            if observed:
                numpyro.factor("cost", COST + 0 * z)

    def guide(size: int) -> None:
        program(size, numpyro.param("a", 0.4), False)

    guide = ours_numpyro.with_estimators(guide, {"z": Reinforce(baseline)})
    elbo = ours_numpyro.EstimatorELBO()

    def model(size: int) -> None:
        program(size, 0.4, True)

    state = SVI(model, guide, SGD(0.0), elbo).init(jax.random.key(0), sizes[0]).mutable_state
    found = []
    for step, size in enumerate(sizes):

        def loss(a: Any, size: int = size, step: int = step, state: Any = state) -> Any:
            out = elbo.loss_with_mutable_state(jax.random.key(step), {"a": a, **state}, model, guide, size)
            return out["loss"], out["mutable_state"]

        gradient, state = jax.grad(loss, has_aux=True)(jnp.array(0.4))
        found.append(float(gradient))
    return found


@REMEMBER
@pytest.mark.parametrize("gradients", [pyro_gradients, numpyro_gradients])
def test_a_smaller_last_minibatch_is_no_louder(baseline: Baseline, gradients: Any) -> None:
    """A constant cost is no signal, whatever the minibatch: after the first step the gradient is zero."""
    first, *later = gradients(baseline, [4, 4, 1, 8, 2])
    assert abs(first) > 0.1
    assert later == pytest.approx([0.0] * 4, abs=1e-5)


def test_a_learned_baseline_is_fitted_to_one_element_and_bears_a_scale_of_zero() -> None:
    """Annealing starts with ``scale(0)`` at the site, while what it is credited with is not zero."""
    from ppl_estimators.core.keep import Kept

    site = minibatch(2)
    site.scale = 0.0
    site.logits = jnp.full((1, 2), 0.4)
    site.named = {"logits": site.logits}
    kept = Kept(networks={"baseline": lambda x: jnp.full((*x.shape[:-1], 1), 2.5)})
    found = Learned().evaluate(OPS, site, jnp.full((1, 2), COST * N / 2), kept)
    assert np.asarray(found.value) == pytest.approx(2.5 * N / 2)
    assert np.asarray(found.auxiliary) == pytest.approx((COST - 2.5) ** 2)
