"""The unmodified SVI of Pyro reaches posteriors that are known exactly, under many mixes of estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import CASES, BeliefNetwork, Mix, assert_reached, runs
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch.distributions import constraints

from ppl_estimators.pyro import EstimatorELBO

Program = tuple[Callable[[], None], Callable[[], None]]


def tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float)


def param(case: Any, name: str, positive: bool = False) -> Any:
    constraint = constraints.positive if positive else constraints.real
    return pyro.param(name, lambda: tensor(case.start[name]).clone(), constraint=constraint)


def look_up(table: Any, bits: list[Any]) -> Any:
    """``table[bits]`` for bits ``[*batch]``, linear in every bit: it takes relaxed bits too."""
    event = table.shape[len(bits) :]
    weights = torch.ones(1)
    for b in bits:
        weights = (weights[..., :, None] * torch.stack([1 - b, b], -1)[..., None, :]).flatten(-2)
    found = weights @ table.reshape(weights.shape[-1], -1)
    return found.reshape((*found.shape[:-1], *event))


def beta_bernoulli(case: Any) -> Program:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(*case.prior))
        with pyro.plate("data", len(case.data)):
            pyro.sample("x", dist.Bernoulli(probs=p), obs=tensor(case.data))

    def guide() -> None:
        pyro.sample("p", dist.Beta(param(case, "alpha", positive=True), param(case, "beta", positive=True)))

    return model, guide


def normal_normal(case: Any) -> Program:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(*case.prior))
        with pyro.plate("data", len(case.data)):
            pyro.sample("x", dist.Normal(m, case.noise), obs=tensor(case.data))

    def guide() -> None:
        pyro.sample("m", dist.Normal(param(case, "loc"), param(case, "scale", positive=True)))

    return model, guide


def mixture(case: Any, one_hot: bool = True) -> Program:
    categorical = dist.OneHotCategorical if one_hot else dist.Categorical
    locs, scales = tensor(case.locs), tensor(case.scales)

    def pick(table: Any, z: Any) -> Any:
        return (table * (z if one_hot else torch.nn.functional.one_hot(z, 3))).sum(-1)

    def model() -> None:
        with pyro.plate("data", len(case.data)):
            z = pyro.sample("z", categorical(probs=tensor(case.weights)))
            y = pyro.sample("y", dist.Normal(pick(locs, z), pick(scales, z)))
            pyro.sample("x", dist.Normal(y, case.noise), obs=tensor(case.data))

    def guide() -> None:
        loc, scale = param(case, "loc"), param(case, "scale", positive=True)
        with pyro.plate("data", len(case.data)):
            z = pyro.sample("z", categorical(logits=param(case, "logits")))
            pyro.sample("y", dist.Normal(pick(loc, z), pick(scale, z)))

    return model, guide


def spike_and_slab(case: Any) -> Program:
    features = tensor(case.features)

    def model() -> None:
        bits = [pyro.sample(f"bit_{i}", dist.Bernoulli(case.inclusion)) for i in range(3)]
        slab = pyro.sample("slab", dist.Normal(0.0, case.slab).expand([3]).to_event(1))
        mean = (torch.stack(bits, -1) * slab) @ features.T
        pyro.sample("x", dist.Normal(mean, case.noise).to_event(1), obs=tensor(case.data))

    def guide() -> None:
        bits: list[Any] = []
        for i in range(3):
            bits.append(pyro.sample(f"bit_{i}", dist.Bernoulli(logits=look_up(param(case, f"table_{i}"), bits))))
        root = look_up(param(case, "root"), bits)
        root = root.tril(-1) + root.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        pyro.sample("slab", dist.MultivariateNormal(look_up(param(case, "loc"), bits), scale_tril=root))

    return model, guide


def belief_network(case: BeliefNetwork) -> Program:
    top, down, below, out, seen = map(tensor, (case.top, case.down, case.below, case.out, case.seen))

    def model() -> None:
        t = torch.stack([pyro.sample(f"t_{i}", dist.Bernoulli(logits=top[i])) for i in range(2)], -1)
        logits = t @ down.T + below
        low = torch.stack([pyro.sample(f"l_{i}", dist.Bernoulli(logits=logits[..., i])) for i in range(3)], -1)
        pyro.sample("x", dist.Bernoulli(logits=low @ out.T + seen).to_event(1), obs=tensor(case.data))

    def guide() -> None:
        bits: list[Any] = []
        for i, name in enumerate(case.names):
            bits.append(pyro.sample(name, dist.Bernoulli(logits=look_up(param(case, f"table_{i}"), bits))))

    return model, guide


#: name: (program, max_plate_nesting)
PROGRAMS = {
    "beta_bernoulli": (beta_bernoulli, 1),
    "normal_normal": (normal_normal, 1),
    "mixture": (mixture, 1),
    "spike_and_slab": (spike_and_slab, 0),
    "belief_network": (belief_network, 0),
}


@pytest.mark.parametrize(("name", "mix"), runs("pyro"))
def test_svi_reaches_the_posterior(name: str, mix: Mix) -> None:
    program, nesting = PROGRAMS[name]
    case = CASES[name][0]
    model, guide = program(case, **mix.options)
    pyro.set_rng_seed(0)
    steps = mix.steps // 3
    optimizer = ClippedAdam({"lr": 2 * mix.rate, "lrd": 0.02 ** (1 / steps)})
    particles = {"num_particles": mix.particles, "vectorize_particles": True, "max_plate_nesting": nesting}
    svi = SVI(model, guide, optimizer, EstimatorELBO(mix.estimators, **particles))

    with pytest.raises(AssertionError, match="KL"):
        assert_reached(name, case.start)
    losses = [svi.step() for _ in range(20)]
    with pyro.validation_enabled(False):  # as the first steps were
        losses += [svi.step() for _ in range(steps - 20)]
    assert np.isfinite(losses).all()
    store = pyro.get_param_store()
    assert_reached(name, {k: store[k].detach().numpy() for k in case.start})
