"""Mistakes that published code or tutorials make, built in on purpose: the integral over the noise sees each of them.

Every wrong estimator is the right one with one thing changed; the right one passes the same integral.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from injected import InjectedJax, cells, grid, jax_gradients, legendre, moments
from test_exact_over_noise import PX, PY, A, chain_guide, chain_model, chain_slope, toy, values

from ppl_estimators import (
    ARM,
    REBAR,
    ControlVariate,
    DisARM,
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
    RELAXWithModel,
)
from ppl_estimators.core import relaxation
from ppl_estimators.core.estimator import Relaxations
from ppl_estimators.core.families import ONEHOT, score
from ppl_estimators.core.site import Local
from ppl_estimators.estimators.baselines.base import Baseline
from ppl_estimators.estimators.relaxed_control import soft_values
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.numpyro.ops import OPS

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

T, P = 0.3, 0.7
LOGIT = float(np.log(P / (1 - P)))
EXACT = P * (1 - P) * ((1 - T) ** 2 - T**2)


def mean_of(estimator, tables, weights, particles=1, **kept):
    model, guide = toy(T)
    elbo = InjectedJax({} if kept else {"b": estimator}, num_particles=particles)
    guide = with_estimators(guide, {"b": estimator}) if kept else guide
    _, gradient = jax_gradients(elbo, model, guide, {"a": jnp.asarray(LOGIT)}, tables, **kept)
    return moments(-gradient, weights)[0][0]


def assert_seen(found, exact=EXACT):
    """The contract test asks for 1e-10."""
    assert np.abs(found - exact).max() > 1e-2 * np.abs(exact).max()


# ---- relaxed control variates --------------------------------------------------------------------------------------


class DetachedConditional(REBAR):
    """The conditional relaxation without the derivative of its v' in the parameter."""

    def local(self, ops, site, draw, costs, kept):
        eta = jnp.exp(kept.parameters["log_scale"])
        slopes = rebar_slopes(ops, site, draw, costs, kept)
        # z̃ = a + logit v'(v, p), with v' held: its slope in a is that of z at fixed noise
        z_tilde = relaxation.conditional(OPS, site.family, site.logits, draw.extra["v"], draw.value)
        temperature = jnp.exp(kept.parameters["log_temperature"])
        soft = jax.nn.sigmoid(z_tilde / temperature)
        wrong = costs.relaxed_slope[1] * soft * (1 - soft) / temperature
        return combined(ops, site, draw, costs, eta * costs.relaxed[1], eta * slopes[0], eta * wrong)


class UnmatchedConditional(REBAR):
    """z̃ drawn given the other value of b."""

    def relaxed(self, ops, site, draw, index, kept):
        return super().relaxed(ops, site, other(draw), index, kept)

    def local(self, ops, site, draw, costs, kept):
        slopes = rebar_slopes(ops, site, other(draw), costs, kept)
        eta = jnp.exp(kept.parameters["log_scale"])
        return combined(ops, site, draw, costs, eta * costs.relaxed[1], eta * slopes[0], eta * slopes[1])


class CountedTwice(REBAR):
    """c(z̃) twice in the score term and not at all in the path term."""

    def local(self, ops, site, draw, costs, kept):
        eta = jnp.exp(kept.parameters["log_scale"])
        slopes = rebar_slopes(ops, site, draw, costs, kept)
        return combined(ops, site, draw, costs, 2 * eta * costs.relaxed[1], eta * slopes[0], 0 * slopes[1])


class Right(REBAR):
    """The same assembly, put together here."""

    def local(self, ops, site, draw, costs, kept):
        eta = jnp.exp(kept.parameters["log_scale"])
        slopes = rebar_slopes(ops, site, draw, costs, kept)
        return combined(ops, site, draw, costs, eta * costs.relaxed[1], eta * slopes[0], eta * slopes[1])


def other(draw):
    return replace(draw, value=1 - draw.value)


def rebar_slopes(ops, site, draw, costs, kept):
    a = jax.lax.stop_gradient(site.logits)
    return [ops.vjp(soft, a, costs.relaxed_slope[i]) for i, soft in enumerate(soft_values(ops, site, draw, kept))]


def combined(ops, site, draw, costs, c_tilde, slope_z, slope_z_tilde):
    a = jax.lax.stop_gradient(site.logits)
    gradient = (costs.value - c_tilde) * score(ops, site.family, a, draw.value) + slope_z - slope_z_tilde
    return Local(jax.lax.stop_gradient(gradient) * site.logits)


def rebar_mean(kind):
    u, v = legendre(32, 1 - P), legendre(32)
    (us, vs), weights = grid(u, v)
    kept = {"b$log_temperature": jnp.log(0.5), "b$log_scale": jnp.log(0.8)}
    return mean_of(kind(0.5, scale=0.8), {"b": {"u": us[:, None], "v": vs[:, None]}}, weights, **kept)


