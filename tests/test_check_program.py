"""`check_program`: what a step rests on is what the program does, or the difference is named."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.infer import SVI
from numpyro.optim import SGD

from ppl_estimators import DisARM, EstimatorError, EstimatorWarning, MovingAverage, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.pyro import EstimatorELBO as PyroELBO
from ppl_estimators.testing import check_program, zoo

ELBOS = {"pyro": PyroELBO, "numpyro": NumPyroELBO}
both = pytest.mark.parametrize("library", ELBOS)


def hidden(library, z):
    """The value by a way that cannot be followed: another thread reads it as a number, a callback remembers it."""
    if library == "pyro":
        with ThreadPoolExecutor(1) as pool:
            return torch.tensor(pool.submit(z.item).result())
    kept = []
    number = jax.ShapeDtypeStruct((), jnp.result_type(float))
    nothing = jax.pure_callback(lambda z: kept.append(z) or np.zeros((), number.dtype), number, z)
    del nothing
    return jax.pure_callback(lambda: np.asarray(kept[-1], number.dtype), number)


def program(library, way=lambda library, z: z, shift=lambda: 0.0):
    """Two bits with an observation each."""
    ppl = zoo.language(library)

    def model():
        z, k = (ppl.sample(n, ppl.dist.Bernoulli(ppl.array(0.3))) for n in "zk")
        ppl.sample("x", ppl.dist.Normal(2.0 * way(library, z), 1.0), obs=ppl.array(0.7))
        ppl.sample("y", ppl.dist.Normal(2.0 * k, 1.0), obs=ppl.array(1.3))

    def guide():
        a = ppl.param("a", {"a": [0.4, -0.2]}) + shift()
        for i, n in enumerate("zk"):
            ppl.sample(n, ppl.dist.Bernoulli(logits=a[i]))

    return model, guide


@both
def test_a_program_that_is_what_it_seems(library):
    found = check_program(ELBOS[library](), *program(library))
    assert found.repeatable
    assert found.depends_on["model", "x"] == {"z"} and found.depends_on["model", "y"] == {"k"}
    assert str(found).splitlines()[0] == (
        "site 'z': Enumerate(), credited with log p of 'z', log p of 'x', -log q of 'z'"
    )


@both
def test_a_dependency_that_cannot_be_followed(library):
    with pytest.raises(EstimatorError, match="site 'z': log p of 'x' moves with its value"):
        check_program(ELBOS[library](), *program(library, hidden))


@both
def test_a_program_that_changes_and_the_fix_that_works(library):
    count = itertools.count()
    model, guide = program(library, shift=lambda: 0.1 * next(count))
    fix = (
        'EstimatorELBO({"z": Reinforce(MovingAverage()), "k": Reinforce(MovingAverage())})'
        if library == "pyro"
        else 'guide = with_estimators(guide, {"z": Reinforce(MovingAverage()), "k": Reinforce(MovingAverage())})'
    )
    with pytest.raises(EstimatorError) as refused:
        check_program(ELBOS[library](), model, guide)
    assert "site 'z', 'k': its cost is another" in str(refused.value) and fix in str(refused.value)
    if library == "numpyro":
        scope = {"guide": guide, "with_estimators": with_estimators, "Reinforce": Reinforce}
        exec(fix, scope | {"MovingAverage": MovingAverage}, scope)
        found = check_program(NumPyroELBO(), model, scope["guide"])
    else:
        found = check_program(eval(fix.replace("EstimatorELBO", "PyroELBO")), model, guide)
    assert not found.repeatable
    assert str(found).startswith("the program cannot be run again, and is not\nsite 'z': Reinforce(MovingAverage())")


@both
def test_what_a_step_refuses_and_what_is_no_elbo(library):
    ppl = zoo.language(library)
    model, guide = program(library)
    for broken, match in (
        ((model, lambda: ppl.sample("z", ppl.dist.Bernoulli(ppl.array(0.3)))), "'k'.*guide"),
        (("no model", guide), "no model"),
    ):
        with pytest.raises(EstimatorError, match=match):
            check_program(ELBOS[library](), *broken)
    with pytest.raises(EstimatorError, match="DisARM needs a Bernoulli site"):
        uniform = lambda: ppl.sample("z", ppl.dist.Uniform(ppl.array(0.0), 1.0))  # noqa: E731
        check_program(ELBOS[library](DisARM()), uniform, uniform)
    with pytest.raises(EstimatorError, match=r"takes an EstimatorELBO first, got DisARM\(\)"):
        check_program(DisARM(), model, guide)


def test_pyro_is_left_as_it_was():
    norm = torch.nn.BatchNorm1d(1)

    def model():
        with pyro.plate("data", 8):
            z = pyro.sample("z", tdist.Bernoulli(0.3 * torch.ones(8)))
            pyro.sample("x", tdist.Normal(norm(z[:, None])[:, 0], 1.0), obs=torch.ones(8))

    def guide():
        with pyro.plate("data", 8):
            pyro.sample("z", tdist.Bernoulli(logits=pyro.param("a", torch.zeros(8))))

    random = torch.get_rng_state()
    with pytest.warns(EstimatorWarning, match="plate 'data' moves with"):  # a mean over the bits of all data
        check_program(PyroELBO(), model, guide)
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), random) and not pyro.get_param_store().keys()


def plated(library, way, between):
    """Three bits in a plate; ``between``: a Normal below each, by which they move the data."""
    ppl = zoo.language(library)

    def model():
        with ppl.plate("N", 3):
            z = ppl.sample("z", ppl.dist.Bernoulli(ppl.array(0.3)))
            w = ppl.sample("w", ppl.dist.Normal(z, 1.0)) if between else z
            ppl.sample("x", ppl.dist.Normal(way(w), 1.0), obs=ppl.array([0.3, 1.0, 2.0]))

    def guide():
        a = ppl.param("a", {"a": [0.2, -0.5, 0.9]})
        with ppl.plate("N", 3):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=a))
            if between:
                ppl.sample("w", ppl.dist.Normal(z, 0.5))

    return model, guide


def reversed_(library, z):
    return torch.flip(z, (-1,)) if library == "pyro" else jnp.flip(z, -1)


WAYS = {
    "sum": lambda library, z: z + z.sum(-1)[..., None],
    "neighbour": lambda library, z: z + reversed_(library, z),
    "own": lambda library, z: 2 * z,
}


@both
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_elements_of_a_plate_that_a_cost_couples(library, way, between):
    program = plated(library, partial(WAYS[way], library), between)
    expects = nullcontext() if way == "own" else pytest.warns(EstimatorWarning, match="'x'.* plate 'N' moves with")
    with expects:
        check_program(ELBOS[library](), *program)
    with expects:
        if library == "pyro":
            PyroELBO().loss_and_grads(*program)
        else:
            svi = SVI(*program, SGD(0.1), NumPyroELBO())
            jax.eval_shape(lambda key: svi.update(svi.init(key)), jax.random.key(0))


@both
def test_what_decides_on_enumerated_values_counts_for_all_elements(library):
    """Each cost is weighed by a probability that all move, and is credited to all: no claim is broken."""
    ppl = zoo.language(library)
    marked = {"enumerate": "parallel"}

    def model():
        plate = ppl.plate("N", 3, dim=-1)
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(ppl.array(0.3)))
        k = ppl.sample("k", ppl.dist.Bernoulli(ppl.array(0.4)), infer=marked)
        with plate:
            ppl.sample("x", ppl.dist.Normal(z + k, 1.0), obs=ppl.array([0.3, 1.0, 2.0]))

    def guide():
        a = ppl.param("a", {"a": [0.2, -0.5, 0.9]})
        with ppl.plate("N", 3, dim=-1):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=a))
        ppl.sample("k", ppl.dist.Bernoulli(logits=z.sum(-1) - 1.0), infer=marked)

    check_program(ELBOS[library](), model, guide)  # warnings are errors


@pytest.mark.parametrize("apart", [1, 3, 8, 16, 32, 64])
def test_elements_that_are_coupled_at_any_distance(apart):
    def model():
        with pyro.plate("N", 128):
            z = pyro.sample("z", tdist.Bernoulli(0.3))
            pyro.sample("x", tdist.Normal(z + z.roll(apart, -1), 1.0), obs=torch.ones(128))

    def guide():
        with pyro.plate("N", 128):
            pyro.sample("z", tdist.Bernoulli(logits=pyro.param("a", torch.zeros(128))))

    with pytest.warns(EstimatorWarning, match="plate 'N' moves with"):
        PyroELBO().loss_and_grads(model, guide)
