"""The exact loss and its gradient of a small NumPyro program, by mapping one compiled run over every state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import ComposeTransform
from numpyro.primitives import Messenger

from ..core import families
from ..core.enumeration import Unplaced
from ..core.errors import EstimatorError, site_error
from ..core.site import Term
from ..measure import quadrature
from ..measure.states import (
    Asked,
    Count,
    Exact,
    check_budget,
    largest_change,
    minibatches_of,
    not_finite,
    refused,
)
from .distributions import family, log_q, sampled_dtype, unwrapped
from .enumeration import Layout
from .ops import OPS
from .run import Keys, Message, Program, Traces, execute, plain_shapes, survey, terms_of

Array = Any
_CHUNK = 256  # states evaluated side by side
#: supports that no parameter moves
_STILL = (constraints.real, constraints.real_vector, constraints.positive, constraints.unit_interval)


def exact(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    asked: Asked,
) -> Exact:
    """Sum over states."""
    program = _Program(model, guide, args, dict(kwargs), params, asked)
    batches = minibatches_of(program.subsampled, asked.minibatches)
    states = check_budget(program.counts, {n: len(b) for n, b in batches.items()}, asked.max_states, asked.joint)
    value, gradient = program.sum(batches)
    error = 0.0
    if program.continuous:
        _, other = _Program(model, guide, args, dict(kwargs), params, asked.coarser).sum(batches)
        error = largest_change(gradient, other)
    return Exact(value, gradient, program.params, states, error, tuple(program.rules))


def point(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any], Traces]:
    """Parameters, constrained, with those of ``params`` put in, their constraints, and the run that declared them."""
    given = {n: v if isinstance(v, dict) else jnp.asarray(v) for n, v in dict(params or {}).items()}
    program, keys = Program(model, guide, args, kwargs, given, jax.random.key(1)), Keys(jax.random.key(0))
    with _Parameters(given) as recorded:
        try:
            traces = execute(program, keys, draw=_own_draw)
        except Unplaced:
            traces = execute(program, keys, draw=_own_draw, layout=_layout(plain_shapes(program, keys)))
    declared = recorded.sites
    if unknown := sorted(n for n in given.keys() - declared.keys() if not n.endswith("$state")):
        raise EstimatorError(f"params: the program declares no parameter {unknown}. There are: {sorted(declared)}.")
    found = {n: jax.tree.map(lambda x: jnp.asarray(x, float), s["value"]) for n, s in declared.items()}
    return found, {n: s["kwargs"].get("constraint", constraints.real) for n, s in declared.items()}, traces


def _layout(shapes: Mapping[tuple[str, str], tuple[int, ...]] | None) -> Layout | None:
    """Where the values of sites go that the model sums out, in a program that has some."""
    return None if shapes is None else Layout(shapes, lambda name: False)


def _own_draw(msg: Message) -> Array:
    value, msg["intermediates"] = msg["fn"].sample_with_intermediates(msg["kwargs"]["rng_key"])
    return value


class _Parameters(Messenger):
    """Takes note of the param statements, and holds ``given`` values against their shapes."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.sites: dict[str, Message] = {}
        super().__init__()

    def __enter__(self) -> _Parameters:
        super().__enter__()
        return self

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "param":
            return
        name, initial = msg["name"], msg["args"][0] if msg["args"] else None
        self.sites[name] = msg.copy()
        if name in self.given and isinstance(initial, (jax.Array, np.ndarray)):
            given = np.shape(self.given[name])
            if given != initial.shape:
                raise EstimatorError(f"params: '{name}' has shape {given}, the program's is {initial.shape}.")


class _Minibatch(Messenger):
    """Gives subsampled plates their indices."""

    def __init__(self, fn: Any, indices: Mapping[str, Array]):
        self.indices = indices
        super().__init__(fn)

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "plate" and msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]


class _Unmarked(Messenger):
    """Nothing is enumerated. `infer_config` would write into the user's dictionary."""

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "sample":
            msg["infer"] = {**msg["infer"], "enumerate": None}


