"""The answers that `posteriors.py` calls exact are: a second derivation of each, by quadrature or brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from posteriors import CASES, BeliefNetwork, SpikeAndSlab
from scipy import integrate, stats


def kl_by_quadrature(q: Any, log_joint: Callable[[Any], Any], low: float, high: float) -> float:
    """KL(q ‖ joint / evidence) of a density on the line."""
    evidence, _ = integrate.quad(lambda z: np.exp(log_joint(z)), low, high, epsabs=0, epsrel=1e-10)
    kl, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - log_joint(z)), low, high, epsrel=1e-10)
    return kl + np.log(evidence)


def test_beta_bernoulli() -> None:
    case = CASES["beta_bernoulli"][0]

    def log_joint(p: float) -> float:
        return stats.beta.logpdf(p, *case.prior) + stats.bernoulli.logpmf(case.data, p).sum()

    expected = kl_by_quadrature(stats.beta(1.4, 0.8), log_joint, 0, 1)
    assert case.kl({"alpha": np.array(1.4), "beta": np.array(0.8)}) == pytest.approx(expected, rel=1e-7)


def test_normal_normal() -> None:
    case = CASES["normal_normal"][0]

    def log_joint(m: float) -> float:
        return stats.norm.logpdf(m, *case.prior) + stats.norm.logpdf(case.data, m, case.noise).sum()

    expected = kl_by_quadrature(stats.norm(0.3, 0.7), log_joint, -12, 12)
    assert case.kl({"loc": np.array(0.3), "scale": np.array(0.7)}) == pytest.approx(expected, rel=1e-7)


def test_mixture() -> None:
    case = CASES["mixture"][0]
    rng = np.random.default_rng(0)
    q = {"logits": rng.normal(size=(5, 3)), "loc": rng.normal(size=(5, 3)), "scale": rng.uniform(0.5, 1.5, (5, 3))}
    total = 0.0
    for n, x in enumerate(case.data):
        p = np.exp(q["logits"][n]) / np.exp(q["logits"][n]).sum()
        evidence, kl = 0.0, 0.0
        for k in range(3):

            def log_joint(y: float, k: int = k, x: float = x) -> float:
                return (
                    np.log(case.weights[k])
                    + stats.norm.logpdf(y, case.locs[k], case.scales[k])
                    + stats.norm.logpdf(x, y, case.noise)
                )

            mass, _ = integrate.quad(lambda y, f=log_joint: np.exp(f(y)), -15, 15, epsabs=0, epsrel=1e-10)
            evidence += mass
            normal = stats.norm(q["loc"][n, k], q["scale"][n, k])
            kl += p[k] * (np.log(p[k]) + kl_by_quadrature(normal, log_joint, -15, 15) - np.log(mass))
        total += kl + np.log(evidence)
    assert case.kl(q) == pytest.approx(total, rel=1e-7)


def test_spike_and_slab_inclusion() -> None:
    """The evidence of each γ by Gauss–Hermite quadrature over β."""
    case: SpikeAndSlab = CASES["spike_and_slab"][0]
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    beta = case.slab * np.array(list(itertools.product(nodes, repeat=3)))
    weight = np.prod(list(itertools.product(weights / weights.sum(), repeat=3)), axis=-1)
    joint, means = [], []
    for state in case.states:
        likelihood = stats.norm.pdf(case.data, (beta * state) @ case.features.T, case.noise).prod(-1)
        prior = np.prod(np.where(state == 1, case.inclusion, 1 - case.inclusion))
        joint.append(prior * weight @ likelihood)
        means.append(weight * likelihood @ beta / (weight @ likelihood))
    np.testing.assert_allclose(case.probabilities, np.array(joint) / sum(joint), rtol=2e-4)
    np.testing.assert_allclose(case.loc, means, atol=1e-3)


def test_spike_and_slab_distance() -> None:
    """0 at the posterior; elsewhere the mean of log q − log posterior over draws."""
    case: SpikeAndSlab = CASES["spike_and_slab"][0]
    exact = dict(zip(("table_0", "table_1", "table_2"), conditional_logits(case.probabilities, 3), strict=True))
    root = np.linalg.cholesky(case.covariance)
    diagonal = np.eye(3, dtype=bool)
    root[:, diagonal] = np.log(root[:, diagonal])
    exact |= {"loc": np.array(case.loc), "root": root}
    assert case.kl(exact) == pytest.approx(0, abs=1e-12)

    rng = np.random.default_rng(0)
    away = rng.normal(size=(8, 3))
    distances = []
    for i in range(8):
        q = stats.multivariate_normal(case.loc[i] + away[i], case.covariance[i])
        p = stats.multivariate_normal(case.loc[i], case.covariance[i])
        z = q.rvs(200_000, random_state=rng)
        distances.append(case.probabilities[i] * (q.logpdf(z) - p.logpdf(z)).mean())
    assert case.kl(exact | {"loc": np.array(case.loc) + away}) == pytest.approx(sum(distances), rel=0.01)


def test_belief_network() -> None:
    case: BeliefNetwork = CASES["belief_network"][0]

    def bernoulli(x: float, logit: float) -> float:
        return 1 / (1 + np.exp(-logit)) if x else 1 / (1 + np.exp(logit))

    joint = []
    for *top, a, b, c in itertools.product((0, 1), repeat=5):
        low = [a, b, c]
        p = np.prod([bernoulli(top[i], case.top[i]) for i in range(2)])
        p *= np.prod([bernoulli(low[j], case.below[j] + sum(case.down[j] * top)) for j in range(3)])
        p *= np.prod([bernoulli(case.data[d], case.seen[d] + sum(case.out[d] * low)) for d in range(4)])
        joint.append(p)
    np.testing.assert_allclose(case.probabilities, np.array(joint) / sum(joint), rtol=1e-12)
    exact = {f"table_{i}": table for i, table in enumerate(conditional_logits(case.probabilities, 5))}
    assert case.kl(exact) == pytest.approx(0, abs=1e-12)


def conditional_logits(probabilities: np.ndarray, bits: int) -> list[np.ndarray]:
    """Logits of each bit given those before it."""
    table, found = probabilities.reshape((2,) * bits), []
    for i in range(bits):
        marginal = table.reshape(*(2,) * (i + 1), -1).sum(-1)
        found.append(np.log(marginal[..., 1]) - np.log(marginal[..., 0]))
    return found
