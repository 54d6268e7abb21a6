"""Where randomness enters: draws from the sites' own distributions, and the noise that estimators ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.primitives import Messenger

from ..core.estimator import Noise

Array = Any


class Randomness:
    """What `EstimatorELBO.randomness` is unless a test puts a source of its own there."""

    def value(self, name: str, fn: Any, key: Array, step: Array | None = None) -> tuple[Array, list[Any]]:
        """A draw from a site's own distribution, and its intermediates; ``step``: the number of that of a scan."""
        return fn.sample_with_intermediates(key)

    def noise(self, names: Sequence[str], label: str, noise: Noise, key: Array, step: Array | None = None) -> Array:
        """Noise that estimators asked for, ``[len(names), *shape]``; uniform noise lies strictly inside (0, 1)."""
        shape = (len(names), *noise.shape)
        if noise.law == "normal":
            return jax.random.normal(key, shape, dtype=float)
        if noise.law == "log gamma":
            return jax.random.loggamma(key, jax.lax.stop_gradient(noise.concentration), shape)
        if noise.law == "poisson":
            return jax.random.poisson(key, jax.lax.stop_gradient(noise.concentration), shape).astype(float)
        tiny = jnp.finfo(jnp.result_type(float)).tiny
        u = jax.random.uniform(key, shape, dtype=float, minval=tiny)
        return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)

    def uniform(self, key: Array, shape: tuple[int, ...], like: Array) -> Array:
        """Noise in [0, 1), by which values that were summed are drawn."""
        return jax.random.uniform(key, shape, dtype=like.dtype)


class Minibatch(Messenger):
    """Plates that subsample see the elements that ``indices(name, size, subsample_size)`` says."""

    def __init__(self, indices: Callable[[str, int, int], Any], fn: Any = None):
        self.indices = indices
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["value"] is None and msg["args"][1] not in (None, msg["args"][0]):
            msg["value"] = jnp.asarray(self.indices(msg["name"], *msg["args"]))
