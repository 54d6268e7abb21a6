"""What each output of a traced program depends on, and what its derivative meets on the way.

Every latent value passes through a `checkpoint_name` marker, an identity that leaves its name in the jaxpr; the
markers met on the way from the inputs to an output are its dependencies. Nothing is computed.

A primitive whose inside cannot be followed depends on everything that goes in and on every marker inside it; one with
effects (a mutable array, a callback that may keep something) also on all that went into the earlier ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import ad

from ..core.errors import EstimatorError, site_error

_PREFIX = "ppl_estimators:"
#: before the name of a site whose value was handed over to a step of a scan of the model
HANDED_OVER = "over:"
_NOTHING: frozenset[Any] = frozenset()

Deps = frozenset[Any]

#: the one operation that has a derivative in forward mode only
LOOP = "while loop"


class Found(NamedTuple):
    """``of``: the pytree that the program returns, each array replaced by the names of the sites it depends on.
    ``stuck``: sites on whose values an output depends through an operation that reverse mode cannot differentiate,
    and that operation. ``traced``: the program itself, to compare with what another tracing gives. ``reads``: as
    ``of``, the nearest sites on the way, with how many steps of the scan ago these were drawn, and how many of a scan
    inside its steps. ``cuts``: as
    ``of``, the nearest sites to which no derivative leads, without those that are named: values pass through these.
    ``elements``: as ``of``, of which elements of a plate each element of an array is made, given the `codes` of sites,
    and the sites whose values stay; and where one joined several."""

    of: Any
    stuck: dict[str, str]
    traced: ClosedJaxpr
    reads: Callable[[], Any]
    cuts: Callable[[Deps], Any]
    elements: Callable[[Mapping[str, Any], Deps], tuple[Any, Callable[[Any], str]]]


def mark(value: Any, site: str) -> Any:
    """``value``, marked as drawn at ``site``."""
    return checkpoint_name(value, _PREFIX + site)


def dependencies(fn: Callable[[], Any]) -> Found:
    """What the arrays that ``fn()`` returns depend on."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)()
    jaxpr, slopes = closed.jaxpr, _Slopes()

    def found(walk: _Walk) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shape), walk.walk(jaxpr, []))

    of = found(_Values())
    for site, loop in _NOTHING.union(*slopes.walk(jaxpr, [])):
        if loop is not None:
            slopes.stuck.setdefault(site, loop)

    def cuts(through: Deps) -> Any:
        depends, leads = found(_Edges(through)), found(_Slopes(through))
        return jax.tree.map(lambda a, b: a - _OUTSIDE - {site for site, _ in b}, depends, leads, is_leaf=_is_deps)

    def elements(codes: Mapping[str, Any], held: Deps) -> tuple[Any, Callable[[Any], str]]:
        walk = _Elements(codes, held)
        return found(walk), walk.where

    return Found(of, slopes.stuck, closed, lambda: found(_Reads()), cuts, elements)


def same(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Are two tracings of a program the same operations on the same numbers? What Python computes is a number here."""
    return all(_alike(x, y) for x, y in zip_longest(_numbers(a), _numbers(b)))


def _numbers(closed: ClosedJaxpr) -> Iterator[Any]:
    """The operations of a program in order, and every number in it, as far as its results depend on them: where a
    parameter starts, drawn by numpy, is of no account once it has a value."""
    live = _live(closed.jaxpr)
    yield from (x for v, x in zip(closed.jaxpr.constvars, closed.consts, strict=True) if v in live)
    open_ = [closed.jaxpr]
    for jaxpr in open_:  # which grows
        live = _live(jaxpr)
        for eqn in jaxpr.eqns:
            if not eqn.effects and live.isdisjoint(eqn.outvars):
                continue
            yield eqn.primitive.name
            yield from (v.val for v in eqn.invars if isinstance(v, Literal))
            for param in eqn.params.values():
                for item in _items(param):
                    if isinstance(item, ClosedJaxpr):
                        yield from item.consts
                    if (inner := _open(item)) is not None:
                        open_.append(inner)
                    elif isinstance(item, (bool, int, float, np.ndarray)):
                        yield item


def _live(jaxpr: Jaxpr) -> set[Any]:
    """The variables that its results depend on."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return wanted


def _alike(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    if isinstance(a, (str, type(None))) or isinstance(b, (str, type(None))):
        return bool(a == b)
    a, b = (
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, dtypes.prng_key) else x)
        if isinstance(x, jax.Array)
        else np.asarray(x)
        for x in (a, b)
    )
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


