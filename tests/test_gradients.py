"""`Gradients`: draws of any ELBO, of both libraries, that change nothing and fall into parts."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as nd
import pyro
import pyro.distributions as pd
import pytest
import torch
from numpyro import infer as numpyro_infer
from pyro import infer as pyro_infer

from ppl_estimators import (
    REBAR,
    DisARM,
    Enumerate,
    EstimatorError,
    MovingAverage,
    MuProp,
    Reinforce,
    RELAXWithModel,
    Stein,
)
from ppl_estimators.measure.gradients import EXPLICIT
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.numpyro import with_estimators as numpyro_with
from ppl_estimators.numpyro.gradients import Gradients as NumPyroGradients
from ppl_estimators.pyro import EstimatorELBO as PyroELBO
from ppl_estimators.pyro import with_estimators as pyro_with
from ppl_estimators.pyro.gradients import Gradients as PyroGradients

KEPT = {"z": Reinforce(MovingAverage()), "k": DisARM()}


def pyro_model():
    z = pyro.sample("z", pd.Bernoulli(0.4))
    w = pyro.sample("w", pd.Normal(z, 1.0))
    k = pyro.sample("k", pd.Bernoulli(torch.sigmoid(w)))
    pyro.sample("x", pd.Normal(w + k * pyro.param("t", torch.tensor(0.5)), 1.0), obs=torch.tensor(1.0))


def pyro_guide():
    z = pyro.sample("z", pd.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))
    scale = pyro.param("s", torch.tensor(0.8), constraint=pd.constraints.positive)
    w = pyro.sample("w", pd.Normal(pyro.param("m", torch.tensor(0.1)) + z, scale))
    pyro.sample("k", pd.Bernoulli(logits=w * pyro.param("b", torch.tensor(0.7))))


def numpyro_model():
    z = numpyro.sample("z", nd.Bernoulli(0.4))
    w = numpyro.sample("w", nd.Normal(z, 1.0))
    k = numpyro.sample("k", nd.Bernoulli(jax.nn.sigmoid(w)))
    numpyro.sample("x", nd.Normal(w + k * numpyro.param("t", 0.5), 1.0), obs=1.0)


def numpyro_guide():
    z = numpyro.sample("z", nd.Bernoulli(logits=numpyro.param("a", 0.3)))
    scale = numpyro.param("s", 0.8, constraint=nd.constraints.positive)
    w = numpyro.sample("w", nd.Normal(numpyro.param("m", 0.1) + z, scale))
    numpyro.sample("k", nd.Bernoulli(logits=w * numpyro.param("b", 0.7)))


PYRO = {
    "ours": lambda: (PyroELBO(), pyro_guide),
    "ours, two particles": lambda: (PyroELBO(num_particles=2), pyro_guide),
    "ours, with state": lambda: (PyroELBO(), pyro_with(pyro_guide, KEPT)),
    "Trace_ELBO": lambda: (pyro_infer.Trace_ELBO(), pyro_guide),
    "TraceGraph_ELBO": lambda: (pyro_infer.TraceGraph_ELBO(), pyro_guide),
    "TraceEnum_ELBO": lambda: (
        pyro_infer.TraceEnum_ELBO(max_plate_nesting=0, strict_enumeration_warning=False),
        pyro_guide,
    ),
}
NUMPYRO = {
    "ours": lambda: (NumPyroELBO(), numpyro_guide),
    "ours, with state": lambda: (NumPyroELBO(), numpyro_with(numpyro_guide, KEPT)),
    "TraceGraph_ELBO": lambda: (numpyro_infer.TraceGraph_ELBO(), numpyro_guide),
}
MAKE = [
    *(pytest.param(PyroGradients, pyro_model, make, id=f"pyro, {name}") for name, make in PYRO.items()),
    *(pytest.param(NumPyroGradients, numpyro_model, make, id=f"numpyro, {name}") for name, make in NUMPYRO.items()),
]


@pytest.mark.parametrize(("gradients", "model", "make"), MAKE)
def test_parts_sum_to_the_gradient_and_a_draw_repeats(gradients, model, make):
    elbo, guide = make()
    g = gradients(elbo, model, guide, params={"s": 0.5}, seed=1)
    assert g.sites == ["z", "w", "k"]
    assert g.part_names == [EXPLICIT, "z", "w", "k"]
    assert set(g.names) == set("amsbt")  # nothing that estimators keep
    losses, totals = _stacked(g.draws(16, seed=3))
    again, parts = _stacked(g.parts(16, seed=3))
    single, one = g.draw(3, 1)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    np.testing.assert_allclose(single, losses[1], rtol=1e-5)
    for name in g.names:
        np.testing.assert_allclose(one[name], totals[name][1], atol=1e-5)
        np.testing.assert_allclose(parts[name].sum(1), totals[name], atol=1e-5)
    # who can reach what: only a site's own distribution and those that it is computed from
    for name, reached in {"a": {1}, "t": {0}, "b": {3}, "m": {2, 3}, "s": {2, 3}}.items():
        moved = {i for i in range(4) if np.any(parts[name][:, i] != 0)}
        assert moved <= reached, (name, moved)
        assert min(reached) in moved


def _stacked(chunks):
    losses, gradients = zip(*chunks, strict=True)
    return np.concatenate(losses), {n: np.concatenate([g[n] for g in gradients]) for n in gradients[0]}


def pyro_pair_model():
    z = pyro.sample("z", pd.Bernoulli(0.4))
    w = pyro.sample("w", pd.Normal(z, 1.0))
    pyro.sample("x", pd.Normal(w + z, 1.0), obs=torch.tensor(1.0))


def pyro_pair_guide():
    z = pyro.sample("z", pd.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))
    pyro.sample("w", pd.Normal(pyro.param("m", torch.tensor(0.1)) + 2 * z, 0.7))


def numpyro_pair_model():
    z = numpyro.sample("z", nd.Bernoulli(0.4))
    w = numpyro.sample("w", nd.Normal(z, 1.0))
    numpyro.sample("x", nd.Normal(w + z, 1.0), obs=1.0)


def numpyro_pair_guide():
    z = numpyro.sample("z", nd.Bernoulli(logits=numpyro.param("a", 0.3)))
    numpyro.sample("w", nd.Normal(numpyro.param("m", 0.1) + 2 * z, 0.7))


@pytest.mark.parametrize("estimator", [REBAR(), RELAXWithModel(), MuProp(), Stein()], ids=repr)
@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_slopes_that_an_estimator_takes_itself_are_its_own_part(library, estimator):
    """They pass the distribution of w on their way to z: that is no gradient of w's."""
    gradients, elbo, hook, model, guide = {
        "pyro": (PyroGradients, PyroELBO, pyro_with, pyro_pair_model, pyro_pair_guide),
        "numpyro": (NumPyroGradients, NumPyroELBO, numpyro_with, numpyro_pair_model, numpyro_pair_guide),
    }[library]
    chosen = {"z": estimator}
    elbo = elbo(chosen, num_particles=1 + estimator.compares)
    g = gradients(elbo, model, hook(guide, chosen), seed=1)
    _, totals = _stacked(g.draws(6, seed=3))
    _, parts = _stacked(g.parts(6, seed=3))
    for name in ("a", "m"):
        assert np.any(totals[name] != 0)
        np.testing.assert_allclose(parts[name].sum(1), totals[name], atol=1e-5)
    np.testing.assert_allclose(parts["a"], np.stack([0 * totals["a"], totals["a"], 0 * totals["a"]], 1), atol=1e-6)


