"""Formulas of the distribution families that estimators know by name.

=============  =======================================  ===========================
family         value                                    natural parameters (logits)
=============  =======================================  ===========================
bernoulli      0 or 1, ``[*batch, *event]``             ``[*batch, *event]``
categorical    integer, ``[*batch, *event]``            ``[*batch, *event, C]``
onehot         one-hot, ``[*batch, *event]`` (C last)   ``[*batch, *event]`` (C last)
others         anything                                 none
=============  =======================================  ===========================

All log probabilities are elementwise: event dimensions are not summed here (the category axis is).

The continuous families (`CONTINUOUS`) and the counts (`COUNTS`) show their parameters by the names that both libraries
give them, in `Site.named`; ``other`` is whatever has no name here.
"""

from __future__ import annotations

import math

from .ops import Array, Ops

BERNOULLI, CATEGORICAL, ONEHOT, OTHER = "bernoulli", "categorical", "onehot", "other"
DISCRETE = (BERNOULLI, CATEGORICAL, ONEHOT)
RELAXABLE = (BERNOULLI, ONEHOT)  # with a log probability at relaxed values

NORMAL, LAPLACE, LOGISTIC, GUMBEL, CAUCHY = "normal", "laplace", "logistic", "gumbel", "cauchy"
EXPONENTIAL, GAMMA, BETA, DIRICHLET = "exponential", "gamma", "beta", "dirichlet"
LOCATION_SCALE = (NORMAL, LAPLACE, LOGISTIC, GUMBEL, CAUCHY)
CONTINUOUS = {
    **dict.fromkeys(LOCATION_SCALE, ("loc", "scale")),
    EXPONENTIAL: ("rate",),
    GAMMA: ("concentration", "rate"),
    BETA: ("concentration1", "concentration0"),
    DIRICHLET: ("concentration",),
}

POISSON, GEOMETRIC, BINOMIAL = "poisson", "geometric", "binomial"
COUNTS = {POISSON: ("rate",), GEOMETRIC: ("probs",), BINOMIAL: ("total_count", "probs")}

#: how errors call them
NAMES = {
    BERNOULLI: "Bernoulli",
    CATEGORICAL: "Categorical",
    ONEHOT: "OneHotCategorical",
    **{family: family.capitalize() for family in (*CONTINUOUS, *COUNTS)},
}


def finite(ops: Ops, logits: Array) -> Array:
    """Logits of impossible and certain values (±inf) as very large numbers: their probabilities are 0 and 1 as before,
    and 0 times a logit is 0."""
    return ops.clip(logits, -1e30, 1e30)


def log_prob(ops: Ops, family: str, logits: Array, value: Array) -> Array:
    """log q(value) elementwise; linear in a relaxed Bernoulli or one-hot value.

    Bernoulli is written ``b a - softplus(a)``: its derivative is ``b - sigmoid(a)`` at every ``a``, zero included.
    """
    if family == BERNOULLI:
        return value * logits - ops.softplus(logits)
    log_p = ops.log_softmax(logits)
    if family == CATEGORICAL:
        return ops.take_last(log_p, value[..., None])[..., 0]
    # 0 * (-inf) is 0: a category of probability zero that was not drawn costs nothing. All others keep their slope
    # in the value, at 0 too.
    impossible = (value == 0) & (log_p == -math.inf)
    return ops.sum(value * ops.where(impossible, ops.zeros_like(log_p), log_p), axis=-1)


def probabilities(ops: Ops, family: str, logits: Array) -> Array:
    return ops.sigmoid(logits) if family == BERNOULLI else ops.softmax(logits)


def possible(ops: Ops, p: Array, cost: Array) -> Array:
    """``cost``, and 0 where the value has no chance: there log q is -inf, and the cost with it."""
    return ops.where(p > 0, cost, ops.zeros_like(cost))


def divergence(ops: Ops, family: str, a: Array, b: Array) -> Array:
    """KL of logits ``a`` from logits ``b``, elementwise."""
    if family == BERNOULLI:
        return ops.sigmoid(a) * (a - b) + ops.softplus(b) - ops.softplus(a)
    p, log_p, log_r = ops.softmax(a), ops.log_softmax(a), ops.log_softmax(b)
    return ops.sum(possible(ops, p, p * (log_p - log_r)), axis=-1)


def mean_vjp(ops: Ops, family: str, logits: Array, v: Array) -> Array:
    """``(d p / d logits)^T v`` for probabilities p in the shape of ``v``: ``p (1 - p) v``, ``p ⊙ (v - p·v)``."""
    if family == BERNOULLI:
        return ops.sigmoid(logits) * ops.sigmoid(-logits) * v
    p = ops.softmax(logits)
    return p * (v - ops.sum(p * v, axis=-1, keepdims=True))


def score(ops: Ops, family: str, logits: Array, value: Array) -> Array:
    """d log q(value) / d logits, in the shape of the logits: ``b - p``, ``z - p``."""
    if family == CATEGORICAL:
        value = ops.one_hot(value, logits.shape[-1], logits)
    return value - probabilities(ops, family, logits)


def standard_score(ops: Ops, family: str, epsilon: Array) -> Array:
    """d log density / d ε of a location-scale family at location 0 and scale 1."""
    if family == NORMAL:
        return -epsilon
    if family == LAPLACE:
        return -ops.sign(epsilon)
    if family == LOGISTIC:
        return -ops.tanh(epsilon / 2)
    if family == GUMBEL:
        return ops.exp(-epsilon) - 1
    return -2 * epsilon / (1 + epsilon**2)  # Cauchy


def threshold(ops: Ops, family: str, logits: Array, u: Array) -> Array:
    """The hard value that uniform noise ``u`` gives: ``1[logit u + a > 0]``, ``argmax(log p - log(-log u))``."""
    if family == BERNOULLI:
        return ops.like(u > ops.sigmoid(-logits), logits)
    return encoded(ops, family, ops.argmax(gumbel(ops, logits, u), axis=-1), logits)


def category(ops: Ops, family: str, value: Array) -> Array:
    """Which category a value is, integers ``[...]``."""
    return ops.argmax(value, axis=-1) if family == ONEHOT else value


def encoded(ops: Ops, family: str, index: Array, logits: Array) -> Array:
    """Categories ``index [...]`` as values of the family: integers, or one-hot in the dtype of ``logits [..., C]``."""
    return ops.one_hot(index, logits.shape[-1], logits) if family == ONEHOT else index


def gumbel(ops: Ops, logits: Array, u: Array) -> Array:
    """Gumbel-perturbed *normalised* log probabilities (the conditional relaxation needs the normalisation)."""
    return ops.log_softmax(logits) - ops.log(-ops.log(u))