@pytest.mark.parametrize("kind", [DetachedConditional, UnmatchedConditional, CountedTwice])
def test_wrong_conditional_relaxations(kind):
    assert_seen(rebar_mean(kind))


def test_the_right_relaxation_passes():
    np.testing.assert_allclose(rebar_mean(Right), EXACT, atol=1e-9)


def test_unnormalised_logits_in_the_relaxation_of_a_category(monkeypatch):
    """z from logits that do not add up to one, z̃ from log probabilities."""
    logits = jnp.array([1.4, 0.3, 0.9])
    right = relaxation.unconditional

    def wrong(ops, family, a, u):
        return a - jnp.log(-jnp.log(u)) if family == ONEHOT else right(ops, family, a, u)

    def one(key):
        """∇c(z) − c(z̃) ∇log q(b) − ∇c(z̃), whose mean is zero."""
        u, v = jax.random.uniform(key, (2, 3), minval=1e-12)
        b = jax.nn.one_hot(jnp.argmax(right(OPS, ONEHOT, logits, u)), 3)
        # softmax would not see the shift, a network on z does
        c = lambda z: jnp.sum(jnp.array([1.0, -2.0, 0.7]) * jnp.tanh(z - 1)) ** 2  # noqa: E731
        tilde, slope = jax.value_and_grad(lambda a: c(relaxation.conditional(OPS, ONEHOT, a, v, b)))(logits)
        path = jax.grad(lambda a: c(relaxation.unconditional(OPS, ONEHOT, a, u)))(logits)
        return path - slope - tilde * score(OPS, ONEHOT, logits, b)

    def worst():
        found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 100_000)))
        return np.abs(found.mean(0) / (found.std(0) / np.sqrt(len(found)))).max()

    assert worst() < 4.5
    monkeypatch.setattr(relaxation, "unconditional", wrong)
    assert worst() > 10


def test_hard_draws_below_a_relaxed_value():
    """Downstream bits neither relaxed nor drawn again while the cost at relaxed values is differentiated."""

    class Hard(RELAXWithModel):
        def relaxations(self, site):
            return Relaxations(2, "drawn")

    estimator, rng = Hard(0.5, hidden=8, baseline=None), np.random.default_rng(0)
    kept = {
        "x$log_temperature": jnp.log(0.5),
        "x$log_scale": jnp.log(1.0),
        **{
            f"x$control.{k}": jnp.asarray(0.2 * rng.normal(size=s))
            for k, s in {"w1": (2, 8), "b1": 8, "w2": (8, 1), "b2": 1}.items()
        },
    }
    u, v, w = legendre(24, 1 - PX), legendre(24), cells(*PY, *(1 - PY))
    (us, vs, ws), weights = grid(u, v, w)
    tables = {"x": {"u": us[:, None], "v": vs[:, None]}, "y": {"u": ws[:, None]}}

    def mean(e):
        guide = with_estimators(chain_guide, {"x": e, "y": DisARM()})
        _, gradient = jax_gradients(InjectedJax(), chain_model, guide, {"a": A}, tables, **kept)
        return moments(-gradient, weights)[0]

    exact = chain_slope(A)
    assert_seen(mean(estimator), exact)


# ---- scores and baselines -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class AverageOfNow(MovingAverage):
    """Updates the average before it is used."""

    def predict(self, ops, site, cost, kept):
        return self.decay * kept.state["mean"] + (1 - self.decay) * cost


@dataclass(frozen=True, eq=False, repr=False)
class MeanWithItself(Baseline):
    """The mean over the particles, this one included."""

    def predict(self, ops, site, cost, kept):
        return jnp.broadcast_to(jnp.mean(cost, axis=0, keepdims=True), cost.shape)


class BatchDeviation(Reinforce):
    """Leave-one-out divided by the standard deviation of the same particles."""

    def local(self, ops, site, draw, costs, kept):
        right = super().local(ops, site, draw, costs, kept)
        return replace(right, surrogate=right.surrogate / (jnp.std(costs.value, axis=0, ddof=1) + 1e-1))


def test_an_average_that_has_seen_its_own_draw():
    state = {"b$state": {"mean": jnp.asarray(0.2), "started": jnp.asarray(1.0)}}
    found = [mean_of(Reinforce(kind(0.9)), *values(P, 1), **state) for kind in (MovingAverage, AverageOfNow)]
    np.testing.assert_allclose(found[0], EXACT, atol=1e-12)
    np.testing.assert_allclose(found[1], 0.9 * EXACT, atol=1e-12)  # shrunk, to all appearances fine


def test_a_mean_that_has_seen_its_own_draw():
    found = mean_of(Reinforce(MeanWithItself()), *values(P, 3), particles=3)
    np.testing.assert_allclose(found, 2 / 3 * EXACT, atol=1e-12)