class _Program:
    def __init__(self, model: Any, guide: Any, args: Any, kwargs: Any, params: Any, asked: Asked):
        self.objective, self.joint, self.keys = asked.objective, asked.joint, Keys(jax.random.key(0))
        # what the guide marks is summed over here like all the rest; what only the model has is one term
        guide = _Unmarked(guide)
        self._look_at_guide(Program(None, guide, args, kwargs, {}, jax.random.key(1)))
        self.params, constraint, traces = point(model, guide, args, kwargs, params)
        self.program = Program(model, guide, args, kwargs, self.params, jax.random.key(1))
        self.shapes = plain_shapes(self.program, self.keys) if traces.values is not None else None
        self.transforms = {n: biject_to(c) for n, c in constraint.items()}
        latents = traces.latents()
        self.rules = {n: rule_of(n, m["fn"], asked.nodes) for n, m in latents.items()}
        self.counts = [Count(n, r.size, math.prod(r.elements)) for n, r in self.rules.items()]
        self.continuous = any(not r.discrete for r in self.rules.values())
        self.subsampled = {
            n: (m["args"][0], len(m["value"]))
            for n, m in {**traces.guide, **traces.model}.items()
            if m["type"] == "plate" and m["args"][0] != len(m["value"])
        }
        for name, msg in {**traces.guide, **traces.model}.items():
            hidden = [f.name for f in msg.get("cond_indep_stack", ()) if f.name not in traces.guide | traces.model]
            if hidden and msg.get("scale") is not None:
                raise site_error(
                    name,
                    f"in plate '{hidden[0]}' inside a scan or a cond, and scaled: its minibatches can't be listed",
                    "Let the plate see all of its elements, without a handler that scales it.",
                )
        self.state = {n: v for n, v in (params or {}).items() if n not in self.params}
        self.depends_on = self._dependencies() if self.objective.keeps_score else None

    def _look_at_guide(self, program: Program) -> None:
        if not execute(program, self.keys, draw=_own_draw).latents():
            raise EstimatorError(
                "the guide draws no latent site, so there is nothing to estimate. Give the guide a numpyro.sample(...) "
                "statement, or pass model and guide in this order."
            )

    def _dependencies(self) -> dict[tuple[str, str], frozenset[str]]:
        program = self.program._replace(params={**self.state, **self.params})
        return survey(program, self.keys, lambda: _layout(self.shapes)).depends_on

    # ---- one run --------------------------------------------------------------------------------------------------

    def digits(self, state: Array) -> dict[str, Array]:
        """The choice of every element at state number ``state``."""
        found = {}
        for name, rule in self.rules.items():
            n = math.prod(rule.elements)
            strides = np.array([rule.size**i for i in range(n)], dtype=int).reshape(rule.elements)
            found[name] = state // strides % rule.size
            state = state // rule.size**n
        return found

    def run(self, params: Mapping[str, Array], indices: Mapping[str, Array], state: Array) -> tuple[Any, Traces]:
        """The logarithm of the weight of a state, and its run."""
        digits = self.digits(state)

        def value(msg: Message, digits: Array) -> Array:
            found = self.rules[msg["name"]].value(msg["fn"], digits)
            return found if self.objective.moves else jax.lax.stop_gradient(found)

        def draw(msg: Message) -> Array:
            mine = digits[msg["name"]]
            return value(msg, mine[msg["step"]] if "step" in msg else mine)

        program = self.program._replace(
            model=_Minibatch(self.program.model, indices), guide=_Minibatch(self.program.guide, indices),
            params={**self.state, **params},
        )  # fmt: skip
        traces = execute(program, self.keys, draw=draw, layout=_layout(self.shapes))
        weights = [self.rules[n].weigh(m["fn"], digits[n], m["value"]) for n, m in traces.latents().items()]
        weight = sum(weights)
        return weight if self.objective.moves else jax.lax.stop_gradient(weight), traces

    def particles(self, state: Array, each: int) -> Array:
        """The states of the particles in a joint one, ``each`` the number that one has."""
        return jnp.stack([state // each**i % each for i in range(self.joint)])

    def weighed(self, terms: Sequence[Term], traces: Traces) -> Sequence[Term]:
        past = {k: jnp.full(v.shape, v.value) for k, v in self.objective.keeps().state.items()}
        return self.objective.weighed(OPS, terms, traces.latents(), past)

    def constrained(self, unconstrained: Mapping[str, Array]) -> dict[str, Array]:
        return {n: jax.tree.map(self.transforms[n], u) for n, u in unconstrained.items()}

    # ---- all runs -------------------------------------------------------------------------------------------------

    def sum(self, batches: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
        unconstrained = {n: jax.tree.map(self.transforms[n].inv, v) for n, v in self.params.items()}
        listed = [np.asarray(list(b)) for b in batches.values()]
        rows = np.array(list(product(*(range(len(b)) for b in listed))), dtype=int)  # [minibatches, plates]
        each = math.prod(c.states for c in self.counts)
        per_minibatch = each**self.joint
        total = per_minibatch * len(rows)
        chunk = min(_CHUNK, total)

        def loss(u: Mapping[str, Array], state: Array) -> tuple[Array, Array]:
            row = jnp.asarray(rows)[state // per_minibatch]
            indices = {n: jnp.asarray(b)[row[i]] for i, (n, b) in enumerate(zip(batches, listed, strict=True))}
            scale = []

            def particle(state: Array) -> tuple[Array, Array]:
                log_weight, traces = self.run(self.constrained(u), indices, state)
                terms = terms_of(traces, self.depends_on)
                scale.append(self.objective.scale(terms))
                return log_weight, self.objective.collect(OPS, self.weighed(terms, traces))

            log_weights, collected = jax.vmap(particle)(self.particles(state % per_minibatch, each))
            log_weight, (value, _) = log_weights.sum(), self.objective.combine(OPS, collected, scale[-1])
            return -jnp.exp(log_weight) * value / len(rows), log_weight

        def one(state: Array) -> Any:
            (value, log_weight), gradient = jax.value_and_grad(loss, has_aux=True)(unconstrained, state)
            counts = (state < total) & (log_weight > -1e20)  # log weights of impossible states are near −1e30
            return jax.tree.map(lambda x: jnp.where(counts, x, 0.0), (value, gradient))

        def step(carry: Any, start: Array) -> tuple[Any, Array]:
            found = jax.vmap(one)(start + jnp.arange(chunk))
            added = jax.tree.map(lambda c, x: c + x.sum(0), carry, found)
            finite = jnp.isfinite(found[0])
            return added, jnp.where(finite.all(), -1, start + jnp.argmin(finite))

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), unconstrained))
        starts = jnp.arange(0, total, chunk)
        (value, gradient), broken = jax.jit(lambda: jax.lax.scan(step, zero, starts))()
        if (broken >= 0).any():
            state = int(broken[broken >= 0][0])
            row = rows[state // per_minibatch]
            for one in self.particles(jnp.asarray(state % per_minibatch), each):
                self.explain(one, {n: b[i] for n, b, i in zip(batches, listed, row, strict=True)})
            raise EstimatorError("the objective is not finite.")
        return float(value), named_leaves(gradient)

    def explain(self, state: Array, indices: Mapping[str, Array]) -> None:
        """Raise the error that names the term which is not finite."""
        _, traces = self.run(self.params, {n: jnp.asarray(i) for n, i in indices.items()}, state)
        values = {n: m["value"].tolist() for n, m in traces.latents().items()}
        for term in terms_of(traces):
            if not bool(jnp.isfinite(term.value).all()):
                raise not_finite(term, float(jnp.sum(term.value)), values)
        if self.joint == 1:
            raise EstimatorError(f"the ELBO is not finite where the latents are {values}.")


def named_leaves(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """``{name: array}``; the arrays of a network's tree under ``name[...][...]``."""
    found = {}
    for name, value in tree.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            found[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


# ---- what a site's choices are ---------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """``size`` choices for each of ``elements`` (a shape). ``value(fn, digits)`` is the value of a joint choice,
    ``weigh(fn, digits, value)`` the logarithm of its weight."""

    elements: tuple[int, ...]
    size: int
    value: Callable[[Any, Array], Array]
    weigh: Callable[[Any, Array, Array], Array]
    discrete: bool


def rule_of(name: str, fn: Any, nodes: int) -> Rule:
    base = unwrapped(fn)
    if isinstance(base, dist.Delta):
        return Rule((), 1, lambda fn, d: fn.sample(jax.random.key(0)), lambda fn, d, v: jnp.zeros(()), True)
    shape = (*fn.batch_shape, *fn.event_shape)
    batch = shape[: len(shape) - len(base.event_shape)]
    if family(fn) == families.ONEHOT:
        return _finite(batch, np.eye(base.event_shape[-1]))
    if base.has_enumerate_support:
        try:
            support = np.asarray(base.enumerate_support(expand=False))
        except NotImplementedError as error:
            raise _refused(name, base, str(error)) from error
        return _finite(batch, support.reshape(-1, *base.event_shape))
    noise, size = _noise(name, base, nodes)
    elements = (*batch, *noise[len(base.batch_shape) :])

    fixed = base.support in _STILL

    def value(fn: Any, digits: Array) -> Array:
        placed, _ = _place(unwrapped(fn), digits, nodes)
        placed = jnp.broadcast_to(placed, (*fn.batch_shape, *fn.event_shape))
        return jax.lax.stop_gradient(placed) if fixed else placed

    def weigh(fn: Any, digits: Array, value: Array) -> Array:
        """The nodes stand still and the density moves, so a cost that jumps has its derivative; where the parameters
        move the support, the nodes move with it."""
        log_weight = _place(unwrapped(fn), digits, nodes)[1]
        if not fixed:
            return log_weight
        log_density = jnp.sum(log_q(fn, value))
        return jax.lax.stop_gradient(log_weight - log_density) + log_density

    return Rule(elements, size, value, weigh, False)


def _finite(batch: tuple[int, ...], support: np.ndarray) -> Rule:
    def value(fn: Any, digits: Array) -> Array:
        return jnp.asarray(support, sampled_dtype(fn))[digits]

    return Rule(batch, len(support), value, lambda fn, digits, value: jnp.sum(log_q(fn, value)), True)


def _noise(name: str, base: Any, nodes: int) -> tuple[tuple[int, ...], int]:
    """Shape of a continuous distribution's noise, and choices per element."""
    if isinstance(base, dist.Normal):
        return base.batch_shape, len(quadrature.hermite(nodes)[0])
    if isinstance(base, dist.MultivariateNormal):
        return (*base.batch_shape, *base.event_shape), len(quadrature.hermite(nodes)[0])
    if isinstance(base, dist.MixtureSameFamily):
        if base.event_shape:
            raise _refused(name, base, "its components are not one-dimensional")
        _, size = _noise(name, unwrapped(base.component_distribution), nodes)
        return base.batch_shape, base.mixture_size * size
    if isinstance(base, dist.TransformedDistribution):
        inner = unwrapped(base.base_dist)
        noise, size = _noise(name, inner, nodes)
        prefix = base.base_dist.shape()[: len(base.base_dist.shape()) - len(inner.shape())]
        return (*prefix, *noise), size
    try:
        base.icdf(jnp.asarray(0.5))
    except (NotImplementedError, AttributeError, ImportError) as error:
        raise _refused(name, base, "no quadrature is known for it") from error
    return base.batch_shape, len(quadrature.unit(nodes)[0])


def _place(base: Any, digits: Array, nodes: int) -> tuple[Array, Array]:
    """Value and log weight of a continuous choice."""
    if isinstance(base, (dist.Normal, dist.MultivariateNormal)):
        x, w = (jnp.asarray(a, float) for a in quadrature.hermite(nodes))
        if isinstance(base, dist.Normal):
            return base.loc + base.scale * x[digits], jnp.sum(w[digits])
        return base.loc + (base.scale_tril @ x[digits][..., None])[..., 0], jnp.sum(w[digits])
    if isinstance(base, dist.MixtureSameFamily):
        part = unwrapped(base.component_distribution)
        size = _noise("", part, nodes)[1]
        k, node = digits // size, digits % size
        wide = (*jnp.shape(digits), base.mixture_size)
        logits = jax.nn.log_softmax(_logits(base.mixing_distribution))
        log_pi = jnp.take_along_axis(jnp.broadcast_to(logits, wide), k[..., None], -1)
        values, _ = _place(part, jnp.broadcast_to(node[..., None], wide), nodes)
        _, log_weight = _place(part, node[..., None], nodes)
        value = jnp.take_along_axis(jnp.broadcast_to(values, wide), k[..., None], -1)[..., 0]
        return value, jnp.sum(log_pi) + log_weight
    if isinstance(base, dist.TransformedDistribution):
        value, log_weight = _place(unwrapped(base.base_dist), digits, nodes)
        return ComposeTransform(list(base.transforms))(value), log_weight
    u, w = (jnp.asarray(a, float) for a in quadrature.unit(nodes))
    info = jnp.finfo(u.dtype)
    return base.icdf(jnp.clip(u, info.tiny, 1 - info.epsneg)[digits]), jnp.sum(w[digits])


def _logits(fn: Any) -> Array:
    return unwrapped(fn).logits


def _refused(name: str, base: Any, why: str) -> EstimatorError:
    discrete = getattr(base.support, "is_discrete", False) or family(base) in families.COUNTS
    return refused(name, type(base).__name__, why, discrete)
