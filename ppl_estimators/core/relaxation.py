"""Continuous relaxations of discrete draws, and the exact conditional relaxation given the hard value.

z = g(u, a) with b = H(z) distributed as the site; z̃ = g̃(v, b, a) distributed as z given b, v independent of b.
`u` and `v` are uniform, in the shape of the logits. Both are differentiable in the logits ``a``.
"""

from __future__ import annotations

from .errors import EstimatorError, site_error
from .families import BERNOULLI, CATEGORICAL, gumbel, probabilities
from .ops import Array, Ops


def unconditional(ops: Ops, family: str, a: Array, u: Array) -> Array:
    """Bernoulli: z = a + logit u.  Categorical: z = log p - log(-log u), p normalised."""
    if family == BERNOULLI:
        return a + ops.log(u) - ops.log1p(-u)
    return gumbel(ops, a, u)


def conditional(ops: Ops, family: str, a: Array, v: Array, b: Array) -> Array:
    """z given the hard value b, in a form that stays finite at |a| = 30 in float32.

    Bernoulli: z̃ = ± log1p( v / ((1 - v) σ(∓a)) ), upper sign for b = 1.
    Categorical, E = -log v: z̃_b = -log E_b, z̃_i = -log(E_i / p_i + E_b).  [Maddison et al.; REBAR, appendix]
    """
    if family == BERNOULLI:
        odds = ops.log(v) - ops.log1p(-v)
        sign = 2 * b - 1
        # log1p(exp(odds - log σ(-sign a))) = softplus(odds + softplus(sign a))
        return sign * ops.softplus(odds + ops.softplus(sign * a))
    if family == CATEGORICAL:
        b = ops.one_hot(b, a.shape[-1], a)
    log_e = ops.log(-ops.log(v))
    log_e_b = ops.sum(b * log_e, axis=-1, keepdims=True)
    others = log_e - ops.log_softmax(a)
    pair = ops.stack([others, ops.broadcast_to(log_e_b, others.shape)], axis=-1)
    return ops.where(b > 0, -log_e_b, -ops.logsumexp(pair, axis=-1))


def soften(ops: Ops, family: str, z: Array, temperature: Array) -> Array:
    """σ(z / λ) or softmax(z / λ): a relaxed value in the shape of the logits."""
    return ops.sigmoid(z / temperature) if family == BERNOULLI else ops.softmax(z / temperature)


def downstream(ops: Ops, family: str, a: Array, u: Array | None, temperature: Array | None) -> Array:
    """The value of a discrete site below a relaxed one: relaxed at ``temperature`` with noise ``u``, or without one
    its probabilities."""
    if temperature is None:
        return probabilities(ops, family, a)
    return soften(ops, family, unconditional(ops, family, a, u), temperature)


def unknown(site: str, side: str, distribution: str) -> EstimatorError:
    """There is no log probability at relaxed values."""
    return site_error(
        site,
        f"its {side} distribution {distribution} has no log probability at relaxed values",
        "Use a Bernoulli or one-hot categorical there, RELAX(), or Reinforce(LeaveOneOut()) with several particles.",
    )