def test_pyro_draws_change_nothing():
    svi = pyro_infer.SVI(
        pyro_model, guide := pyro_with(pyro_guide, KEPT), pyro.optim.SGD({"lr": 0.1}), elbo := PyroELBO()
    )
    for _ in range(3):
        svi.step()
    store = pyro.get_param_store()
    store["a"].unconstrained().grad = torch.tensor(7.0)
    before = {n: p.detach().clone() for n, p in store.named_parameters()}
    assert any("$state" in n for n in before)
    random = torch.get_rng_state()
    g = PyroGradients(elbo, pyro_model, guide, params={"a": torch.tensor(2.0)})
    list(g.draws(3))
    list(g.parts(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(store.named_parameters()).keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in store.named_parameters())
    assert store["a"].unconstrained().grad == 7.0


def test_pyro_draws_follow_the_store():
    g = PyroGradients(PyroELBO(), pyro_model, pyro_guide)
    assert not list(pyro.get_param_store())
    first = g.draw(0)[1]["b"]
    pyro.param("b", torch.tensor(-2.0))
    assert g.draw(0)[1]["b"] != first


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_errors_name_what_is_wrong(library):
    gradients, elbo, model, guide = {
        "pyro": (PyroGradients, PyroELBO, pyro_model, pyro_guide),
        "numpyro": (NumPyroGradients, NumPyroELBO, numpyro_model, numpyro_guide),
    }[library]
    with pytest.raises(EstimatorError, match="'zz' is no parameter of model or guide"):
        gradients(elbo(), model, guide, params={"zz": 1.0})
    with pytest.raises(EstimatorError, match=r"'a' has shape \(2,\), the program's has \(\)"):
        gradients(elbo(), model, guide, params={"a": [1.0, 2.0]})
    with pytest.raises(EstimatorError, match=r"Write EstimatorELBO\(\)"):
        gradients(elbo, model, guide)
    with pytest.raises(EstimatorError, match="the guide is not callable"):
        gradients(elbo(), model, None)
    with pytest.raises(EstimatorError, match="the guide has no latent sites"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries say that the model's sites are missing
        gradients(elbo(), lambda: None, lambda: None)


def test_the_arrays_of_a_network_have_names_of_their_own():
    """A flax module is one parameter in NumPyro, a tree of arrays."""
    from flax import linen
    from numpyro.contrib.module import flax_module

    from ppl_estimators.testing import exact_gradient

    def model(x):
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", nd.Bernoulli(logits=0.3))
            numpyro.sample("x", nd.Normal(2.0 * z, 1.0), obs=x)

    def guide(x):
        network = flax_module("net", linen.Dense(1), input_shape=(1, 1))
        with numpyro.plate("data", 2):
            numpyro.sample("z", nd.Bernoulli(logits=network(x[:, None])[:, 0]))

    x = jax.numpy.array([0.4, 1.7])
    exact = exact_gradient(model, guide, x)
    found = NumPyroGradients(NumPyroELBO({"z": Enumerate()}), model, guide, (x,), params=exact.params)
    assert found.names == ["net$params['bias']", "net$params['kernel']"]
    assert found.shapes == {"net$params['bias']": (1,), "net$params['kernel']": (1, 1)}
    _, parts = next(found.parts(3))
    for name, g in exact.gradient.items():  # one bit for each element: no noise
        np.testing.assert_allclose(parts[name].sum(1), np.broadcast_to(g, (3, *g.shape)), atol=1e-5)
    wrong = {"net$params": {"bias": np.zeros(2), "kernel": np.zeros((1, 1))}}
    with pytest.raises(EstimatorError, match=r"\['bias'\]' has shape \(2,\), the program's has \(1,\)"):
        NumPyroGradients(NumPyroELBO(), model, guide, (x,), params=wrong)