def without_derivative(site: str, estimator: str, operation: str) -> EstimatorError:
    """For an estimator that differentiates the cost in the value of a site in `Found.stuck`."""
    return site_error(
        site,
        f"{estimator} differentiates the cost in its value, which passes through a {operation}: JAX has no derivative "
        "of that in reverse mode",
        "Use Reinforce(LeaveOneOut()) with several particles here, or give the function a derivative with "
        "jax.custom_jvp or jax.custom_vjp.",
    )


def forward(params: Any) -> bool:
    """Are these differentiated in forward mode, as far as can be seen from here (not from inside a `jax.jit`)?"""
    return any(isinstance(x, ad.JVPTracer) for x in jax.tree.leaves(params))


def differentiable(fn: Callable[[], Any]) -> bool:
    """Can ``fn()``, an array, be differentiated in every array that it closes over and depends on?

    Where all of these are constants (a program that is not traced), each of them counts.
    """
    try:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)()
        if not dtypes.issubdtype(shape.dtype, jnp.inexact):
            return False
        floats = [i for i, x in enumerate(closed.consts) if dtypes.issubdtype(x.dtype, jnp.inexact)]
        traced = [i for i in floats if isinstance(closed.consts[i], jax.core.Tracer)]
        moving = traced or floats
        constants = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in closed.consts]

        def value(*constants: Any) -> Any:
            return jax.core.eval_jaxpr(closed.jaxpr, constants)[0]

        def slopes(cotangent: Any, *constants: Any) -> Any:
            def of(*values: Any) -> Any:
                filled = dict(enumerate(constants)) | dict(zip(moving, values, strict=True))
                return value(*filled.values())

            return jax.vjp(of, *(constants[i] for i in moving))[1](cotangent)

        (used,) = _inputs(jax.make_jaxpr(value)(*constants).jaxpr)
        pulled = _inputs(jax.make_jaxpr(slopes)(shape, *constants).jaxpr)
    except Exception:  # whatever JAX says where there is no derivative
        return False
    return all(0 in slope for i, slope in zip(moving, pulled, strict=True) if i in used)


def _inputs(jaxpr: Jaxpr) -> list[Deps]:
    """For each output, the numbers of the inputs that it depends on."""
    return _Values().walk(jaxpr, [frozenset([i]) for i in range(len(jaxpr.invars))])


