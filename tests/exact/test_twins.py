"""One noise, two libraries: a Pyro model and its NumPyro twin give the same loss and the same gradient."""

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
from injected import InjectedJax, InjectedTorch

from ppl_estimators import (
    LAX,
    REBAR,
    RELAX,
    VIMCO,
    Constant,
    ControlVariate,
    DisARM,
    DoublyReparameterized,
    Enumerate,
    GappedStraightThrough,
    GumbelSoftmax,
    GumbelStraightThrough,
    ImportanceWeighted,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Pathwise,
    RaoGumbel,
    Reinforce,
    ReinMax,
    RELAXWithModel,
    Renyi,
    StickingTheLanding,
    StraightThrough,
    WakeSleep,
)
from ppl_estimators.numpyro import with_estimators as jax_hook
from ppl_estimators.numpyro.ops import OPS as jax_ops
from ppl_estimators.pyro import with_estimators as torch_hook
from ppl_estimators.pyro.ops import OPS as torch_ops

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

N, B = 6, 3  # data, minibatch
INDICES = np.array([4, 0, 3])
X = np.array([0.5, -1.2, 2.0, 0.3, -0.4, 1.1])
START = {"a": np.array(0.3), "c": np.array([0.2, -0.7, 0.4]), "m": np.array([0.1, 0.6]), "s": np.array(-0.2)}


def jax_model():
    s = numpyro.param("s", jnp.asarray(START["s"]))
    with numpyro.plate("data", N, subsample_size=B):
        x = jnp.asarray(X[INDICES])
        z = numpyro.sample("z", jdist.Bernoulli(logits=0.4 * x))
        w = numpyro.sample("w", jdist.Normal(1.0 * z, 1.0))
        y = numpyro.sample("y", jdist.Bernoulli(logits=-0.3 + z))
        with numpyro.handlers.mask(mask=jnp.array([True, True, False])):
            numpyro.sample("x", jdist.Normal(1.5 * y + w - 0.5 * z + s, 0.8), obs=x)


def jax_guide(observations=None):
    a, c, m = (numpyro.param(k, jnp.asarray(START[k])) for k in "acm")
    with numpyro.plate("data", N, subsample_size=B):
        x = observations["x"] if observations else jnp.asarray(X[INDICES])
        z = numpyro.sample("z", jdist.Bernoulli(logits=a + 0.5 * x))
        w = numpyro.sample("w", jdist.Normal(m[0] + 0.5 * z, jnp.exp(m[1] - 1)))
        numpyro.sample("y", jdist.Bernoulli(logits=c[0] + c[1] * z + c[2] * w))


def torch_model():
    s = pyro.param("s", torch.tensor(START["s"]))
    with pyro.plate("data", N, subsample_size=B):
        x = torch.tensor(X[INDICES])
        z = pyro.sample("z", tdist.Bernoulli(logits=0.4 * x))
        w = pyro.sample("w", tdist.Normal(1.0 * z, 1.0))
        y = pyro.sample("y", tdist.Bernoulli(logits=-0.3 + z))
        with pyro.poutine.mask(mask=torch.tensor([True, True, False])):
            pyro.sample("x", tdist.Normal(1.5 * y + w - 0.5 * z + s, 0.8), obs=x)


def torch_guide(observations=None):
    a, c, m = (pyro.param(k, torch.tensor(START[k])) for k in "acm")
    with pyro.plate("data", N, subsample_size=B):
        x = observations["x"] if observations else torch.tensor(X[INDICES])
        z = pyro.sample("z", tdist.Bernoulli(logits=a + 0.5 * x))
        w = pyro.sample("w", tdist.Normal(m[0] + 0.5 * z, torch.exp(m[1] - 1)))
        pyro.sample("y", tdist.Bernoulli(logits=c[0] + c[1] * z + c[2] * w))


MIXES = {
    "straight through": {"z": ReinMax(), "y": RaoGumbel(2)},
    "gumbels": {"z": GumbelStraightThrough(0.9), "w": StickingTheLanding(), "y": GumbelSoftmax(0.7)},
    "below a relaxed value": {"z": GumbelSoftmax(0.7), "y": DisARM()},
    "below a counterfactual": {"z": DisARM(), "y": GumbelSoftmax(0.7)},
    "below a relaxation": {"z": REBAR(0.6), "y": GappedStraightThrough()},
    "a network for a normal": {"z": DisARM(), "y": DisARM(), "w": LAX(hidden=4)},
    "score below": {"z": StraightThrough(), "y": Reinforce(Constant(-2.0))},
    "score": {"z": Reinforce(), "y": Reinforce(Constant(-3.0))},
    "past": {"z": Reinforce(MovingAverage(0.7)), "y": Reinforce(OptimalConstant(PastSteps(0.9)))},
    "nvil": {"z": Reinforce(MovingAverage() + Learned(hidden=4)), "y": DisARM()},
    "score of a normal": {"z": DisARM(), "y": Enumerate(), "w": Reinforce(OptimalConstant(PastSteps(0.5)))},
    "antithetic": {"z": DisARM(), "y": DisARM(), "w": Pathwise()},
    "enumerated": {"z": Enumerate(), "y": Enumerate(), "w": StickingTheLanding()},
    "relaxed": {"z": REBAR(0.6), "y": RELAX(0.8, hidden=4)},
    "relaxed model": {
        "z": RELAXWithModel(0.7, hidden=3, baseline=MovingAverage() + Learned(hidden=2)),
        "y": DisARM(),
    },
    "control": {
        "z": ControlVariate(lambda b: 2.0 * b, lambda d: 2.0 * d.mean, 0.7),
        "y": ControlVariate(lambda b: b + 0.1, lambda d: d.mean + 0.1, PastSteps(0.8), baseline=MovingAverage()),
    },
}


