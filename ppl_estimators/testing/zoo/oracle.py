"""Exact ELBOs, written out as sums over states, and their exact gradients.

Nothing here knows a probabilistic programming library: log-densities are spelled out in NumPy,
expectations are explicit sums (discrete sites) or Gauss-Hermite sums (Normal sites), and the
gradient is taken by the complex step

    ∂f/∂θ_j = Im f(θ + i h e_j) / h,        h = 1e-30,

which has no subtraction, hence no rounding error, for functions made of + · / exp log
(no abs, max or comparisons of a parameter). Every expression below keeps to those.
"""

from collections.abc import Callable, Mapping
from itertools import product

import numpy as np

Array = np.ndarray
Params = Mapping[str, Array]

STEP = 1e-30


def gradient(f: Callable[[Params], Array], params: Params) -> dict[str, Array]:
    """∂f/∂θ for every entry of every parameter, to rounding error."""
    result = {}
    for name, value in params.items():
        value = np.asarray(value, dtype=float)
        partials = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[index] += 1j * STEP
            partials[index] = np.imag(f({**params, name: moved})) / STEP
        result[name] = partials
    return result


def value(f: Callable[[Params], Array], params: Params) -> float:
    """f(θ) as a float."""
    return float(np.real(f(params)))


# Log-densities. `a` is a logit, `s` a log scale.


def softplus(a: Array) -> Array:
    return np.log(1 + np.exp(a))


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def bernoulli(b: Array, a: Array) -> Array:
    return b * a - softplus(a)


def categorical(logits: Array) -> Array:
    """log-probabilities along the last axis."""
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def normal(x: Array, loc: Array, scale: Array | float = 1.0) -> Array:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


# Expectations.


def bits(n: int) -> list[tuple[int, ...]]:
    """All states of n binary sites."""
    return list(product((0, 1), repeat=n))


def hermite(loc: Array, scale: Array, order: int = 60) -> tuple[Array, Array]:
    """Nodes z [order] and weights [order] with Σ w f(z) = E_{N(loc, scale)}[f]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return loc + scale * nodes, weights / np.sqrt(2 * np.pi)


def expectation(log_q: Array, f: Array) -> Array:
    """Σ_v exp(log_q[v]) f[v]."""
    return (np.exp(log_q) * f).sum()