class _Walk:
    """Carries sets of names from the inputs of a jaxpr to its outputs; what an operation does is its subclass's."""

    def leaf(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        """Outputs of an operation that is not followed inside."""
        raise NotImplementedError

    def effect(self, eqn: Any, inputs: list[Deps], world: Deps) -> Deps:
        """Every output of an operation with effects, and the world after it."""
        raise NotImplementedError

    def marker(self, site: str, value: Deps) -> Deps:
        raise NotImplementedError

    def literal(self, value: Any) -> Deps:
        return self.nothing

    def next_step(self, body: Jaxpr, carry: Deps) -> Deps:
        """What a step puts into the carry, as the next one finds it."""
        return carry

    #: are marks of values that were handed over to a scan of the model of interest?
    handed_over = False

    #: does what decides (the predicate of a branch, the test of a loop) reach what is decided?
    control = True

    #: what is carried where no site is
    nothing: Any = _NOTHING

    #: are functions with a derivative of their own followed inside?
    custom = False

    def walk(self, jaxpr: Jaxpr, inputs: Sequence[Deps]) -> list[Deps]:
        env: dict[Any, Deps] = dict(zip(jaxpr.invars, inputs, strict=True))
        world = self.nothing

        def read(v: Any) -> Deps:
            return self.literal(v.val) if isinstance(v, Literal) else env.get(v, self.nothing)

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            if any("Debug" not in type(e).__name__ for e in eqn.effects):
                world = self.effect(eqn, values, world)
                outputs = [world] * len(eqn.outvars)
            else:
                outputs = self.equation(eqn, values)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        name = eqn.primitive.name
        if name == "name" and str(eqn.params["name"]).startswith(_PREFIX):
            site = str(eqn.params["name"]).removeprefix(_PREFIX)
            over = site.startswith(HANDED_OVER) and not self.handed_over
            return [inputs[0] if over else self.marker(site, inputs[0])]
        followed = None
        if name == "scan":
            followed = self.scan(eqn, inputs)
        elif name == "while":
            followed = self.loop(eqn, inputs)
        elif name == "cond":
            followed = self.branches(eqn, inputs)
        elif self.custom or not name.startswith("custom_"):
            inner = [j for p in eqn.params.values() if (j := _open(p)) is not None]
            if len(inner) == 1 and _fits(inner[0], len(inputs), len(eqn.outvars)):  # jit, remat, ...
                followed = self.walk(inner[0], inputs)
        return self.leaf(eqn, inputs) if followed is None else followed

    def scan(self, eqn: Any, inputs: list[Deps]) -> list[Deps] | None:
        body, layout = _open(eqn.params.get("jaxpr")), scan_layout(eqn.params)
        if layout is None or not _fits(body, len(inputs), len(eqn.outvars)) or sum(layout) > len(inputs):
            return None
        consts, carries = layout
        carry = inputs[consts : consts + carries]
        while True:  # what one step puts into the carry reaches every later step
            outputs = self.walk(body, [*inputs[:consts], *carry, *inputs[consts + carries :]])
            grown = [a | self.next_step(body, b) for a, b in zip(carry, outputs[:carries], strict=True)]
            if grown == carry:
                return [*grown, *outputs[carries:]]
            carry = grown

    def loop(self, eqn: Any, inputs: list[Deps]) -> list[Deps] | None:
        n_cond, n_body = eqn.params.get("cond_nconsts"), eqn.params.get("body_nconsts")
        test, body = _open(eqn.params.get("cond_jaxpr")), _open(eqn.params.get("body_jaxpr"))
        if not isinstance(n_cond, int) or not isinstance(n_body, int):
            return None
        carry, outs = inputs[n_cond + n_body :], len(eqn.outvars)
        if not (_fits(test, n_cond + len(carry), 1) and _fits(body, n_body + len(carry), outs) and len(carry) == outs):
            return None
        while True:  # the number of steps depends on what the test depends on
            (stop,) = self.walk(test, [*inputs[:n_cond], *carry]) if self.control else [_NOTHING]
            outputs = self.walk(body, [*inputs[n_cond : n_cond + n_body], *carry])
            grown = [a | b | stop for a, b in zip(carry, outputs, strict=True)]
            if grown == carry:
                return self.looped(body, grown)
            carry = grown

    def looped(self, body: Jaxpr, carry: list[Deps]) -> list[Deps]:
        """The outputs of a loop of unknown length."""
        return carry

    def branches(self, eqn: Any, inputs: list[Deps]) -> list[Deps] | None:
        branches = [_open(b) for b in _items(eqn.params.get("branches"))]
        if not branches or not all(_fits(b, len(inputs) - 1, len(eqn.outvars)) for b in branches):
            return None
        which = inputs[0] if self.control else _NOTHING
        each = [self.walk(b, inputs[1:]) for b in branches]
        return [which.union(*outs) for outs in zip(*each, strict=True)]


class _Values(_Walk):
    """On which sites a value depends."""

    def marker(self, site: str, value: Deps) -> Deps:
        return value | {site}

    def leaf(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        return [_NOTHING.union(*inputs, _markers(eqn))] * len(eqn.outvars)

    def effect(self, eqn: Any, inputs: list[Deps], world: Deps) -> Deps:
        return world.union(*inputs, _markers(eqn))


#: more steps than so many are not counted
COUNTED = 4


class _Reads(_Walk):
    """Which sites a value reads, the nearest only, and how many steps ago these were drawn, of a scan and of one inside
    its steps; infinity stands for more than are counted."""

    handed_over, nested = True, 0

    def marker(self, site: str, value: Deps) -> Deps:
        return frozenset([(site, 0, 0)])

    def leaf(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        return [self.effect(eqn, inputs, _NOTHING)] * len(eqn.outvars)

    def effect(self, eqn: Any, inputs: list[Deps], world: Deps) -> Deps:
        ages = (0, 0), (0, math.inf), (math.inf, 0)
        return world.union(*inputs, ((s, *age) for s in _markers(eqn) for age in ages))

    def scan(self, eqn: Any, inputs: list[Deps]) -> list[Deps] | None:
        self.nested += 1
        try:
            return super().scan(eqn, inputs)
        finally:
            self.nested -= 1

    def next_step(self, body: Jaxpr, carry: Deps) -> Deps:
        drawn = _NOTHING.union(*map(_markers, body.eqns))  # by steps of this scan

        def older(n: float) -> float:
            return n + 1 if n < COUNTED else math.inf

        if self.nested > 2:
            return carry
        if self.nested == 2:
            return frozenset((s, n, older(m) if s in drawn else m) for s, n, m in carry)
        return frozenset((s, older(n), 0) if s in drawn else (s, n, m) for s, n, m in carry)


class _Edges(_Walk):
    """What decides between minus infinity and something else, in ``found``; and on which sites a value depends
    otherwise, the nearest only but for those that are passed ``through``."""

    def __init__(self, through: Deps) -> None:
        self.found, self.through = _NOTHING, through

    def marker(self, site: str, value: Deps) -> Deps:
        return value if site in self.through else frozenset([site])

    def effect(self, eqn: Any, inputs: list[Deps], world: Deps) -> Deps:
        return world.union(*inputs, _markers(eqn))

    def literal(self, value: Any) -> Deps:
        return _OUTSIDE if np.ndim(value) == 0 and value == -np.inf else _NOTHING

    def leaf(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        name = eqn.primitive.name
        if name == "select_n" and any(_OUTSIDE <= i for i in inputs[1:]):
            self.found |= inputs[0] - _OUTSIDE
            inputs = inputs[1:]
        dropped = _NOTHING if name in ("select_n", "broadcast_in_dim", "convert_element_type") else _OUTSIDE
        return [_NOTHING.union(*inputs, _markers(eqn)) - dropped] * len(eqn.outvars)


_OUTSIDE = frozenset([None])


def edges(log_prob: Callable[[Any], Any], value: Any) -> list[Any]:
    """The arrays that ``log_prob`` closes over and that decide where it is minus infinity, as far as it says so by a
    choice between that constant and a number."""
    closed = jax.make_jaxpr(log_prob)(value)
    constants = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in closed.consts]
    jaxpr = jax.make_jaxpr(lambda x, *c: jax.core.eval_jaxpr(closed.jaxpr, c, x))(value, *constants).jaxpr
    walk = _Edges(_NOTHING)
    walk.walk(jaxpr, [_NOTHING, *(frozenset([i]) for i in range(len(constants)))])
    return [x for i, x in enumerate(closed.consts) if i in walk.found]


class _Slopes(_Walk):
    """Which drawn values a derivative leads to: pairs of the site and, where it would have to go back through a loop of
    unknown length, that loop. Only the nearest site on the way counts, but for those that are passed ``through``."""

    control = False

    def __init__(self, through: Deps = _NOTHING) -> None:
        self.stuck: dict[str, str] = {}
        self.through = through

    def marker(self, site: str, value: Deps) -> Deps:
        return value if site in self.through else frozenset([(site, None)])

    def leaf(self, eqn: Any, inputs: list[Deps]) -> list[Deps]:
        if eqn.primitive.name in _FLAT:
            return [_NOTHING] * len(eqn.outvars)
        reached = _NOTHING.union(*inputs, ((site, None) for site in _markers(eqn)))
        if _raises(eqn):
            for site, _ in reached:
                self.stuck.setdefault(site, eqn.primitive.name)
            reached = _NOTHING
        return [reached if _inexact(v) else _NOTHING for v in eqn.outvars]

    def effect(self, eqn: Any, inputs: list[Deps], world: Deps) -> Deps:
        self.leaf(eqn, inputs)
        return world.union(*inputs, ((site, None) for site in _markers(eqn)))  # it may

    def looped(self, body: Jaxpr, carry: list[Deps]) -> list[Deps]:
        own = body.invars[len(body.invars) - len(carry) :]  # a carry that never changes is no loop
        stuck = [frozenset((site, LOOP) for site, _ in c) for c in carry]
        return [c if a is b else s for a, b, c, s in zip(own, body.outvars, carry, stuck, strict=True)]


def codes(size: int) -> Any:
    """A number for each element of a plate: its own, and above that the complement of its bits. What is made of two
    elements has the bits of both, and so more than either."""
    bits, numbers = np.uint64((size - 1).bit_length()), np.arange(size, dtype=np.uint64)
    return numbers << bits | (np.uint64(1) << bits) - np.uint64(1) - numbers


class _Elements(_Walk):
    """Of which elements of a plate each element of an array is made: their `codes`, joined. Zero where it is of none,
    or an operation is not known. Arrays are aligned at their last axes; one element may stand for all along an axis."""

    nothing, custom = np.zeros((), np.uint64), True

    def __init__(self, codes: Mapping[str, Any], held: Deps) -> None:
        self.codes, self.held = codes, held
        self.bits = max(int(x.max()).bit_length() for x in codes.values()) // 2
        self.joint: dict[int, tuple[Any, Any]] = {}  # arrays with elements of several, and what first joined them

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        if all(x is self.nothing for x in inputs) and not _markers(eqn):
            return [self.nothing] * len(eqn.outvars)
        outputs = super().equation(eqn, inputs)
        _, first = next((self.joint[id(x)] for x in inputs if id(x) in self.joint), (None, eqn))
        bits: Any = np.uint64(self.bits)
        for x in outputs:
            if (x & x >> bits & (1 << self.bits) - 1).any():
                self.joint[id(x)] = x, first
        return outputs

    def where(self, x: Any) -> str:
        """What first joined several elements, and its line, if it stands in a user's program."""
        _, eqn = self.joint.get(id(x), (None, None))
        traceback = eqn and eqn.source_info.traceback
        for frame in traceback.frames if traceback else ():  # the innermost first
            file = Path(frame.file_name)
            if Path(__file__).parent in file.parents:
                break
            if _LIBRARIES.isdisjoint(file.parents):
                return f" (by {eqn.params.get('name', eqn.primitive.name)} in {file.name}, line {frame.line_num})"
        return ""

    def marker(self, site: str, value: Any) -> Any:
        return self.codes.get(site, self.nothing if site in self.held else value)

    def effect(self, eqn: Any, inputs: list[Any], world: Any) -> Any:
        return self.nothing

    def leaf(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name, nothing = eqn.primitive.name, [self.nothing] * len(eqn.outvars)
        if name == "is_finite" or (name in ("eq", "ne") and eqn.invars[0] is eqn.invars[1]):
            return nothing  # who asks for NaN asks all elements
        if name in ("concatenate", "pad") and math.prod(_shape(eqn.outvars[0])) > _LARGE:
            return nothing  # these write all elements out
        if rule := _RULES.get(name):
            outputs = rule(eqn, *map(_ranked, inputs, eqn.invars))
            return outputs if isinstance(outputs, list) else [outputs]
        if len(nothing) > 1 or name.startswith(("scatter", "dynamic_update")):
            return nothing
        out, shapes = _shape(*eqn.outvars), {_shape(v) for v in eqn.invars}
        alike = all(len(s) in (0, len(out)) and all(n in (1, m) for n, m in zip(s, out, strict=False)) for s in shapes)
        return [_joined(inputs)] if alike else nothing  # element by element

    def scan(self, eqn: Any, inputs: list[Any]) -> list[Any] | None:
        """Two steps, which show what one tells the next."""
        body, layout, steps = _open(eqn.params["jaxpr"]), scan_layout(eqn.params), eqn.params["length"]
        if layout is None or not steps:
            return [self.nothing] * len(eqn.outvars)
        first, last = layout[0], sum(layout)
        carry, rows = inputs[first:last], list(map(_ranked, inputs[last:], eqn.invars[last:]))
        found, uniform = dict[int, list[Any]](), all(len(x) == 1 for x in rows)
        for step in range(min(2, steps)):
            number = steps - 1 - step if eqn.params["reverse"] else step
            outputs = self.walk(body, [*inputs[:first], *carry, *(x[number % len(x)] for x in rows)])
            carry, found[number] = outputs[: layout[1]], outputs[layout[1] :]
        stacked = []
        for i, v in enumerate(body.outvars[layout[1] :]):
            each = {number: _ranked(made[i], v) for number, made in found.items()}
            all_ = [_joined(each.values())] if uniform else [each.get(n, self.nothing) for n in range(steps)]
            stacked.append(np.stack(np.broadcast_arrays(*all_)))
        return [*carry, *stacked]

    def loop(self, eqn: Any, inputs: list[Any]) -> list[Any] | None:
        return [self.nothing] * len(eqn.outvars)

    def branches(self, eqn: Any, inputs: list[Any]) -> list[Any] | None:
        """Not what decides: who asks whether all is well asks all elements."""
        each = [self.walk(_open(b), inputs[1:]) for b in eqn.params["branches"]]
        return [_joined(outs) for outs in zip(*each, strict=True)]


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(getattr(v.aval, "shape", ()))


def _joined(xs: Iterable[Any]) -> Any:
    return functools.reduce(np.bitwise_or, xs)


def _over(x: Any, axes: Iterable[int]) -> Any:
    """Joined along axes, which stay."""
    return np.bitwise_or.reduce(x, axis=tuple(axes), keepdims=True)


def _ranked(x: Any, v: Any) -> Any:
    """With as many dimensions as a variable."""
    return x.reshape((1,) * (len(_shape(v)) - x.ndim) + x.shape)


def _placed(x: Any, to: Mapping[int, int], v: Any) -> Any:
    """Its axes where they go in ``v``; along others there is one element."""
    shape = [1] * len(_shape(v))
    for a, b in to.items():
        shape[b] = x.shape[a]
    order = [*sorted(to, key=lambda a: to[a]), *(a for a in range(x.ndim) if a not in to)]
    return x.transpose(order).reshape(shape)


def _short(x: Any) -> Any:
    """With one element along axes on which all are alike."""
    for axis in range(x.ndim):
        first = x.take([0], axis)
        x = first if (x == first).all() else x
    return x


def _reshaped(eqn: Any, x: Any) -> Any:
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    same = next((i for i, (n, m) in enumerate(zip_longest(old, new)) if n != m), len(old))
    if math.prod(x.shape[same:]) == 1:
        return x.reshape(*x.shape[:same], *(1,) * len(new[same:]))
    return _short(np.broadcast_to(x, old).reshape(new)) if math.prod(new) <= _LARGE else _Elements.nothing


def _sliced(eqn: Any, x: Any) -> Any:
    starts, ends, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    cut = map(slice, starts, ends, strides or [1] * x.ndim)
    return x[tuple(c if n > 1 else slice(None) for c, n in zip(cut, x.shape, strict=True))]


def _split(eqn: Any, x: Any) -> Any:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    return np.split(x, np.cumsum(sizes)[:-1], axis) if x.shape[axis] > 1 else [x] * len(sizes)


def _picked(eqn: Any, x: Any, *starts: Any) -> Any:
    whole = all(n in (1, size) for n, size in zip(x.shape, eqn.params["slice_sizes"], strict=True))
    return _joined((x, *starts)) if whole else _Elements.nothing


def _in_a_row(eqn: Any, *xs: Any) -> Any:
    axis = eqn.params["dimension"]
    common = np.broadcast_shapes(*(_over(x, [axis]).shape for x in xs))
    parts = [(*common[:axis], _shape(v)[axis], *common[axis + 1 :]) for v in eqn.invars]
    return _short(np.concatenate(list(map(np.broadcast_to, xs, parts)), axis))


def _padded(eqn: Any, x: Any, value: Any) -> Any:
    found = np.zeros(_shape(eqn.outvars[0]), x.dtype)
    if min(min(edges) for edges in eqn.params["padding_config"]) >= 0:
        sizes = zip(eqn.params["padding_config"], _shape(eqn.invars[0]), strict=True)
        found[tuple(slice(low, low + n * (gap + 1), gap + 1) for (low, _, gap), n in sizes)] = x
    return _short(found)


def _product(eqn: Any, x: Any, y: Any) -> Any:
    contracted, batch = eqn.params["dimension_numbers"]
    found, free = [], len(batch[0])
    for z, over, along in zip((x, y), contracted, batch, strict=True):
        others = [a for a in range(z.ndim) if a not in over and a not in along]
        to = {a: i for i, a in enumerate(along)} | {a: free + i for i, a in enumerate(others)}
        found.append(_placed(_over(z, over), to, eqn.outvars[0]))
        free += len(others)
    return _joined(found)


def _convolved(eqn: Any, x: Any, kernel: Any) -> Any:
    at = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] > 1 or kernel.any():
        return _Elements.nothing
    return _placed(_over(x, at.lhs_spec[1:]), {at.lhs_spec[0]: at.out_spec[0]}, eqn.outvars[0])


def _gathered(eqn: Any, x: Any, index: Any) -> Any:
    """Of an axis along which elements differ it is not known which are taken."""
    at, (out,), sizes = eqn.params["dimension_numbers"], eqn.outvars, eqn.params["slice_sizes"]
    batch = [a for a in range(len(_shape(out))) if a not in at.offset_dims]
    chosen = _placed(_over(index, [-1]), dict(enumerate(batch)), out)
    dropped = (*at.collapsed_slice_dims, *at.operand_batching_dims)
    to = dict(zip((a for a in range(x.ndim) if a not in dropped), at.offset_dims, strict=True))
    whole = all(n == 1 or n == sizes[a] or a in at.operand_batching_dims for a, n in enumerate(x.shape))
    to |= {a: batch[b] for a, b in zip(at.operand_batching_dims, at.start_indices_batching_dims, strict=True)}
    return chosen | _placed(x, to, out) if whole else chosen


_LARGE = 2**22  # elements
#: where a program of the user's is not
_LIBRARIES = {Path(jax.__file__).parents[1], Path(functools.__file__).parent}

#: what becomes of codes in operations that are not element by element
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"),
        lambda eqn, x: np.bitwise_or.reduce(x, axis=tuple(eqn.params["axes"])),
    ),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), lambda eqn, x: _over(x, [eqn.params["axis"]])
    ),
    "sort": lambda eqn, *xs: [_over(_joined(xs), [eqn.params["dimension"]])] * len(xs),
    "broadcast_in_dim": lambda eqn, x: _placed(x, dict(enumerate(eqn.params["broadcast_dimensions"])), *eqn.outvars),
    "transpose": lambda eqn, x: x.transpose(eqn.params["permutation"]),
    "squeeze": lambda eqn, x: x.squeeze(tuple(eqn.params["dimensions"])),
    "reshape": _reshaped,
    "rev": lambda eqn, x: np.flip(x, eqn.params["dimensions"]),
    "slice": _sliced,
    "dynamic_slice": _picked,
    "split": _split,
    "concatenate": _in_a_row,
    "stack": lambda eqn, *xs: _short(np.stack(np.broadcast_arrays(*xs), eqn.params["axis"])),
    "pad": _padded,
    "dot_general": _product,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
}  # fmt: skip

