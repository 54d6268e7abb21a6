"""A cost that moves with a site and has no derivative in its value, where the site's estimator needs one: named."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.infer import SVI as NumPyroSVI
from numpyro.infer import autoguide as nauto
from pyro.infer import SVI
from pyro.infer import autoguide as tauto

from ppl_estimators import (
    REBAR,
    RELAX,
    DeltaMethod,
    GumbelSoftmax,
    LeaveOneOut,
    MuProp,
    PastSteps,
    Reinforce,
    RELAXWithModel,
    StickingTheLanding,
)
from ppl_estimators.core.verify import Height, wrong_slopes
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.pyro import EstimatorELBO as PyroELBO
from ppl_estimators.testing import check_program

stop = jax.lax.stop_gradient
X = {pyro: torch.tensor(1.1), numpyro: 1.1}
DIST = {pyro: tdist, numpyro: ndist}


def program(ppl, like, discrete=False):
    """An observation at ``like(z)``; z is a bit, or `Pathwise()`."""
    dist = DIST[ppl]

    def model():
        z = ppl.sample("z", dist.Bernoulli(0.3) if discrete else dist.Normal(0.0, 1.0))
        ppl.sample("x", dist.Normal(like(z), 1.0), obs=X[ppl])

    def guide():
        a = ppl.param("a", X[ppl] + 0.0)
        ppl.sample("z", dist.Bernoulli(logits=a) if discrete else dist.Normal(a - 0.7, 0.5))

    return model, guide


def said(model, guide, elbo=None, steps=("step", "step")):
    """What steps of a program warn of."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = elbo or PyroELBO()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), elbo)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in steps:
            getattr(svi, step)()
    return [str(w.message) for w in found]


def traced(model, guide, elbo=None, estimator=None):
    """What tracing a step warns of."""
    elbo, guide = elbo or NumPyroELBO(), guide if estimator is None else with_estimators(guide, {"z": estimator})
    svi = NumPyroSVI(model, guide, numpyro.optim.SGD(0.01), elbo)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jax.eval_shape(lambda: svi.update(svi.init(jax.random.key(0))))
    return [str(w.message) for w in found]


def is_cut(found, site="z", term="log p of 'x'"):
    assert len(found) == 1 and f"site '{site}': {term} moves with '{site}', and no derivative leads" in found[0]
    return found[0]


def no_grad(z):
    with torch.no_grad():
        return torch.exp(z)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, slope):
        return slope


CUTS = {
    pyro: (
        no_grad,
        lambda z: 2 * z.detach(),
        lambda z: torch.from_numpy(np.sin(z.detach().numpy()[None])),
        lambda z: 2 * z.item(),
        lambda z: 3 * torch.round(z),
        lambda z: torch.where(z > 0.4, 3.0, -1.0),
        lambda z: 2.0 if z > 0.4 else -1.0,
        lambda z: torch.tensor([1.0, 3.0])[(z > 0.4).long()],
    ),
    numpyro: (
        stop,
        lambda z: 3 * jnp.round(z),
        lambda z: jnp.where(z > 0.4, 3.0, -1.0),
        lambda z: jax.lax.cond(z > 0.4, lambda: 3.0, lambda: -1.0),
        lambda z: jnp.array([1.0, 3.0])[(z > 0.4).astype(int)],
        lambda z: jax.lax.scan(lambda c, _: (c + stop(z), None), 0.0, None, length=3)[0],
        lambda z: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.result_type(float)), stop(z)),
    ),
}
WHOLE = {
    pyro: (
        torch.relu,
        StraightThrough.apply,
        lambda z: z if bool(z.abs() < 1e3) else -z,
        lambda z: min(z, torch.tensor(0.4)),  # the first z lies above
        lambda z: (z, z.detach().numpy().copy())[0],
    ),
    numpyro: (
        jax.nn.relu,
        lambda z: z + stop(jnp.round(z) - z),
        lambda z: jax.nn.logsumexp(jnp.stack([z, 2 * z])),
        lambda z: jax.lax.fori_loop(0, 3, lambda i, c: c + z, 0.0),
    ),
}


class HalfTheSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


@jax.custom_vjp
def half_the_slope(x):
    return x**2


