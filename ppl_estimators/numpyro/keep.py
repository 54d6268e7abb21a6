"""Parameters, networks and state of estimators, as `numpyro.param` and `numpyro.mutable` sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro.primitives import mutable

from ..core.keep import Initial, Keeps, Kept, Network, mlp
from ..core.site import Site
from .ops import OPS

Array = Any


def state_name(site: str) -> str:
    return f"{site}$state"


def declare(site: Site, declared: Keeps, given: Mapping[str, Array]) -> Kept:
    """Declare what an estimator keeps at ``site``; return its present values."""
    parameters = {k: _param(f"{site.name}${k}", v) for k, v in declared.parameters.items()}
    networks = {k: _network(f"{site.name}${k}", v) for k, v in declared.networks.items()}
    initial = {k: jnp.full(v.shape, v.value, dtype=float) for k, v in declared.state.items()}
    state = mutable(state_name(site.name), initial) if initial else {}
    return Kept(parameters, networks, dict(state), given)


def _param(name: str, initial: Initial) -> Array:
    if not initial.spread:
        return numpyro.param(name, jnp.full(initial.shape, initial.value, dtype=float))
    return numpyro.param(
        name, lambda key: initial.value + initial.spread * jax.random.normal(key, initial.shape, dtype=float)
    )


def _network(name: str, network: Network) -> Callable[[Array], Array]:
    module = network.module
    if module is None:
        weights = {k: _param(f"{name}.{k}", v) for k, v in network.parameters().items()}
        return lambda x: mlp(OPS, weights, x)
    library = {base.__module__.split(".")[0] for base in type(module).__mro__}
    if "equinox" in library:
        from numpyro.contrib.module import eqx_module

        apply = eqx_module(name, module)
        return lambda x: jax.vmap(apply)(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], 1)
    if any(base.__module__.startswith("flax.nnx") for base in type(module).__mro__):
        from numpyro.contrib.module import nnx_module

        return nnx_module(name, module)
    if "flax" in library:
        from numpyro.contrib.module import flax_module

        return flax_module(name, module, input_shape=(1, network.features))
    raise TypeError(
        f"{name}: a network must be a flax (linen or nnx) or equinox module, got {type(module).__name__}. "
        "Leave network=None for the default."
    )