BOUNDS = {
    "antithetic": ImportanceWeighted(),
    "enumerated below": Renyi(-0.5),
    "relaxed model": ImportanceWeighted(),
    "past": Renyi(2.0),
    "twice": Renyi(0.5),
    "awake": WakeSleep(wake_phi=0.5),
    "asleep": WakeSleep(wake_phi=0.5, sleep_phi=0.7),
}
MIXES |= {
    "enumerated below": {"z": DisARM(), "y": Enumerate(), "w": Pathwise()},
    "awake": {"z": Reinforce(LeaveOneOut()), "w": Pathwise(), "y": Reinforce(LeaveOneOut())},
    "asleep": {},
    "twice": {"z": Reinforce(VIMCO()), "w": DoublyReparameterized(), "y": GumbelSoftmax(0.7)},
}


def noise(rng, particles=1):
    table = {}
    for site, labels in {"z": ("u", "v", "v0", "v1"), "y": ("u", "v", "v0", "v1"), "w": ()}.items():
        table[site] = {k: rng.uniform(size=(particles, B)) for k in labels}
    for site in ("z", "y"):
        table[site]["value"] = rng.integers(0, 2, size=(particles, B)).astype(float)
    table["w"]["value"] = rng.normal(size=(particles, B))
    table |= {f"dreamt {site}": {"value": rng.permutation(table[site]["value"])} for site in ("z", "w", "y")}
    table["dreamt x"] = {"value": rng.normal(size=(particles, B))}
    return table


ALONE = [m for m in MIXES if m not in ("twice", "awake", "asleep")]  # of one particle
AVERAGED = ("antithetic", "enumerated", "below a counterfactual", "a network for a normal")


@pytest.mark.parametrize(("mix", "average"), [*((m, False) for m in ALONE), *((m, True) for m in AVERAGED)])
def test_twins_agree_for_three_steps_of_state(mix, average):
    """Loss, gradients of model, guide and estimator parameters, and running state, at 1e-10."""
    agree(mix, average_model=average)


@pytest.mark.parametrize(
    ("mix", "average"), [*((m, False) for m in BOUNDS), ("antithetic", True), ("enumerated below", True)]
)
def test_twins_agree_under_a_bound(mix, average):
    agree(mix, num_particles=3, objective=BOUNDS[mix], average_model=average)


def agree(mix, **options):
    rng = np.random.default_rng(3)
    tables = [noise(rng, options.get("num_particles", 1)) for _ in range(3)]
    guide = jax_hook(jax_guide, MIXES[mix])
    elbo = InjectedJax(**options)
    state, kept = declared(guide)
    for k, v in kept.items():  # away from the start at zero, which would hide half of the arithmetic
        kept[k] = v + 0.3 * jnp.asarray(rng.normal(size=v.shape))
    params = {**{k: jnp.asarray(v) for k, v in START.items()}, **kept}

    pyro.clear_param_store()
    twin = InjectedTorch(**options)
    twin_guide = torch_hook(torch_guide, MIXES[mix])
    twin.randomness.table = tables[0]
    twin.loss_and_grads(torch_model, twin_guide)  # declares
    store = pyro.get_param_store()
    for k in list(store.keys()):
        if "$state." in k:
            with torch.no_grad():
                store[k].zero_()
        elif "$" in k:
            with torch.no_grad():
                store[k].copy_(torch.tensor(np.array(params[k])))

    @jax.jit
    def step(params, state, table):
        def loss(p):
            elbo.randomness.table = table
            out = elbo.loss_with_mutable_state(jax.random.key(0), {**p, **state}, jax_model, guide)
            return out["loss"], out["mutable_state"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    for table in tables:
        (value, new), gradient = step(params, state, table)
        state = new or {}
        for v in store.values():
            v.unconstrained().grad = None
        twin.randomness.table = table
        np.testing.assert_allclose(twin.loss_and_grads(torch_model, twin_guide), value, rtol=1e-10)
        trained = [k for k in store.keys() if "$state." not in k]
        assert sorted(trained) == sorted(params)
        for k in trained:
            np.testing.assert_allclose(store[k].unconstrained().grad, gradient[k], rtol=1e-10, atol=1e-10, err_msg=k)
        states = {f"{site}.{k}": v for site, s in state.items() for k, v in s.items()}
        assert sorted(states) == sorted(k for k in store.keys() if "$state." in k)
        for k, v in states.items():
            np.testing.assert_allclose(store[k].detach(), v, rtol=1e-10, err_msg=k)


def declared(guide):
    """State and estimator parameters as the hook declares them."""
    guide = numpyro.handlers.substitute(numpyro.handlers.seed(guide, 0), data={"data": jnp.asarray(INDICES)})
    trace = numpyro.handlers.trace(guide).get_trace()
    state = {k: s["value"] for k, s in trace.items() if s["type"] == "mutable"}
    kept = {k: s["value"] for k, s in trace.items() if s["type"] == "param" and "$" in k}
    return state, kept


def test_a_matrix_is_solved_alike():
    """Any weights that add up to one would leave `Combine` unbiased."""
    a, b = np.array([[2.0, 0.3], [0.1, 1.5]], np.float32), np.array([[1.0], [1.0]], np.float32)
    for ops, array in ((torch_ops, torch.tensor), (jax_ops, jnp.asarray)):
        np.testing.assert_allclose(np.asarray(ops.solve(array(a), array(b))), np.linalg.solve(a, b), rtol=1e-5)