def test_the_deviation_of_the_same_batch():
    """A factor that depends on the draws: no constant undoes it."""
    found = [mean_of(BatchDeviation(LeaveOneOut()), *values(P, k), particles=k) for k in (2, 4)]
    assert_seen(np.array(found))
    assert abs(found[0] / found[1] - 1) > 0.05


def test_a_control_variate_that_is_only_centred():
    """E[(h − E h) ∇log q] is ∇E[h], not zero."""
    h = ControlVariate(lambda b: 2.0 * b, lambda d: 2.0 * d.mean, 0.7)

    class Centred(Baseline):
        def predict(self, ops, site, cost, kept):
            b = jnp.where(jnp.abs(cost - (1 - T) ** 2) < 1e-9, 1.0, 0.0)
            return 0.7 * (2 * b - 2 * P)

    np.testing.assert_allclose(mean_of(h, *values(P, 1)), EXACT, atol=1e-12)
    found = mean_of(Reinforce(Centred()), *values(P, 1))
    np.testing.assert_allclose(found, EXACT - 0.7 * 2 * P * (1 - P), atol=1e-12)


class InProbabilities(ARM):
    """The factor of the logits times the derivative of the probabilities."""

    def local(self, ops, site, draw, costs, kept):
        difference = site.spread(ops, costs.value - costs.alternatives[0])
        return Local(jax.lax.stop_gradient(difference * (draw.extra["u"] - 0.5)) * jax.nn.sigmoid(site.logits))


class WithoutHalf(DisARM):
    """The sum over the pair, not its mean."""

    def local(self, ops, site, draw, costs, kept):
        return replace(right := super().local(ops, site, draw, costs, kept), surrogate=2 * right.surrogate)


@pytest.mark.parametrize(("kind", "factor"), [(InProbabilities, P * (1 - P)), (WithoutHalf, 2.0)])
def test_wrong_factors(kind, factor):
    u, weights = legendre(8, P, 1 - P)
    found = mean_of(kind(), {"b": {"u": u[:, None]}}, weights)
    np.testing.assert_allclose(found, factor * EXACT, atol=1e-10)


def test_what_is_downstream_kept_as_drawn():
    """y as it was drawn under the other value of x: the numbers of a law-breaking engine, enumerated."""
    found = np.zeros(3)
    for x, y in itertools.product((0.0, 1.0), repeat=2):
        py = PY[int(x)]
        weight = (PX if x else 1 - PX) * (py if y else 1 - py)

        def f(b, y=y):
            a = jnp.asarray(A)
            log_q = b * a[0] - jax.nn.softplus(a[0]) + y * (a[1] + a[2] * b) - jax.nn.softplus(a[1] + a[2] * b)
            log_p = b * 0.3 - jax.nn.softplus(0.3) + y * (0.5 - b) - jax.nn.softplus(0.5 - b)
            return 1.3 * b - 0.7 * y + 2.1 * b * y + 0.4 * jnp.sin(3 * b + y) + log_p - log_q

        found[0] += weight * PX * (1 - PX) * float(f(1.0) - f(0.0))
    exact = np.asarray(chain_slope(A))
    assert_seen(found[:1], exact[:1])
    u = cells(*PY, *(1 - PY))
    (xs, us), weights = grid((np.array([0.0, 1.0]), np.array([1 - PX, PX])), u)
    tables = {"x": {"value": xs[:, None]}, "y": {"u": us[:, None]}}
    elbo = InjectedJax({"x": Enumerate(), "y": DisARM()})
    _, gradient = jax_gradients(elbo, chain_model, chain_guide, {"a": A}, tables)
    np.testing.assert_allclose(moments(-gradient, weights)[0][0], exact[0], atol=1e-12)


def test_scaling_and_masking_the_score():
    """A cost of weight s and a score of weight s is s times too much; a score masked with its term is none at all."""

    def model():
        with numpyro.handlers.scale(scale=4.0):
            b = numpyro.sample("b", dist.Bernoulli(logits=0.0))
        numpyro.factor("f", (b - T) ** 2)

    def guide():
        with numpyro.handlers.scale(scale=4.0):
            numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("a", 0.0)))

    class Scaled(Reinforce):
        def local(self, ops, site, draw, costs, kept):
            right = super().local(ops, site, draw, costs, kept)
            return replace(right, surrogate=site.scale * right.surrogate)

    tables, weights = values(P, 1)

    def mean(e):
        return moments(-jax_gradients(InjectedJax({"b": e}), model, guide, {"a": LOGIT}, tables)[1], weights)[0][0]

    exact = EXACT + 4 * P * (1 - P) * -LOGIT
    np.testing.assert_allclose(mean(Reinforce()), exact, atol=1e-12)
    np.testing.assert_allclose(mean(Scaled()), 4 * exact, atol=1e-12)
