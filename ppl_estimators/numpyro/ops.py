"""The core's array operations in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


@jax.custom_jvp
def _riding(value: Array, rider: Array) -> Array:
    return value


@_riding.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _riding(*primals), tangents[0] + tangents[1]


class JaxOps:
    """`jax.numpy`, which is the array API standard, and the few operations that the standard lacks."""

    stop_gradient = staticmethod(jax.lax.stop_gradient)
    riding = staticmethod(_riding)  # the value of the rider is computed nowhere
    sigmoid = staticmethod(jax.nn.sigmoid)
    softplus = staticmethod(jax.nn.softplus)
    softmax = staticmethod(jax.nn.softmax)
    log_softmax = staticmethod(jax.nn.log_softmax)

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def total(self, arrays: Sequence[Array]) -> Array:
        """Those of one shape are added first. Of the sum of each alone XLA would make another pass over whatever its
        elements are the sums of."""
        alike: dict[tuple[int, ...], list[Array]] = {}
        for x in arrays:
            alike.setdefault(x.shape, []).append(x)
        sums = [*alike.pop((), []), *(jnp.sum(reduce(jnp.add, several)) for several in alike.values())]
        return sums[0] if len(sums) == 1 else jnp.sum(jnp.stack(sums))

    def matmul(self, x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    def logsumexp(self, x: Array, axis: int) -> Array:
        return jax.scipy.special.logsumexp(x, axis=axis)

    def cumulative_logsumexp(self, x: Array) -> Array:
        return jax.lax.cumlogsumexp(x, axis=0)

    def fold(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        again = jax.checkpoint(partial(step, self))  # in the backward pass: cheaper than to fetch what was computed
        return jax.lax.scan(lambda total, xs: (again(total, *xs), None), start, along)[0]

    def folds(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        again = jax.checkpoint(partial(step, self))

        def one(total: Array, xs: Any) -> tuple[Array, Array]:
            after = again(total, *xs)
            return after, after

        return jnp.concatenate([start[None], jax.lax.scan(one, start, along)[1]])

    lgamma = staticmethod(jax.scipy.special.gammaln)
    digamma = staticmethod(jax.scipy.special.digamma)

    def polygamma(self, n: int, x: Array) -> Array:
        return jax.scipy.special.polygamma(n, x)

    def one_hot(self, index: Array, categories: int, like: Array) -> Array:
        return jax.nn.one_hot(index, categories, dtype=like.dtype)

    def take_last(self, x: Array, index: Array) -> Array:
        rank = max(x.ndim, index.ndim)
        x, index = (a.reshape(*(1,) * (rank - a.ndim), *a.shape) for a in (x, index))
        return jnp.take_along_axis(x, index, axis=-1)

    def solve(self, a: Array, b: Array) -> Array:
        return jnp.linalg.solve(a, b)

    def like(self, x: Array, template: Array) -> Array:
        return jnp.asarray(x, dtype=template.dtype)

    def memberships(self, sets: tuple[frozenset[int], ...], n: int, like: Array) -> Array:
        return jax.lax.optimization_barrier(self.like([[i in s for s in sets] for i in range(n)], like))

    def indices(self, n: int, like: Array) -> Array:
        return jnp.arange(n)

    def vjp(self, fn: Callable[[Array], Array], x: Array, cotangent: Array) -> Array:
        return jax.vjp(fn, x)[1](cotangent)[0]


OPS = JaxOps()
