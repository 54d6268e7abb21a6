"""What the examples claim: measured variances are the closed forms, and baselines pay as they say.

A measured variance must lie within four of its own standard errors of the closed form, and its standard error must be
below a twentieth of it: an error of a fifth would be seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import bernoulli_toy
import beta_bernoulli
import categorical_fit
import gaussian_square
from _common import variance

from ppl_estimators import LeaveOneOut, Reinforce

pytestmark = pytest.mark.filterwarnings("ignore:site .*very noisy:ppl_estimators.EstimatorWarning")
BACKENDS = ["numpyro", "pyro"]


def labelled(module: Any) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("method", module.METHODS, ids=lambda m: m.label)


def assert_variance(estimates: np.ndarray, exact: float) -> None:
    measured, error = variance(estimates)
    assert error < 0.05 * exact
    assert abs(measured - exact) < 4 * error + 1e-3 * exact  # single precision


# ---- a categorical fit: ten draws with a baseline, a thousand without -----------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@labelled(categorical_fit)
def test_categorical_variance(method: Any, backend: str) -> None:
    copies = 20_000 if method.draws == 10 else 1500
    (estimates,) = categorical_fit.GRADIENTS[backend](method, [-20.0], copies)
    assert_variance(estimates, categorical_fit.exact_variance(method, -20.0, np.zeros(3)))
    exact = np.array([1, 1, 1]) / 3 * (np.log(categorical_fit.TARGET) - np.log(categorical_fit.TARGET).mean())
    errors = estimates.std(0) / np.sqrt(copies)
    assert (np.abs(estimates.mean(0) - exact) < 4 * errors).all()


def test_categorical_exact_variance_by_enumeration() -> None:
    """The formula for a sample covariance, against all nine pairs of two draws."""
    theta, evidence = np.array([0.3, -0.8, 0.5]), -3.0
    q = np.exp(theta) / np.exp(theta).sum()
    f = np.log(categorical_fit.TARGET) + evidence - np.log(q)
    s = np.eye(3) - q
    pairs = [(q[i] * q[j], 0.5 * (f[i] - f[j]) * (s[i] - s[j])) for i in range(3) for j in range(3)]
    mean = sum(p * g for p, g in pairs)
    expected = sum(p * ((g - mean) ** 2).sum() for p, g in pairs)
    two = categorical_fit.Method("", Reinforce(LeaveOneOut()), 2, "")
    assert categorical_fit.exact_variance(two, evidence, theta) == pytest.approx(expected, rel=1e-12)


def test_ten_draws_with_a_baseline_are_worth_a_thousand_without() -> None:
    """In variance, exactly: from about six nats of evidence on. Without any evidence a baseline isn't needed."""
    plain, many, baseline = (
        [categorical_fit.exact_variance(m, e, np.zeros(3)) for e in (0.0, -7.0, -20.0)] for m in categorical_fit.METHODS
    )
    assert baseline == pytest.approx([baseline[0]] * 3)
    assert many[0] < baseline[0]
    assert many[1] > baseline[1]
    assert many[2] > 10 * baseline[2]
    assert plain == pytest.approx([100 * x for x in many])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fit_by_ten_draws_with_a_baseline_is_closer(backend: str) -> None:
    def distance(method: Any) -> np.ndarray:
        *_, theta = categorical_fit.FIT[backend](method, categorical_fit.LOG_EVIDENCE, copies=4, steps=200, every=50)
        return categorical_fit.kl(theta)

    start = categorical_fit.kl(np.zeros(3))
    few, many, baseline = map(distance, categorical_fit.METHODS)
    assert 100 * baseline.max() < np.median(many) < 0.1 * start
    assert np.median(few) > 0.2 * start


# ---- z ~ Normal(μ, 1), f = z² --------------------------------------------------------------------------------------


