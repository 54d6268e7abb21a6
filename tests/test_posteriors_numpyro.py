"""The unmodified SVI of NumPyro reaches posteriors that are known exactly, under many mixes of estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI
from posteriors import CASES, BeliefNetwork, Mix, assert_reached, runs

from ppl_estimators.numpyro import EstimatorELBO, OneHotCategorical, with_estimators

Program = tuple[Callable[[], None], Callable[[], None]]


def param(case: Any, name: str, positive: bool = False) -> Any:
    constraint = constraints.positive if positive else constraints.real
    return numpyro.param(name, jnp.asarray(case.start[name], dtype=float), constraint=constraint)


def look_up(table: Any, bits: list[Any]) -> Any:
    """``table[bits]``, linear in every bit: it takes relaxed bits too."""
    for b in bits:
        table = (1 - b) * table[0] + b * table[1]
    return table


def beta_bernoulli(case: Any) -> Program:
    def model() -> None:
        p = numpyro.sample("p", dist.Beta(*case.prior))
        with numpyro.plate("data", len(case.data)):
            numpyro.sample("x", dist.Bernoulli(probs=p), obs=case.data)

    def guide() -> None:
        numpyro.sample("p", dist.Beta(param(case, "alpha", positive=True), param(case, "beta", positive=True)))

    return model, guide


def normal_normal(case: Any) -> Program:
    def model() -> None:
        m = numpyro.sample("m", dist.Normal(*case.prior))
        with numpyro.plate("data", len(case.data)):
            numpyro.sample("x", dist.Normal(m, case.noise), obs=case.data)

    def guide() -> None:
        numpyro.sample("m", dist.Normal(param(case, "loc"), param(case, "scale", positive=True)))

    return model, guide


def mixture(case: Any, one_hot: bool = True) -> Program:
    categorical = OneHotCategorical if one_hot else dist.Categorical
    locs, scales = jnp.asarray(case.locs), jnp.asarray(case.scales)

    def pick(table: Any, z: Any) -> Any:
        return (table * (z if one_hot else jax.nn.one_hot(z, 3))).sum(-1)

    def model() -> None:
        with numpyro.plate("data", len(case.data)):
            z = numpyro.sample("z", categorical(probs=jnp.asarray(case.weights)))
            y = numpyro.sample("y", dist.Normal(pick(locs, z), pick(scales, z)))
            numpyro.sample("x", dist.Normal(y, case.noise), obs=case.data)

    def guide() -> None:
        loc, scale = param(case, "loc"), param(case, "scale", positive=True)
        with numpyro.plate("data", len(case.data)):
            z = numpyro.sample("z", categorical(logits=param(case, "logits")))
            numpyro.sample("y", dist.Normal(pick(loc, z), pick(scale, z)))

    return model, guide


def spike_and_slab(case: Any) -> Program:
    def model() -> None:
        bits = [numpyro.sample(f"bit_{i}", dist.Bernoulli(case.inclusion)) for i in range(3)]
        slab = numpyro.sample("slab", dist.Normal(0.0, case.slab).expand([3]).to_event(1))
        weights = jnp.stack(bits) * slab
        with numpyro.plate("data", len(case.data)):
            numpyro.sample("x", dist.Normal(case.features @ weights, case.noise), obs=case.data)

    def guide() -> None:
        bits: list[Any] = []
        for i in range(3):
            bits.append(numpyro.sample(f"bit_{i}", dist.Bernoulli(logits=look_up(param(case, f"table_{i}"), bits))))
        root = look_up(param(case, "root"), bits)
        root = jnp.tril(root, -1) + jnp.diag(jnp.exp(jnp.diagonal(root)))
        numpyro.sample("slab", dist.MultivariateNormal(look_up(param(case, "loc"), bits), scale_tril=root))

    return model, guide


def belief_network(case: BeliefNetwork) -> Program:
    def model() -> None:
        t = jnp.stack([numpyro.sample(f"t_{i}", dist.Bernoulli(logits=case.top[i])) for i in range(2)])
        logits = case.down @ t + case.below
        low = jnp.stack([numpyro.sample(f"l_{i}", dist.Bernoulli(logits=logits[i])) for i in range(3)])
        numpyro.sample("x", dist.Bernoulli(logits=case.out @ low + case.seen).to_event(1), obs=case.data)

    def guide() -> None:
        bits: list[Any] = []
        for i, name in enumerate(case.names):
            bits.append(numpyro.sample(name, dist.Bernoulli(logits=look_up(param(case, f"table_{i}"), bits))))

    return model, guide


PROGRAMS = {f.__name__: f for f in (beta_bernoulli, normal_normal, mixture, spike_and_slab, belief_network)}


@pytest.mark.parametrize(("name", "mix"), runs("numpyro"))
def test_svi_reaches_the_posterior(name: str, mix: Mix) -> None:
    case = CASES[name][0]
    model, guide = PROGRAMS[name](case, **mix.options)
    rate = optax.exponential_decay(mix.rate, mix.steps, 0.02)
    elbo = EstimatorELBO(num_particles=mix.particles)
    svi = SVI(model, with_estimators(guide, mix.estimators), optax.adam(rate), elbo)

    start = svi.get_params(svi.init(jax.random.key(0)))
    with pytest.raises(AssertionError, match="KL"):
        assert_reached(name, start)
    result = svi.run(jax.random.key(0), mix.steps, progress_bar=False)
    assert np.isfinite(np.asarray(result.losses)).all()
    assert_reached(name, result.params)
