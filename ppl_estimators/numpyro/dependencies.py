"""Which latent sites each output of a traced program depends on.

Every latent value passes through a `checkpoint_name` marker, an identity that leaves its name in the jaxpr; the
markers met on the way from the inputs to an output are its dependencies. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_PREFIX = "ppl_estimators:"
_NOTHING: frozenset[str] = frozenset()

Deps = frozenset[str]


def mark(value: Any, site: str) -> Any:
    """``value``, marked as drawn at ``site``."""
    return checkpoint_name(value, _PREFIX + site)


def dependencies(fn: Callable[[], Any]) -> Any:
    """The pytree that ``fn()`` returns, each array replaced by the frozenset of site names it depends on."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)()
    found = _walk(closed.jaxpr, [_NOTHING] * len(closed.jaxpr.invars))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _walk(jaxpr: Jaxpr, inputs: Sequence[Deps]) -> list[Deps]:
    env: dict[Any, Deps] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> Deps:
        return _NOTHING if isinstance(v, Literal) else env.get(v, _NOTHING)

    for eqn in jaxpr.eqns:
        outputs = _equation(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, inputs: list[Deps]) -> list[Deps]:
    name = eqn.primitive.name
    if name == "name":
        marker = str(eqn.params["name"])
        here = {marker.removeprefix(_PREFIX)} if marker.startswith(_PREFIX) else set()
        return [inputs[0] | here]
    if name == "scan":
        return _scan(eqn, inputs)
    if name == "while":
        return _while(eqn, inputs)
    if name == "cond":
        which, rest = inputs[0], inputs[1:]
        branches = [_walk(_open(b), rest) for b in eqn.params["branches"]]
        return [which.union(*outs) for outs in zip(*branches, strict=True)]
    inner = [j for p in eqn.params.values() if (j := _open(p)) is not None]
    if len(inner) == 1 and len(inner[0].invars) == len(inputs) and len(inner[0].outvars) == len(eqn.outvars):
        return _walk(inner[0], inputs)  # jit, remat, custom_jvp, custom_vjp, ...
    everything = _NOTHING.union(*inputs, *(_markers(j) for j in inner))
    return [everything] * len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Deps]) -> list[Deps]:
    body, consts, carries = _open(eqn.params["jaxpr"]), eqn.params["num_consts"], eqn.params["num_carry"]
    carry = inputs[consts : consts + carries]
    while True:  # what one step puts into the carry reaches every later step
        outputs = _walk(body, [*inputs[:consts], *carry, *inputs[consts + carries :]])
        grown = [a | b for a, b in zip(carry, outputs[:carries], strict=True)]
        if grown == carry:
            return [*grown, *outputs[carries:]]
        carry = grown


def _while(eqn: Any, inputs: list[Deps]) -> list[Deps]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    carry = inputs[n_cond + n_body :]
    while True:  # the number of steps depends on what the test depends on
        (stop,) = _walk(test, [*inputs[:n_cond], *carry])
        outputs = _walk(body, [*inputs[n_cond : n_cond + n_body], *carry])
        grown = [a | b | stop for a, b in zip(carry, outputs, strict=True)]
        if grown == carry:
            return grown
        carry = grown


def _open(param: Any) -> Any:
    if isinstance(param, ClosedJaxpr):
        return param.jaxpr
    return param if isinstance(param, Jaxpr) else None


def _markers(jaxpr: Any) -> Deps:
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and str(eqn.params["name"]).startswith(_PREFIX):
            found.add(str(eqn.params["name"]).removeprefix(_PREFIX))
        for p in eqn.params.values():
            for item in p if isinstance(p, (tuple, list)) else (p,):
                if _open(item) is not None:
                    found |= _markers(_open(item))
    return frozenset(found)