half_the_slope.defvjp(lambda x: (x**2, x), lambda x, slope: (slope * x,))
HALVED = {
    pyro: (lambda z: z + z.detach(), lambda z: z * z.detach(), HalfTheSlope.apply),
    numpyro: (lambda z: z + stop(z), half_the_slope),
}
SEES = {pyro: said, numpyro: traced}
libraries = pytest.mark.parametrize("ppl", (pyro, numpyro))


@libraries
def test_pathwise_through_what_has_no_derivative(ppl):
    for like in CUTS[ppl]:
        is_cut(SEES[ppl](*program(ppl, like)))
    for like in WHOLE[ppl]:
        assert SEES[ppl](*program(ppl, like)) == []


@libraries
def test_the_fix_that_is_named_works(ppl):
    cut = program(ppl, CUTS[ppl][0])
    ELBO = PyroELBO if ppl is pyro else NumPyroELBO
    fix = 'EstimatorELBO({"z": Reinforce(LeaveOneOut())}, num_particles=2)'
    assert fix in is_cut(SEES[ppl](*cut, ELBO(StickingTheLanding())))
    assert SEES[ppl](*cut, eval(fix, {"EstimatorELBO": ELBO, "Reinforce": Reinforce, "LeaveOneOut": LeaveOneOut})) == []


def test_relaxed_values_pyro():
    ways = (lambda z: 2 * z.detach(), lambda z: torch.tensor([1.0, 3.0])[z.long()], lambda z: (z > 0.5).float())
    for estimator, like in zip((REBAR(), RELAXWithModel(), GumbelSoftmax()), ways, strict=True):
        assert repr(estimator) in is_cut(said(*program(pyro, like, True), PyroELBO(estimator)))
        assert said(*program(pyro, lambda z: 2 * z, True), PyroELBO(estimator)) == []
    for estimator in (RELAX(), MuProp(), Reinforce(LeaveOneOut())):  # right whatever the slope is
        assert said(*program(pyro, ways[0], True), PyroELBO(estimator, num_particles=2)) == []


def test_relaxed_values_numpyro():
    ways = (stop, lambda z: jnp.array([1.0, 3.0])[z.astype(int)], jnp.round)
    for estimator, like in zip((REBAR(), RELAXWithModel(), GumbelSoftmax()), ways, strict=True):
        assert repr(estimator) in is_cut(traced(*program(numpyro, like, True), estimator=estimator))
        assert traced(*program(numpyro, lambda z: 2 * z, True), estimator=estimator) == []
    assert traced(*program(numpyro, stop, True), estimator=RELAX()) == []
    assert traced(*program(numpyro, stop), estimator=DeltaMethod(PastSteps(0.9))) == []


@libraries
def test_chains_and_densities_that_are_flat(ppl):
    dist, cut = DIST[ppl], torch.Tensor.detach if ppl is pyro else stop

    def model():
        ppl.sample("w", dist.Normal(ppl.sample("z", dist.Normal(0.0, 1.0)), 1.0))
        k = ppl.sample("k", dist.Bernoulli(0.3))
        ppl.sample("x", dist.Normal(2.0 * k, 1.0), obs=X[ppl])
        ppl.sample("u", dist.Uniform(0.0, 1.0))

    def guide(way=lambda z: z, still=False):
        z = ppl.sample("z", dist.Normal(X[ppl] if still else ppl.param("a", X[ppl] + 0.0), 0.5))
        ppl.sample("w", dist.Normal(way(z), 1.0))
        ppl.sample("k", dist.Bernoulli(logits=way(z)))
        ppl.sample("u", dist.Beta(ppl.param("b", 2 * X[ppl]), 2.0))

    assert SEES[ppl](model, guide) == []
    found = SEES[ppl](model, lambda: guide(cut))
    assert len(found) == 1 and "moves with 'z'" in found[0] and "-log q of " in found[0]
    assert SEES[ppl](model, lambda: guide(cut, still=True)) == []  # nothing to learn there