#: their derivative is zero everywhere
_FLAT = frozenset(["stop_gradient", "floor", "ceil", "round", "sign", "is_finite", "nextafter", "bitcast_convert_type"])


def _raises(eqn: Any) -> bool:
    """Does JAX refuse to differentiate it? These callbacks have a rule, which raises."""
    if eqn.primitive.name in ("pure_callback", "io_callback"):
        return True
    if eqn.primitive in ad.primitive_jvps or eqn.primitive.name.startswith("custom_"):
        return False
    inside = any(_open(item) is not None for p in eqn.params.values() for item in _items(p))
    return not inside and any(map(_inexact, eqn.invars))


def _inexact(v: Any) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    return dtype is not None and dtypes.issubdtype(dtype, jnp.inexact)


def scan_layout(params: Any) -> tuple[int, int] | None:
    """How many of a scan's inputs are constants, and how many carries; None where its parameters do not say.

    Up to JAX 0.10 two numbers; from 0.11 on ``ft_in``, one flat tree each for constants, carry and inputs.
    """
    consts, carries = params.get("num_consts"), params.get("num_carry")
    if isinstance(consts, int) and isinstance(carries, int):
        return consts, carries
    parts = params.get("ft_in")
    try:
        parts = parts if isinstance(parts, (tuple, list)) else parts.unpack()
        consts, carries, _ = (_size(p) for p in parts)
    except (AttributeError, TypeError, ValueError):
        return None
    return consts, carries


def _size(part: Any) -> int:
    if isinstance(part, (tuple, list)):  # None stands for a leaf there
        return len(jax.tree.leaves(part, is_leaf=lambda x: x is None))
    return len(part)


def _fits(jaxpr: Any, inputs: int, outputs: int) -> bool:
    return jaxpr is not None and len(jaxpr.invars) == inputs and len(jaxpr.outvars) == outputs


def _open(param: Any) -> Any:
    if isinstance(param, ClosedJaxpr):
        return param.jaxpr
    return param if isinstance(param, Jaxpr) else None


def _is_deps(x: Any) -> bool:
    return isinstance(x, frozenset)


def _items(param: Any) -> Sequence[Any]:
    return param if isinstance(param, (tuple, list)) else (param,)


def _markers(eqn: Any) -> Deps:
    """Every site marked inside an operation."""
    if eqn.primitive.name == "name" and str(eqn.params["name"]).startswith(_PREFIX):
        return frozenset([str(eqn.params["name"]).removeprefix(_PREFIX)])
    inner = [j for p in eqn.params.values() for item in _items(p) if (j := _open(item)) is not None]
    return _NOTHING.union(*(_markers(e) for j in inner for e in j.eqns))
