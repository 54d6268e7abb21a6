"""The exact loss and its gradient of a small NumPyro program, by mapping one compiled run over every state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.primitives import Messenger

from ..core import families
from ..core.enumeration import Unplaced
from ..core.errors import EstimatorError
from ..core.ops import Ops
from ..core.plan import to_sum
from ..measure.choices import rule_of
from ..measure.states import (
    Asked,
    Count,
    Exact,
    check_budget,
    check_finite,
    check_latents,
    collected,
    largest_change,
    minibatches_of,
)
from .distributions import family, log_q, sampled_dtype, unwrapped
from .enumeration import Layout
from .ops import OPS
from .randomness import Minibatch
from .run import Keys, Message, Program, Traces, execute, terms_of, within
from .survey import plain_shapes, survey

Array = Any
_CHUNK = 256  # states evaluated side by side


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
    return None if shapes is None else Layout(shapes, to_sum)


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


class _Unmarked(Messenger):
    """Nothing is enumerated. `infer_config` would write into the user's dictionary."""

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "control_flow":  # no handler reaches inside
            within(msg, _Unmarked)
        if msg["type"] == "sample":
            msg["infer"] = {**msg["infer"], "enumerate": None}


class _Program:
    def __init__(self, model: Any, guide: Any, args: Any, kwargs: Any, params: Any, asked: Asked):
        self.objective, self.joint, self.keys = asked.objective, asked.joint, Keys(jax.random.key(0))
        # what the guide marks is summed over here like all the rest; what only the model has is one term
        guide = _Unmarked(guide)
        alone = Program(None, guide, args, kwargs, {}, jax.random.key(1))
        check_latents(execute(alone, self.keys, draw=_own_draw).latents(), "numpyro")
        self.params, constraint, traces = point(model, guide, args, kwargs, params)
        self.program = Program(model, guide, args, kwargs, self.params, jax.random.key(1))
        self.shapes = plain_shapes(self.program, self.keys) if traces.values is not None else None
        self.transforms = {n: biject_to(c) for n, c in constraint.items()}
        latents = traces.latents()
        self.rules = {n: rule_of(LAWS, n, m["fn"], asked.nodes) for n, m in latents.items()}
        self.counts = [Count(n, r.size, math.prod(r.elements)) for n, r in self.rules.items()]
        self.continuous = any(not r.discrete for r in self.rules.values())
        sizes = {**traces.sizes["guide"], **traces.sizes["model"]}
        self.subsampled = {n: size for n, size in sizes.items() if size[0] != size[1]}
        for name in self.subsampled.keys() - {**traces.guide, **traces.model}.keys():
            raise EstimatorError(
                f"plate '{name}': it subsamples inside a scan or a cond, where its minibatches can't be listed. Let it "
                "see all of its elements."
            )
        self.state = {n: v for n, v in (params or {}).items() if n not in self.params}
        self.depends_on = self._dependencies() if self.objective.keeps_score else None

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

        def chosen(plate: str, *sizes: int) -> Array:
            return indices[plate]

        program = self.program._replace(
            model=Minibatch(chosen, self.program.model), guide=Minibatch(chosen, self.program.guide),
            params={**self.state, **params},
        )  # fmt: skip
        traces = execute(program, self.keys, draw=draw, layout=_layout(self.shapes))
        weights = [self.rules[n].weigh(m["fn"], digits[n], m["value"]) for n, m in traces.latents().items()]
        weight = sum(weights)
        return weight if self.objective.moves else jax.lax.stop_gradient(weight), traces

    def particles(self, state: Array, each: int) -> Array:
        """The states of the particles in a joint one, ``each`` the number that one has."""
        return jnp.stack([state // each**i % each for i in range(self.joint)])

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
                return log_weight, collected(OPS, self.objective, terms, traces.latents())

            log_weights, found = jax.vmap(particle)(self.particles(state % per_minibatch, each))
            log_weight, (value, _) = log_weights.sum(), self.objective.combine(OPS, found, scale[-1])
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
        check_finite(OPS, terms_of(traces), traces.latents())
        if self.joint == 1:
            values = {n: m["value"].tolist() for n, m in traces.latents().items()}
            raise EstimatorError(f"the ELBO is not finite where the latents are {values}.")


def named_leaves(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """``{name: array}``; the arrays of a network's tree under ``name[...][...]``."""
    found = {}
    for name, value in tree.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            found[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


class _Laws:
    """What `choices.Laws` asks of NumPyro."""

    ops: Ops = OPS
    delta, normal, multivariate = dist.Delta, dist.Normal, dist.MultivariateNormal
    mixture, transformed = dist.MixtureSameFamily, dist.TransformedDistribution
    still = (constraints.real, constraints.real_vector, constraints.positive, constraints.unit_interval)
    unwrapped, family, log_q = staticmethod(unwrapped), staticmethod(family), staticmethod(log_q)
    fixed = staticmethod(jax.lax.stop_gradient)

    def values(self, base: Any) -> np.ndarray | None:
        if family(base) == families.ONEHOT:
            return np.eye(base.event_shape[-1])
        if not base.has_enumerate_support:
            return None
        with jax.ensure_compile_time_eval():  # the same in a loop that is traced
            return np.asarray(base.enumerate_support(expand=False)).reshape(-1, *base.event_shape)

    def sampled(self, values: np.ndarray, fn: Any) -> Array:
        return jnp.asarray(values, sampled_dtype(fn))

    def only(self, fn: Any) -> Array:
        return fn.sample(jax.random.key(0))

    def array(self, numbers: np.ndarray, base: Any) -> Array:
        return jnp.asarray(numbers, float)

    def mixing(self, base: Any) -> Array:
        return unwrapped(base.mixing_distribution).logits


LAWS = _Laws()
