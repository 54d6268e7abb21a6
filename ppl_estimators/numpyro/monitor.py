"""What `GradientMonitor` needs of NumPyro: moments of gradients, carried in the optimiser's state."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import Delta, Distribution
from numpyro.infer import SVI
from numpyro.optim import Minimize, _NumPyroOptim
from numpyro.primitives import Messenger

from ..core.errors import EstimatorError
from ..measure.gradients import check_sites, kept_by_estimators
from ..measure.watch import Moment, Snapshot, Watcher, flat_sites, place, through_values
from .distributions import unwrapped
from .elbo import EstimatorELBO
from .gradients import plan_of
from .run import Keys, Program, execute, terms_of

Array = Any

_PROBE = re.compile(r"(.*)\$monitor\.\d+")


def watch(svi: Any, monitor: Watcher) -> tuple[Any, None]:
    """A copy of ``svi`` whose steps are watched."""
    if not isinstance(svi, SVI):
        raise EstimatorError(f"GradientMonitor.watch takes an SVI, got {svi!r}.")
    if isinstance(svi.optim, Minimize):
        raise EstimatorError(
            "GradientMonitor: Minimize evaluates the loss many times a step. Use a stochastic optimiser."
        )
    watched = copy.copy(svi)
    watched.__class__ = type(f"Watched{type(svi).__name__}", (_Watched, type(svi)), {})
    watched.monitor, watched.watched = monitor, svi
    watched.guide = partial(_probed, svi.guide)
    watched.optim = _Optim(svi.optim, monitor)
    return watched, None


def arrived() -> None:
    """Waits for looks that are on their way from a compiled step."""
    jax.effects_barrier()


class State(NamedTuple):
    """The optimiser's state, and the running averages beside it."""

    inner: Any
    step: Array
    skipped: Array
    loss: Array  # average
    means: Any  # {"parameter" | "site": {name: average of g}}
    squares: Any  # {"parameter" | "site": {name: average of ‖g‖²}}


class _Watched:
    """Mixed into the class of the user's `SVI`."""

    monitor: Watcher
    watched: SVI
    # of the `SVI`
    model: Any
    guide: Any
    optim: Any
    loss: Any
    static_kwargs: Any
    constrain_fn: Any
    get_params: Any

    def init(self, rng_key: Array, *args: Any, **kwargs: Any) -> Any:
        given = {**{k: v for k, v in kwargs.items() if k != "init_params"}, **self.static_kwargs}
        if not _traced((rng_key, args, given)):
            self.monitor.begin(self.model, self.watched.guide, args, given)
        state = super().init(rng_key, *args, **kwargs)  # type: ignore[misc]
        kwargs = given
        check_sites(["some"], self.optim.own(state.optim_state.inner))
        params = {**self.get_params(state), **(state.mutable_state or {})}
        if not _traced((params, args, kwargs)):
            state = state._replace(optim_state=self._without_constants(state, args, kwargs))
            for site, terms in _flat_sites(self.loss, self.model, self.guide, params, args, kwargs).items():
                self.monitor.flat(site, terms)
        return state

    def _without_constants(self, state: Any, args: Any, kwargs: Any) -> State:
        """No probes where a distribution's array is no function of the parameters."""
        own, key = self.optim.inner.get_params(state.optim_state.inner), jax.random.key(0)

        def arrays(own: Any) -> dict[str, Array]:
            params = {**self.constrain_fn(own), **(state.mutable_state or {})}
            traces = execute(Program(None, self.guide, args, kwargs, params, key), Keys(key), draw=_plain)
            return {name: x for n, m in traces.latents().items() for name, x in _arrays(n, m["fn"]).items()}

        along = jax.tree.map(lambda x: jax.random.normal(key, jnp.shape(x), x.dtype), own)
        _, slopes = jax.jvp(arrays, (own,), (along,))
        live = {n: v for n, v in self.optim.probes.items() if bool(jnp.any(slopes[n] != 0))}
        return self.optim.init({**own, **live})