@libraries
def test_autoguides(ppl):
    dist, cut = DIST[ppl], torch.Tensor.detach if ppl is pyro else stop
    zero = torch.zeros(2) if ppl is pyro else jnp.zeros(2)

    def model(way):
        z = ppl.sample("z", dist.Normal(zero, 1.0).to_event(1))
        k = ppl.sample("k", dist.LogNormal(0.0, 1.0))
        ppl.sample("x", dist.Normal(way(z).sum(), 1.0), obs=X[ppl])
        ppl.sample("y", dist.Normal(k + ppl.sample("u", dist.Uniform(0.0, 1.0)), 1.0), obs=X[ppl])

    def through():
        model(cut)

    def whole():
        model(lambda z: z)

    auto = tauto if ppl is pyro else nauto
    kinds = [auto.AutoDiagonalNormal, auto.AutoNormal] + ([auto.AutoStructured] if ppl is pyro else [])
    for kind in kinds:
        assert SEES[ppl](whole, kind(whole)) == []
        assert "log p of 'x' moves with 'z" in SEES[ppl](through, kind(through))[0]
    assert SEES[ppl](through, auto.AutoDelta(through)) == []  # a function of parameters, which has this slope


@libraries
def test_a_part_of_a_derivative(ppl):
    """By `check_program` only: the derivative against a difference, and both numbers; a kink is none."""
    elbo = PyroELBO if ppl is pyro else NumPyroELBO
    for like in HALVED[ppl]:
        assert SEES[ppl](*program(ppl, like)) == []
        for estimator in (None, REBAR()) if like is HALVED[ppl][0] else (None,):
            discrete = estimator is not None
            with pytest.warns(UserWarning, match="derivative says") as found:
                check_program(elbo(estimator), *program(ppl, like, discrete))
            (message,) = (str(w.message) for w in found if "derivative says" in str(w.message))
            assert message.startswith("site 'z': log p of 'x' changes by ") and "Reinforce(LeaveOneOut())" in message
            difference, derivative = re.search(r"by (\S+) for .* says (\S+) \(", message).groups()
            assert float(derivative) == pytest.approx(float(difference) / 2, rel=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_program(elbo(), *program(ppl, WHOLE[ppl][0]))


def test_right_derivatives_on_a_simplex_and_in_autoguides():
    def model():
        z = pyro.sample("z", tdist.Normal(torch.zeros(3), 1.0).to_event(1))
        p = pyro.sample("p", tdist.Dirichlet(torch.tensor([1.0, 2.0])))
        pyro.sample("x", tdist.Normal((torch.relu(z - 0.3) ** 2).sum() + p[0], 1.0), obs=X[pyro])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_program(PyroELBO(), model, tauto.AutoNormal(model))


def test_a_kink_is_no_wrong_derivative():
    """A step over it has a slope between those of the two sides; what rounding hides is not judged either."""
    absolute = lambda x: Height(abs(x), float(x >= 0), 1.0, 1e-16)  # noqa: E731
    steep = lambda x: Height(x**3 - 2 * x, 3 * x**2 - 2, 1.0, 1e-16)  # noqa: E731
    noisy = lambda x: Height(1e-12 * x, 3e-12, 1e9, 1e-16)  # noqa: E731
    heights = {"kink": absolute, "right": steep, "noise": noisy, "wrong": lambda x: Height(2 * x, 1.0, 1.0, 1e-16)}

    def tilted(sites, step, line):
        return {("model", k): f(step) for k, f in heights.items()}

    found = wrong_slopes(tilted, [("model", k) for k in heights], ["a", "b"])
    assert [(w.site, w.term[1], w.derivative, round(w.difference, 6)) for w in found] == [
        ("a", "wrong", 1.0, 2.0),
        ("b", "wrong", 1.0, 2.0),
    ]


def test_when_it_is_said():
    """At the first step that differentiates; by `check_program`, too; not by one that is told not to look."""
    cut = program(pyro, torch.Tensor.detach)
    is_cut(said(*cut, steps=["evaluate_loss", "step", "evaluate_loss", "step"]))
    assert said(*cut, steps=["evaluate_loss"]) == said(*cut, PyroELBO(verify=False)) == []
    with pytest.warns(UserWarning, match="site 'z': log p of 'x' moves with 'z'"):
        check_program(PyroELBO(), *cut)
    with pytest.warns(UserWarning, match="site 'z': log p of 'x' moves with 'z'"):
        check_program(NumPyroELBO(), *program(numpyro, stop))