@labelled(gaussian_square)
def test_gaussian_closed_forms_by_quadrature(method: Any) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    a, b = np.meshgrid(nodes, nodes)
    weight = np.outer(weights, weights)
    for mu in (0.0, 1.3, -2.0):
        constant = {"mean cost": mu**2 + 1, "best constant": mu**2 + 3}.get(method.label.partition(", ")[2], 0.0)
        estimate = {
            "leave-one-out, 2 draws": 0.5 * ((mu + a) ** 2 - (mu + b) ** 2) * (a - b),
            "pathwise": 2 * (mu + a),
        }.get(method.label, ((mu + a) ** 2 - constant) * a)
        mean = (weight * estimate).sum()
        assert mean == pytest.approx(2 * mu, abs=1e-10)
        assert method.exact(mu) == pytest.approx((weight * (estimate - mean) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@labelled(gaussian_square)
def test_gaussian_variance(method: Any, backend: str) -> None:
    for mu in (0.0, 2.0):
        estimates = gaussian_square.ESTIMATES[backend](method, mu, 100_000)
        assert_variance(estimates, method.exact(mu))
        assert abs(estimates.mean() - 2 * mu) < 4 * estimates.std() / np.sqrt(len(estimates))


# ---- the Bernoulli toy ---------------------------------------------------------------------------------------------

EXACT = [m for m in bernoulli_toy.METHODS if m.exact is not None]
NOISY = [m for m in EXACT if m.label != "Enumerate()"]


def checkpoints(backend: str, method: Any, **options: Any) -> list[Any]:
    return list(bernoulli_toy.TRAIN[backend](method, report=lambda steps: None, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", EXACT, ids=lambda m: m.label)
def test_bernoulli_variance(method: Any, backend: str) -> None:
    """At the start, where p = ½, and after 60 steps; at p = ½ every draw of DisARM is the same."""
    start, end = checkpoints(backend, method, seeds=1, steps=60, every=60, n=20_000)
    for point in (start, end):
        for i, t in enumerate(bernoulli_toy.TARGETS):
            p = 1 / (1 + np.exp(-point.logits[i, 0]))
            exact = float(method.exact(p, t))
            estimates = point.estimates[i, 0]
            gradient = p * (1 - p) * (1 - 2 * t)
            if exact < 1e-12:
                np.testing.assert_allclose(estimates, gradient, rtol=1e-3)
            else:
                assert_variance(estimates, exact)
                assert abs(estimates.mean() - gradient) < 4 * estimates.std() / np.sqrt(len(estimates))
    assert (end.logits != 0).all()


@pytest.mark.parametrize("method", NOISY, ids=lambda m: m.label)
def test_bernoulli_closed_forms_by_enumeration(method: Any) -> None:
    """Each estimator written out, its noise summed or integrated."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for p, t in [(0.5, 0.45), (0.3, 0.49), (0.85, 0.2)]:
        q, f = 1 - p, np.array([t**2, (1 - t) ** 2])
        if method.label == "DisARM()":
            b, other = (u > q).astype(int), (1 - u > q).astype(int)
            estimate = 0.5 * (f[b] - f[other]) * np.where(b != other, 1 - 2 * other, 0) * max(p, q)
            expected = estimate.var()
        elif method.label == "Reinforce()":
            estimate = np.array([f[0] * -p, f[1] * q])
            expected = q * estimate[0] ** 2 + p * estimate[1] ** 2 - (estimate @ [q, p]) ** 2
        else:
            delta = 0.5 * (f[1] - f[0])  # the two draws differ with probability 2pq, else the estimate is 0
            expected = 2 * p * q * delta**2 - (2 * p * q * delta) ** 2
        assert method.exact(p, t) == pytest.approx(expected, rel=1e-4)


#: label: {(t, steps): mean and standard deviation of E[(b − t)²] over 100 runs}, by estimators written by hand
KNOWN = {
    "Enumerate()": {(0.45, 300): (0.21142, 0.0), (0.49, 1000): (0.24038, 0.0), (0.499, 1000): (0.249029, 0.0)},
    "Reinforce()": {(0.45, 300): (0.23878, 0.0036), (0.49, 1000): (0.24836, 0.0016), (0.499, 1000): (0.249987, 1.7e-4)},
    "Reinforce(LeaveOneOut())": {
        (0.45, 300): (0.21735, 9e-4), (0.49, 1000): (0.24073, 1e-4), (0.499, 1000): (0.249064, 1e-5),
    },
    "DisARM()": {(0.45, 300): (0.21384, 6e-4), (0.49, 1000): (0.24060, 4e-5), (0.499, 1000): (0.249051, 4e-6)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", EXACT, ids=lambda m: m.label)
def test_bernoulli_learning_curves_are_the_known_ones(method: Any) -> None:
    seeds, every = 40, 100
    points = checkpoints("numpyro", method, seeds=seeds, steps=1000, every=every, n=1)
    for (t, steps), (expected, spread) in KNOWN[method.label].items():
        logits = points[steps // every].logits[bernoulli_toy.TARGETS.index(t)]
        cost = bernoulli_toy.expected_cost(1 / (1 + np.exp(-logits)), t)
        error = spread * np.sqrt(1 / seeds + 1 / 100)
        last_digit = 0.5 * 10.0 ** -(6 if t == 0.499 else 5)
        assert abs(cost.mean() - expected) < 4 * error + last_digit


def test_bernoulli_learning_curve_of_pyro() -> None:
    """Enumeration has no noise: the same curve to the last digit."""
    method = bernoulli_toy.METHODS[-1]
    end = checkpoints("pyro", method, seeds=1, steps=300, every=300, n=1)[-1]
    cost = bernoulli_toy.expected_cost(1 / (1 + np.exp(-end.logits[0, 0])), 0.45)
    assert cost == pytest.approx(0.21142, abs=5e-6)


@pytest.mark.slow
def test_order_of_the_estimators_on_the_toy() -> None:
    """The closer t is to ½, the more they differ: what is left of the improvement after 1,000 steps."""
    left = {}
    for m in bernoulli_toy.METHODS:
        end = checkpoints("numpyro", m, seeds=10, steps=1000, every=1000, n=1)[-1]
        left[m.label] = bernoulli_toy.excess(end.logits[1], 0.49).mean()
    assert left["Enumerate()"] < left["DisARM()"] < left["Reinforce(LeaveOneOut())"] < 0.1
    assert left["Reinforce(OptimalConstant(PastSteps(0.99)))"] < left["Reinforce(MovingAverage())"] < 0.2
    assert left["RELAX()"] < 0.6 < left["Reinforce()"]


# ---- Beta-Bernoulli ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beta_bernoulli_steps_in_numpyro() -> None:
    def median(method: Any) -> float:
        paths = beta_bernoulli.train_in_numpyro(method, runs=24, steps=1500, report=lambda steps: None)
        return float(np.median(np.nan_to_num(beta_bernoulli.steps_needed(paths), nan=np.inf)))

    plain, average, leave_one_out, pathwise = map(median, beta_bernoulli.METHODS)
    assert plain > 3 * average
    assert average > 1.5 * leave_one_out
    assert pathwise < 0.5 * plain


@pytest.mark.slow
def test_beta_bernoulli_steps_in_pyro() -> None:
    """Every run with a baseline arrives within 250 steps; the dictionary and the estimator are the same."""
    method = beta_bernoulli.METHODS[1]
    paths = beta_bernoulli.train_in_pyro(method, runs=3, steps=250, report=lambda steps: None)
    assert np.isfinite(beta_bernoulli.steps_needed(paths)).all()
    same = beta_bernoulli.Method(method.label, method.estimator, method.colour)
    np.testing.assert_array_equal(
        beta_bernoulli.train_in_pyro(same, runs=1, steps=20, report=lambda steps: None)[0], paths[0, :20]
    )


def test_beta_bernoulli_without_a_baseline_is_what_the_tutorial_does() -> None:
    """The same draws and the same steps as Pyro's own `TraceGraph_ELBO`."""
    import pyro.distributions as dist
    from pyro.distributions.testing.fakes import NonreparameterizedBeta
    from pyro.infer import SVI, TraceGraph_ELBO
    from pyro.optim import Adam
    from torch.distributions import constraints

    steps, plain = 30, beta_bernoulli.METHODS[0]
    ours = beta_bernoulli.train_in_pyro(plain, runs=1, steps=steps, report=lambda steps: None)[0]
    tosses = torch.as_tensor(beta_bernoulli.TOSSES, dtype=torch.float)

    def model() -> None:
        fairness = pyro.sample("fairness", dist.Beta(*beta_bernoulli.PRIOR))
        with pyro.plate("tosses", len(tosses)):
            pyro.sample("heads", dist.Bernoulli(fairness), obs=tosses)

    def guide() -> None:
        alpha = pyro.param("alpha", torch.tensor(15.0), constraint=constraints.positive)
        beta = pyro.param("beta", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("fairness", NonreparameterizedBeta(alpha, beta))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, Adam(beta_bernoulli.ADAM), TraceGraph_ELBO())
    for step in range(steps):
        svi.step()
        np.testing.assert_allclose([pyro.param("alpha").item(), pyro.param("beta").item()], ours[step], rtol=1e-5)
