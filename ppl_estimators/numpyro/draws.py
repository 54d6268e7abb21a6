"""Many gradients of an ELBO at one point, as running sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from ..testing.power import Sums
from .exact import named_leaves, point

_SIDE_BY_SIDE = 64  # draws in one vmap
_ROUNDS = 256  # of them in one call, so that sums in single precision stay good


class Draws:
    """Gradients of any NumPyro ELBO, one key a draw, compiled once."""

    def __init__(
        self,
        elbo: Any,
        model: Any,
        guide: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        params: Any,
        seed: int,
    ):
        self.seed = seed
        held, constraint, _ = point(model, guide, args, kwargs, params)
        transforms = {n: biject_to(c) for n, c in constraint.items()}
        state = {n: v for n, v in (params or {}).items() if n not in held}
        self.unconstrained = {n: jax.tree.map(transforms[n].inv, v) for n, v in held.items()}

        def loss(u: Mapping[str, Any], key: Any) -> Any:
            constrained = {n: jax.tree.map(transforms[n], v) for n, v in u.items()}
            return elbo.loss(key, {**state, **constrained}, model, guide, *args, **kwargs)

        self.gradient = jax.grad(loss)
        self.key = jax.random.key(seed)
        self._compiled: Any = None

    def one(self) -> dict[str, np.ndarray]:
        return named_leaves(jax.jit(self.gradient)(self.unconstrained, self.key))

    def sums(self, reference: Mapping[str, np.ndarray], first: int, number: int) -> Sums:
        """Sums of gradient − reference, entries in the order of ``reference``, over draws first, first + 1, ..."""
        if self._compiled is None:
            self._compiled = jax.jit(self._summing(reference))
        rounds = -(-number // _SIDE_BY_SIDE)
        found = None
        for start in range(0, rounds, _ROUNDS):
            here = min(_ROUNDS, rounds - start)
            sums = self._compiled(self.unconstrained, first + start * _SIDE_BY_SIDE, here)
            part = Sums(here * _SIDE_BY_SIDE, *(np.asarray(x, float) for x in sums))
            found = part if found is None else found + part
        assert found is not None
        return found

    def _summing(self, reference: Mapping[str, np.ndarray]) -> Any:
        target = jnp.concatenate([jnp.ravel(jnp.asarray(r, float)) for r in reference.values()])

        def difference(u: Any, index: Any) -> Any:
            gradient = self.gradient(u, jax.random.fold_in(self.key, index))
            leaves = {
                name + jax.tree_util.keystr(path): leaf
                for name, tree in gradient.items()
                for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
            }
            return jnp.concatenate([jnp.ravel(leaves[n]) for n in reference]) - target

        def sums(u: Any, first: Any, rounds: Any) -> Any:
            def add(i: Any, carry: Any) -> Any:
                d = jax.vmap(difference, (None, 0))(u, first + i * _SIDE_BY_SIDE + jnp.arange(_SIDE_BY_SIDE))
                finite = jnp.isfinite(d)
                d = jnp.where(finite, d, 0.0)
                return carry[0] + d.sum(0), carry[1] + (d**2).sum(0), carry[2] + (~finite).sum(0)

            return jax.lax.fori_loop(0, rounds, add, (target * 0.0, target * 0.0, jnp.zeros(target.shape, int)))

        return sums