class _Optim(_NumPyroOptim):
    """The user's optimiser, which keeps moments of what it is given; probes never reach it."""

    def __init__(self, inner: _NumPyroOptim, monitor: Watcher):
        self.inner, self.monitor, self.biased = inner, monitor, ""

    def init(self, params: Mapping[str, Any]) -> State:
        own = {n: v for n, v in params.items() if not _PROBE.fullmatch(n)}
        self.probes = {n: v for n, v in params.items() if n not in own}
        self.sites = list(dict.fromkeys(map(_probed_site, self.probes)))
        inner = self.inner.init(own)
        means = jax.tree.map(jnp.zeros_like, self._vectors({**own, **self.probes}))
        squares = {kind: {n: jnp.zeros(()) for n in named} for kind, named in means.items()}
        zero = jnp.zeros((), int)
        return State(inner, zero, zero, jnp.zeros(()), means, squares)

    def get_params(self, state: State) -> Any:
        if not isinstance(state, State):
            raise EstimatorError(
                "GradientMonitor: a state of another SVI. Start with the init or run of the watched one."
            )
        return self.inner.get_params(state.inner)

    def own(self, inner: Any) -> dict[str, Any]:
        """Parameters of the program, without those that estimators keep."""
        return {n: v for n, v in self.inner.get_params(inner).items() if not kept_by_estimators(n, self.sites)}

    def _vectors(self, gradient: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """By kind and name: the gradient of each parameter, the slopes at each site."""
        sites: dict[str, list[Any]] = {n: [] for n in self.sites}
        for name in self.probes:
            sites[_probed_site(name)].append(gradient[name])
        own = {n: g for n, g in gradient.items() if not kept_by_estimators(n, self.sites)}
        return {"parameter": own, "site": sites}

    def eval_and_update(self, fn: Callable[..., Any], state: State, forward_mode_differentiation: bool = False) -> Any:
        out, aux, gradient = self._evaluate(fn, state, forward_mode_differentiation)
        return (out, aux), self._look(self._step(state, gradient, out, self.inner.update))

    def eval_and_stable_update(
        self, fn: Callable[..., Any], state: State, forward_mode_differentiation: bool = False
    ) -> Any:
        out, aux, gradient = self._evaluate(fn, state, forward_mode_differentiation)
        ok = jnp.isfinite(out) & jnp.isfinite(_square({n: g for n, g in gradient.items() if n not in self.probes}))

        def update(g: Any, inner: Any, value: Array) -> Any:
            return jax.lax.cond(ok, lambda: self.inner.update(g, inner, value=value), lambda: inner)

        return (jnp.where(ok, out, jnp.nan), aux), self._look(self._step(state, gradient, out, update))

    def _evaluate(self, fn: Callable[..., Any], state: State, forward: bool) -> Any:
        params = {**self.get_params(state), **self.probes}
        if forward:
            gradient, (out, aux) = jax.jacfwd(lambda x: (lambda y: (y[0], y))(fn(x)), has_aux=True)(params)
            return out, aux, gradient
        (out, aux), gradient = jax.value_and_grad(fn, has_aux=True)(params)
        return out, aux, gradient

    def _step(self, state: State, gradient: Mapping[str, Any], out: Array, update: Callable[..., Any]) -> State:
        inner = update({n: g for n, g in gradient.items() if n not in self.probes}, state.inner, value=out)
        average = partial(_averaged, self.monitor.decay)
        vectors = self._vectors(gradient)
        totals = {kind: {n: _square(g) for n, g in named.items()} for kind, named in vectors.items()}
        ok = jnp.isfinite(sum(jax.tree.leaves(totals)) + out)
        keep = partial(jnp.where, ok)
        means = jax.tree.map(lambda m, g: keep(average(m, g), m), state.means, vectors)
        squares = jax.tree.map(lambda s, t: keep(average(s, t), s), state.squares, totals)
        loss = keep(average(state.loss, out), state.loss)
        return State(inner, state.step + 1, state.skipped + ~ok, loss, means, squares)

    def _look(self, state: State) -> State:
        def tell() -> None:
            moments = {kind: {n: _square(m) for n, m in named.items()} for kind, named in state.means.items()}
            figures = (state.step, state.skipped, state.loss, moments, state.squares)
            jax.debug.callback(self._receive, figures)

        jax.lax.cond(state.step % self.monitor.every == 0, tell, lambda: None)
        return state

    def _receive(self, figures: Any) -> None:
        step, skipped, loss, moments, squares = jax.tree.map(lambda x: np.asarray(x).item(), figures)
        count = step - skipped
        found = [Moment(kind, n, count, moments[kind][n], squares[kind][n]) for kind in moments for n in moments[kind]]
        whole = 1 - self.monitor.decay**count
        self.monitor.receive(Snapshot(step, skipped, loss / whole if whole else float("nan"), tuple(found)))


class _Probes(Messenger):
    """Adds a parameter of zeros to each array of the distributions of latent sites: its gradient is the slope there."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or not isinstance(msg["fn"], Distribution):
            return
        leaves, tree = jax.tree.flatten(msg["fn"])
        for name, x in _arrays(msg["name"], msg["fn"]).items():
            probe = numpyro.param(name, jnp.zeros(jnp.shape(x), jnp.result_type(x)))
            leaves[int(name.rpartition(".")[2])] = x + probe
        msg["fn"] = jax.tree.unflatten(tree, leaves)


def _arrays(site: str, fn: Any) -> dict[str, Array]:
    """The floating arrays of a distribution, by the names of their probes."""
    leaves = enumerate(jax.tree.leaves(fn))
    return {f"{site}$monitor.{i}": x for i, x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)}


def _probed_site(name: str) -> str:
    """The site of a probe."""
    return name.rpartition("$monitor.")[0]


def _probed(guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Probes():
        return guide(*args, **kwargs)


def _flat_sites(elbo: Any, model: Any, guide: Any, params: Any, args: Any, kwargs: Any) -> dict[str, list[str]]:
    """See `watch.flat_sites`."""
    pathwise = None
    if isinstance(elbo, EstimatorELBO):
        pathwise = through_values(plan_of(elbo, params, model, guide, args, kwargs))
    key = jax.random.key(0)

    def run(values: Mapping[str, Array]) -> Any:
        def draw(msg: Any) -> Any:
            return values[msg["name"]] if msg["name"] in values else _plain(msg)

        return execute(Program(model, guide, args, kwargs, params, key), Keys(key), draw=draw)

    try:
        traces = run({})
    except EstimatorError:  # the loss will say it
        return {}
    latents = {n: m for n, m in traces.latents().items() if not isinstance(unwrapped(m["fn"]), Delta)}
    drawn = {n: m["value"] for n, m in latents.items()}

    def probe(name: str, i: int) -> dict[str, tuple[float, float]]:
        def heights(value: Array) -> dict[str, Array]:
            return {place(t): jnp.sum(t.value) for t in terms_of(run({**drawn, name: value}))}

        keys = jax.random.split(jax.random.fold_in(key, i))
        value = latents[name]["fn"].sample(keys[0])
        height, slope = jax.jvp(heights, (value,), (jax.random.normal(keys[1], value.shape, value.dtype),))
        return {t: (float(height[t]), float(slope[t])) for t in height}

    return flat_sites(pathwise, latents, probe)


def _plain(msg: Any) -> Any:
    return msg["fn"].sample(msg["kwargs"]["rng_key"])


def _traced(tree: Any) -> bool:
    """Under jit: there are no values to look at."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _averaged(decay: float, mean: Array, new: Array) -> Array:
    return decay * mean + (1 - decay) * new


def _square(tree: Any) -> Array:
    return sum((jnp.sum(x * x) for x in jax.tree.leaves(tree)), jnp.zeros(()))
