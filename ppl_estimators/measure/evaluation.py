"""`EstimatorELBO.evaluate`: a bound on the log-likelihood from many particles' weights, and whether to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Evaluation:
    """Bounds of many particles, summed over all data.

    ``value``: the importance-weighted bound Σ_e log 1/K Σ_k w_{k,e} in nats, e an element of the plates that hold every
    site (a datum), w_k = p(x, z_k) / q(z_k). ``standard_error``: of ``value``, over the draws. ``elbo``: Σ_e 1/K Σ_k
    log w_{k,e}. ``each``: ``value`` by element, ``[elements]``, those of all batches in turn. ``pareto_k``: the tail
    index of each element's weights, ``[elements]``; above 0.7 more particles help little, and ``standard_error`` is too
    small: the guide misses mass of the posterior. NaN with fewer than 25 particles. ``particles``: K.
    """

    value: float
    standard_error: float
    elbo: float
    each: Array = field(repr=False)
    pareto_k: Array = field(repr=False)
    particles: int


def evaluation(batches: Iterable[tuple[Array, float]]) -> Evaluation:
    """From the log weights ``[K, ...]`` of each batch and what multiplies it, the N/B of its plates."""
    value = variance = elbo = 0.0
    each, tails, count = [], [], 0
    for log_w, scale in batches:
        count = len(log_w)
        log_w = np.asarray(log_w, float).reshape(count, -1)
        bound = np.logaddexp.reduce(log_w, axis=0) - math.log(count)
        ratio = np.exp(log_w - bound)  # each weight over their mean
        value += scale * bound.sum()
        variance += scale**2 * (ratio.var(axis=0, ddof=1) / count).sum()
        elbo += scale * log_w.mean(axis=0).sum()
        each.append(bound)
        tails.append([pareto_k(x) for x in log_w.T])
    if not each:
        raise ValueError("evaluate(batches=...) got no batch.")
    return Evaluation(
        float(value), math.sqrt(variance), float(elbo), np.concatenate(each), np.concatenate(tails), count
    )


def arguments(args: tuple[Any, ...], batches: Iterable[Any] | None) -> Iterator[tuple[Any, ...]]:
    """What model and guide are called with, batch after batch: each is a tuple or list of arguments, or the first one
    of all."""
    if batches is None:
        yield args
        return
    for batch in batches:
        yield (*batch, *args) if isinstance(batch, (tuple, list)) else (batch, *args)


def chunks(total: int, size: int) -> Sequence[int]:
    """``total`` in parts of at most ``size``, alike but for the last."""
    if total < 2 or size < 1:
        raise ValueError(f"evaluate needs num_particles of 2 or more and a chunk of 1 or more, got {total} and {size}.")
    return [size] * (total // size) + [total % size] * (total % size > 0)


def pareto_k(log_w: Array) -> float:
    """The shape of the generalised Pareto distribution of the largest weights, ``log_w [K]``.

    The tail is the min(K/5, 3 √K) largest; the fit is that of Zhang & Stephens (2009), drawn towards ½ by ten
    observations' worth as in Vehtari, Simpson, Gelman, Yao & Gabry (2024), arXiv:1507.02646.
    """
    k = len(log_w)
    tail = math.ceil(min(k / 5, 3 * math.sqrt(k)))
    w = np.sort(np.exp(log_w - log_w.max()))
    x = w[-tail:] - w[-tail - 1] if tail >= 5 else np.zeros(1)
    if x[-1] <= 0:  # too few, or all alike
        return math.nan if tail < 5 else -math.inf
    x = x[x > 0]
    n = len(x)
    grid = 30 + int(math.sqrt(n))
    quartile = x[max(int(n / 4 + 0.5) - 1, 0)]
    theta = 1 / x[-1] + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile)
    shape = np.log1p(-theta[:, None] * x).mean(axis=1)
    profile = n * (np.log(-theta / shape) - shape - 1)
    weight = np.exp(profile - np.logaddexp.reduce(profile))
    found = np.log1p(-(weight @ theta) * x).mean()
    return float((n * found + 10 * 0.5) / (n + 10))
