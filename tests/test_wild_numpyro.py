"""Programs that users of NumPyro really write: what the walker sees of a jaxpr, distributions whose claims are wrong,
models and guides that do not match, JAX's own modes."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppl_estimators.numpyro import dependencies
from ppl_estimators.numpyro.dependencies import mark, scan_layout

# ---- the walker ----------------------------------------------------------------------------------------------------


class Flat:
    """A flat tree as JAX 0.11 has it: it knows its parts, and how many leaves each has."""

    def __init__(self, *parts: int | Flat):
        self.parts = parts

    def __len__(self) -> int:
        return sum(p if isinstance(p, int) else len(p) for p in self.parts)

    def unpack(self) -> tuple[Any, ...]:
        return tuple(Flat(p) if isinstance(p, int) else p for p in self.parts)


LAYOUTS = {
    "numbers": {"num_consts": 2, "num_carry": 1},
    "tuples": {"ft_in": ((None, (None,)), (None,), (None,)), "ft_out": ((None,), (None, None))},
    "flat trees": {"ft_in": Flat(2, 1, 1), "ft_out": Flat(1, 2)},
}
UNKNOWN = {
    "nothing": {},
    "no tree": {"ft_in": 3},
    "two parts": {"ft_in": ((None, None), (None,))},
    "more than goes in": {"num_consts": 7, "num_carry": 1},
    "names": {"num_consts": "two", "num_carry": "one"},
}


def equation(fn: Any, *args: Any) -> Any:
    """The last operation of a program."""
    return jax.make_jaxpr(fn)(*args).eqns[-1]


def a_scan(a: Any, b: Any, c: Any, x: Any) -> Any:
    """a moves the carry, b the second output, x the first one."""

    def body(c: Any, x: Any) -> Any:
        return c * a, (2.0 * x, b + mark(jnp.sin(a), "inside"))

    return jax.lax.scan(body, c, x)


def followed(eqn: Any, params: dict[str, Any]) -> list[frozenset[str]]:
    params = {k: v for k, v in eqn.params.items() if k not in ("num_consts", "num_carry", "ft_in", "ft_out")} | params
    return dependencies._Values().equation(eqn.replace(params=params), [frozenset([n]) for n in "abcx"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scan_is_followed_whatever_way_its_equation_says_what_goes_where(layout):
    eqn = equation(a_scan, 1.0, 2.0, 3.0, jnp.arange(3.0))
    assert scan_layout(LAYOUTS[layout]) == (2, 1)
    expected = [{"a", "c"}, {"x"}, {"a", "b", "inside"}]
    assert followed(eqn, LAYOUTS[layout]) == expected
    assert dependencies._Values().equation(eqn, [frozenset([n]) for n in "abcx"]) == expected  # of this JAX


@pytest.mark.parametrize("layout", UNKNOWN)
def test_a_scan_of_unknown_layout_depends_on_all_that_goes_in_and_all_that_is_drawn_inside(layout):
    eqn = equation(a_scan, 1.0, 2.0, 3.0, jnp.arange(3.0))
    assert followed(eqn, UNKNOWN[layout]) == [frozenset(["a", "b", "c", "x", "inside"])] * 3


def test_loops_and_branches_of_unknown_layout_depend_on_all_that_goes_in():
    loop = equation(lambda a, b: jax.lax.while_loop(lambda c: c[0] < b, lambda c: (c[0] + 1, c[1]), (a, a)), 1.0, 2.0)
    branch = equation(lambda a, b: jax.lax.cond(a > 0, lambda: b, lambda: mark(2.0 * b, "inside")), 1.0, 2.0)
    seen = dependencies._Values()
    for eqn, spoiled in ((loop, {"cond_nconsts": None}), (loop, {"body_jaxpr": 1}), (branch, {"branches": ()})):
        inputs = [frozenset([i]) for i in range(len(eqn.invars))]
        everything = frozenset(range(len(eqn.invars)))
        lost = seen.equation(eqn.replace(params={**eqn.params, **spoiled}), inputs)
        assert all(everything <= out for out in lost)
        assert len(lost) == len(eqn.outvars)
    assert "inside" in seen.equation(branch, [frozenset()] * len(branch.invars))[0]


def program() -> dict[str, Any]:
    """Values that come out of everything JAX has for keeping one from being followed, and their way back."""
    a, b, c, d = (mark(jnp.asarray(0.3), n) for n in "abcd")
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    box = jax.new_ref(jnp.zeros(3))
    box[0] = a
    kept: list[Any] = []
    jax.experimental.io_callback(lambda x: kept.append(x), None, b, ordered=True)

    @jax.custom_vjp
    def solved(x: Any) -> Any:
        return jax.pure_callback(np.asarray, shape, x)

    solved.defvjp(lambda x: (solved(x), x), lambda x, g: (g,))
    return {
        "mutable": box[:],
        "kept outside": jax.experimental.io_callback(lambda: kept[-1], shape, ordered=True),
        "loop": jax.lax.while_loop(lambda s: s[0] < c, lambda s: (s[0] + 1, s[1] * a, s[2]), (0.0, 1.0, b)),
        "own derivative": solved(d),
        "simulator": jax.pure_callback(np.asarray, shape, jax.lax.stop_gradient(d) + a),
        "steps": jnp.floor(d) + (d > 0) + jax.lax.scan(lambda s, x: (s * x, None), 1.0, jnp.ones(3) * d)[0],
    }


def test_what_cannot_be_followed_depends_on_all_that_went_in():
    of = dependencies.dependencies(program).of
    assert of["mutable"] >= {"a"}
    assert of["kept outside"] >= {"b"}
    assert of["loop"] == ({"c"}, {"a", "c"}, {"b"})
    assert of["own derivative"] == {"d"}
    assert of["simulator"] == {"a", "d"}
    assert of["steps"] == {"d"}


def test_operations_without_a_derivative_are_found_on_the_way_to_a_drawn_value():
    stuck = dependencies.dependencies(lambda: {k: v for k, v in program().items() if k != "kept outside"}).stuck
    assert stuck.pop("b") == "io_callback"
    assert re.fullmatch("pure_callback|while loop", stuck.pop("a"))
    assert not stuck  # neither c, which only decides how often, nor d, whose way has a derivative or carries none
