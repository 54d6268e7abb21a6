"""Gradient draws of any ELBO of NumPyro, ours or stock, at a point of the parameters; nothing is changed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from numpyro.distributions import Distribution
from numpyro.infer import SVI
from numpyro.optim import SGD
from numpyro.primitives import Messenger

from ..core.errors import EstimatorWarning
from ..core.plan import Plan
from ..measure.gradients import (
    Chunks,
    GradientDraws,
    Progress,
    check_names,
    check_program,
    check_shape,
    check_sites,
    kept_by_estimators,
)
from .elbo import EstimatorELBO
from .exact import named_leaves
from .randomness import Minibatch
from .run import key_of

Array = Any

#: numbers of all draws of a chunk together: parameters × draws × parts
CHUNK_NUMBERS = 2**22
CHUNK_DRAWS = 256


class Gradients(GradientDraws):
    """Draws of the gradient of ``elbo``, in the unconstrained space that `SVI` optimises.

    ``params``: values by name, in the parameters' own (constrained) space, as from ``svi.get_params(state)``; those
    left out are as `SVI.init` with ``seed`` makes them. ``mutable_state``: of the program and of estimators, as in
    ``svi_state.mutable_state``; by default the initial one. What estimators train ("z$...") is held at its value and
    left out of the gradients.

    A draw is a function of ``(seed, index)``. Nothing is changed: no parameter, no state, no random state.

    ``sites``: the latent sites of the guide in order; ``names``: the parameters (the arrays of a network's tree as
    ``name[...][...]``); ``shapes``: theirs; ``subsampled``: the plates of which a draw sees some elements.

    Raises `EstimatorError` for unknown parameters, a guide without latent sites, a program without parameters.
    """

    def __init__(
        self,
        elbo: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        mutable_state: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        check_program(elbo, model, guide)
        self.elbo, self.model, self.guide = elbo, model, guide
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        look = _Look()
        with look:
            svi = SVI(model, lambda *a, **k: look.guide(guide, a, k), SGD(0.0), elbo)
            state = svi.init(jax.random.key(seed), *self.args, **self.kwargs)
        self.sites, self.subsampled = look.latents, look.subsampled
        unconstrained = svi.optim.get_params(state.optim_state)
        check_sites(self.sites, unconstrained)
        self._constrain = svi.constrain_fn
        if params:
            check_names(params, unconstrained)
            constrained = self._constrain(unconstrained)
            params = {n: v if isinstance(v, dict) else jnp.asarray(v) for n, v in params.items()}
            present, leaves = named_leaves({n: constrained[n] for n in params}), named_leaves(params)
            check_names(leaves, present)
            for name, value in leaves.items():
                check_shape(name, value.shape, present[name].shape)
            given = {
                n: jax.tree.map(lambda v, x: jnp.asarray(v, x.dtype), p, constrained[n]) for n, p in params.items()
            }
            inverse = svi.constrain_fn.args[0]
            unconstrained = {
                **unconstrained,
                **{n: inverse[n].inv(v) if n in inverse else v for n, v in given.items()},
            }
        self._state = {**(state.mutable_state or {}), **(mutable_state or {})}
        own = {n: v for n, v in unconstrained.items() if not kept_by_estimators(n, self.sites)}
        self._kept = {n: v for n, v in unconstrained.items() if n not in own}
        self._point = own
        self.shapes = {n: v.shape for n, v in named_leaves(own).items()}
        self.names = list(self.shapes)
        self.size = sum(int(np.prod(s)) for s in self.shapes.values())
        self._compiled: dict[Any, Any] = {}

    # ---- one gradient -------------------------------------------------------------------------------------------

    def _loss(self, params: Mapping[str, Array], key: Array, guide: Callable[..., Any]) -> Array:
        constrained = self._constrain({**params, **self._kept})
        given = (self.model, guide, *self.args)
        if self._state:
            constrained = {**constrained, **jax.lax.stop_gradient(self._state)}
            return self.elbo.loss_with_mutable_state(key, constrained, *given, **self.kwargs)["loss"]
        return self.elbo.loss(key, constrained, *given, **self.kwargs)

    def value_and_gradient(self, params: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        """Traceable: the loss and its gradient at unconstrained ``params``."""
        return jax.value_and_grad(self._loss)(params, key, self.guide)

    def _with_parts(self, params: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        """The loss, and gradients ``[1 + sites, ...]``: explicit, then one part for each site."""

        def gated(moving: tuple[Mapping[str, Array], Array], gates: Array) -> Array:
            params, witness = moving
            open_ = dict(zip(self.sites, gates, strict=True))
            return self._loss(params, key, lambda *a, **k: _through_gates(open_, witness, self.guide, a, k))

        count = len(self.sites)
        prefixes = jnp.tril(jnp.ones((count + 1, count)), -1)
        moving = (params, jnp.zeros(()))
        losses, (upto, _) = jax.lax.map(lambda g: jax.value_and_grad(gated)(moving, g), prefixes)
        parts = jax.tree.map(lambda h: jnp.concatenate([h[:1], h[1:] - h[:-1]]), upto)
        return losses[0], parts

    def _twice(self, params: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        """Two losses and gradients, ``[2, ...]``, of one minibatch."""
        which, *keys = jax.random.split(key, 3)

        def elements(plate: str, size: int, some: int) -> Array:
            return jax.random.permutation(key_of(which, f"plate {plate}"), size)[:some]

        with Minibatch(elements):
            return jax.lax.map(partial(self.value_and_gradient, params), jnp.stack(keys))

    def moved(self, away: Mapping[str, np.ndarray]) -> Gradients:
        """The same ``away`` from here, in the unconstrained space, by name; nothing is compiled again."""
        other = copy.copy(self)
        other._point = {
            name: jax.tree_util.tree_map_with_path(
                lambda path, x, name=name: x + jnp.asarray(away[name + jax.tree_util.keystr(path)], x.dtype), value
            )
            for name, value in self._point.items()
        }
        return other

    # ---- draws --------------------------------------------------------------------------------------------------

    def draw(self, seed: int = 0, index: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradient by parameter."""
        loss, gradient = self._many(1, "total")(self._point, self._keys(seed, index, 1))
        return float(loss[0]), {n: g[0] for n, g in named_leaves(gradient).items()}

    @property
    def has_parts(self) -> bool:
        return True

    def chunk(self, kind: str = "total") -> int:
        """How many draws are held at once."""
        copies = {"total": 1, "parts": 2 * len(self.sites) + 2, "pairs": 4}[kind]
        return int(np.clip(CHUNK_NUMBERS // max(self.size * copies, 1), 1, CHUNK_DRAWS))

    def _chunks(self, kind: str, num_draws: int, seed: int, progress: Progress | None = None, start: int = 0) -> Chunks:
        chunk = min(self.chunk(kind), num_draws)
        done = 0
        while done < num_draws:
            losses, gradients = self._many(chunk, kind)(self._point, self._keys(seed, start + done, chunk))
            wanted = min(chunk, num_draws - done)
            done += wanted
            yield np.asarray(losses)[:wanted], {n: g[:wanted] for n, g in named_leaves(gradients).items()}
            if progress is not None:
                progress(done)

    @staticmethod
    def _keys(seed: int, start: int, count: int) -> Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(start, start + count))

    def _many(self, count: int, kind: str) -> Any:
        """Compiled for ``count`` draws; one draw needs no batching."""
        if (count, kind) not in self._compiled:
            one = {"total": self.value_and_gradient, "parts": self._with_parts, "pairs": self._twice}[kind]

            def many(params: Mapping[str, Array], keys: Array) -> Any:
                if count == 1:
                    return jax.tree.map(lambda x: x[None], one(params, keys[0]))
                return jax.vmap(one, (None, 0))(params, keys)

            self._compiled[count, kind] = jax.jit(many)
        return self._compiled[count, kind]

    def plan(self) -> Plan | None:
        """Which estimator runs where; None for a stock ELBO."""
        if not isinstance(self.elbo, EstimatorELBO):
            return None
        params = {**self._constrain({**self._point, **self._kept}), **self._state}
        return plan_of(self.elbo, params, self.model, self.guide, self.args, self.kwargs)

    def seconds(self, steps: int) -> list[float]:
        """The time of each of some steps: loss and gradient, no optimiser. The first of a fresh object compiles."""
        many, times = self._many(1, "total"), []
        for index in range(steps):
            keys = jax.block_until_ready(self._keys(0, index, 1))
            start = time.perf_counter()
            jax.block_until_ready(many(self._point, keys))
            times.append(time.perf_counter() - start)
        return times


def plan_of(elbo: EstimatorELBO, params: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Plan:
    """What a step would do, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        return elbo.step(jax.random.key(0), params, model, guide, args, kwargs).library.plan()


class _Look(Messenger):
    """Notes the latent sites of the guide, and the plates that subsample."""

    def __init__(self) -> None:
        self.latents: list[str] = []
        self.subsampled: list[str] = []
        self.inside = False
        super().__init__()

    def guide(self, guide: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside = True
        try:
            return guide(*args, **kwargs)
        finally:
            self.inside = False

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["name"] not in self.subsampled and len(msg["value"]) < msg["args"][0]:
            self.subsampled.append(msg["name"])
        if self.inside and msg["type"] == "sample" and not msg["is_observed"] and msg["name"] not in self.latents:
            self.latents.append(msg["name"])


class _Gates(Messenger):
    """Lets gradients into the distributions of the guide's sites only where their gate is open."""

    def __init__(self, gates: Mapping[str, Array], witness: Array):
        self.gates, self.witness = gates, witness
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.gates and isinstance(msg["fn"], Distribution):
            gate = self.gates[msg["name"]]
            msg["fn"] = jax.tree.map(lambda x: _gated(x, gate, self.witness), msg["fn"])


def _through_gates(
    gates: Mapping[str, Array], witness: Array, guide: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    with _Gates(gates, witness):
        return guide(*args, **kwargs)


def _gated(x: Any, gate: Array, witness: Array) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x
    return _gate(x, gate, witness)


@jax.custom_jvp
def _gate(x: Array, gate: Array, witness: Array) -> Array:
    """``x``, whose slope passes if the gate is open, or if the witness stands still: an estimator takes slopes of the
    cost while it runs, in values of its own, and those pass ungated. The whole gradient moves the witness too."""
    return x


@partial(_gate.defjvp, symbolic_zeros=True)
def _gate_slope(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    x, gate, witness = primals
    moved, _, whole = tangents
    if isinstance(moved, SymbolicZero):
        like: Any = moved.aval
        moved = jnp.zeros(like.shape, like.dtype)
    elif not isinstance(whole, SymbolicZero):
        moved = jnp.where(gate > 0, moved, jnp.zeros_like(moved))
    return _gate(x, gate, witness), moved
