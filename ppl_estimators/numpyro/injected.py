"""One loss and gradient with noise that the caller chooses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from ..core.errors import EstimatorError
from ..measure.choices import rule_of
from ..measure.chosen import NODES, Given, Twin
from .exact import LAWS, named_leaves, point
from .randomness import Minibatch, Randomness

Array = Any


class _Chosen(Randomness):
    """Draws and noise as they are given."""

    def __init__(self, given: Given):
        self.given = given

    def value(self, name: str, fn: Any, key: Array, step: Array | None = None) -> tuple[Array, list[Any]]:
        rule = rule_of(LAWS, name, fn, NODES)
        return rule.value(fn, jnp.asarray(self.given.choices(name, tuple(rule.elements), rule.size))), []

    def noise(self, names: Sequence[str], label: str, noise: Any, key: Array, step: Array | None = None) -> Array:
        return jnp.stack([jnp.asarray(self.given.noise(name, label, noise), float) for name in names])


def loss_and_gradient(twin: Twin, params: Mapping[str, Any], given: Given) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient at the constrained ``params``."""

    elbo = copy.copy(twin.elbo)
    elbo.randomness = _Chosen(given)
    model, guide = (Minibatch(given.minibatch, fn) for fn in (twin.model, twin.guide))
    held, constraint, _ = point(model, guide, twin.args, twin.kwargs)
    if held.keys() != params.keys():
        raise EstimatorError(
            f"the twins have different parameters: {sorted(params.keys() - held.keys())} only in Pyro, "
            f"{sorted(held.keys() - params.keys())} only in NumPyro."
        )
    held, constraint, _ = point(model, guide, twin.args, twin.kwargs, params)
    transforms = {n: biject_to(c) for n, c in constraint.items()}

    def loss(u: Mapping[str, Any]) -> Array:
        constrained = {n: jax.tree.map(transforms[n], v) for n, v in u.items()}
        return elbo.loss(jax.random.key(0), constrained, model, guide, *twin.args, **twin.kwargs)

    value, gradient = jax.value_and_grad(loss)({n: jax.tree.map(transforms[n].inv, v) for n, v in held.items()})
    return float(value), named_leaves(gradient)
