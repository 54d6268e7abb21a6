"""Nodes and weights that integrate over one continuous element."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

Rule = tuple[np.ndarray, np.ndarray]


@cache
def hermite(n: int) -> Rule:
    """Nodes ``[n]`` and log weights ``[n]`` of the standard normal: exact for polynomials of degree 2n − 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    keep = weights > 0  # the outermost underflow where n is large
    return nodes[keep], np.log(weights[keep]) - 0.5 * math.log(2 * math.pi)


@cache
def unit(n: int) -> Rule:
    """Nodes ``[n]`` and log weights ``[n]`` of the uniform on (0, 1), n rounded up to an even number.

    Gauss-Legendre on either half, graded by t ↦ t³ (10 − 15 t + 6 t²) towards 0, ½ and 1, where quantile functions
    are singular or have a kink.
    """
    x, w = np.polynomial.legendre.leggauss((n + 1) // 2)
    t, w = (x + 1) / 2, w / 2
    half, slope = t**3 * (10 - 15 * t + 6 * t**2) / 2, 15 * t**2 * (1 - t) ** 2 * w
    return np.concatenate([half, half + 0.5]), np.log(np.concatenate([slope, slope]))
