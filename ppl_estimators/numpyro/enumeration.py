"""Values of enumerated sites, laid out side by side to the left of all plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.contrib.control_flow.scan import _promote_fn_shapes
from numpyro.primitives import Messenger

from ..core.elimination import Axis, Time
from ..core.enumeration import Cell, check_elements, check_mark, marked, placed
from ..core.errors import site_error
from ..core.families import ONEHOT
from ..core.site import Plate
from .distributions import SCANS, family, unwrapped

Message = dict[str, Any]

_FAR = 56  # so many dimensions of an array, and some to spare
_GAP = (
    4  # so far are those of a scan apart: more than a value has event dimensions, and its rank tells which is its first
)


class Layout:
    """Where the values of enumerated sites lie in one run of guide and model.

    ``shapes``: of all batches, by side and site, if nothing is enumerated; None for a run that finds out, and draws
    what it has to. ``asked``: is a site that only the model has to be summed out, though no mark says so?
    """

    def __init__(
        self, shapes: Mapping[tuple[str, str], tuple[int, ...]] | None, asked: Callable[[str, Mapping[str, Any]], bool]
    ):
        self.shapes, self.asked = shapes, asked
        self.nesting = None if shapes is None else max(map(len, shapes.values()), default=0)  # dimensions of plates
        self.axes: dict[int, Axis] = {}  # by dimension
        self._dims: dict[str, int] = {}
        self._next = -1 - (self.nesting or 0)
        self._scans = 0

    def around(self, msg: Message, drawn: Mapping[str, Message] | None, *, inside: bool = False) -> Any | None:
        """All values of a site, if it is to be enumerated; ``drawn`` is what the guide drew, for a run of the model.
        ``inside`` a scan a site that only the model has needs no mark."""
        name, fn, of_guide = msg["name"], msg["fn"], drawn is None
        if inside and drawn is not None and is_stepwise(drawn.get(name)):
            of_guide, fn = True, drawn[name]["fn"]
        elif not self._wanted(msg, drawn, inside):
            return None
        else:
            dims = frozenset(f.dim for f in msg["cond_indep_stack"])
            check_elements(name, fn, unwrapped(fn), countable(fn), dims, self.nesting or 0)
        values = support(fn)
        (size, *event), dim = values.shape, self.place(name, _GAP if inside else 1)
        self.axes[dim] = Plate(name, dim, size, values=True, ago=0 if inside else None) if of_guide else name
        msg["enumerated"], msg["summed"] = dim, not of_guide
        return jnp.reshape(values, (size, *(1,) * (-1 - dim), *event))

    def place(self, name: str, gap: int = 1) -> int:
        """A dimension of its own."""
        if name not in self._dims:
            self._dims[name] = self._next - gap + 1
            self._next -= gap
            if self._next < -_FAR:
                raise site_error(
                    name,
                    f"enumerated beside {len(self.axes)} others, each along a dimension of its own, of which an array "
                    f"has {_FAR} at most",
                    "Draw the steps of a chain in numpyro.contrib.control_flow.scan, or mark fewer sites.",
                )
        return self._dims[name]

    def _wanted(self, msg: Message, drawn: Mapping[str, Message] | None, unmarked: bool) -> bool:
        name = msg["name"]
        if self.nesting is None or (drawn is not None and name in drawn):
            return False
        if marked(msg["infer"], "guide" if drawn is None else "model"):
            check_mark(name, msg["infer"])
            return True
        return drawn is not None and (unmarked or self.asked(name, msg["infer"])) and countable(msg["fn"])

    # ---- scans -----------------------------------------------------------------------------------------------------

    def scan(self, drawn: Mapping[str, Message] | None, scan_wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        """NumPyro's scan, some of whose sites may be enumerated.

        A value that goes from step to step lies along one dimension when a step begins, and along another, that of the
        site, when it ends; there it is moved from this to that. After the scan it lies where a step would begin.

        What the scan begins with often has plates that no value has which is carried on. Then the first steps are apart
        from the scan, or all would be as large as these.
        """
        f, carry, xs, length, reverse = args
        length = jnp.shape(jax.tree.leaves(xs)[0])[0] if length is None else length
        self._scans += 1
        found = _Scan(self, drawn, f"scan {self._scans}", kwargs.pop("history", 1))
        run, firsts = partial(scan_wrapper, reverse=reverse, **kwargs), list[tuple[Any, Any]]()
        outside = dict(self.axes)
        try:
            while True:
                wide, spare = found.begin(partial(run, xs=xs, length=length), f, carry)
                if not (spare and found.sizes) or found.draws or len(firsts) == found.history or length == 1:
                    break
                now, xs = _first(xs, reverse)
                (_, key, _), (trace, (ends, ys)) = run(found.end(f), carry, xs=now, length=1)
                run, length, carry = partial(run, rng_key=key), length - 1, jax.tree.map(lambda x: x[0], ends)
                firsts.append((trace, ys))
            if not found.sizes:
                return run(f, wide, xs=xs, length=length)
            (steps, key, last), (trace, ys) = run(found.step(f, wide), wide, xs=xs, length=length)
            inside = {**self.axes, **{found.before(n, k): found.axis(n, k) for n, k in found.moves}}
        finally:
            self.axes = outside
        found.check()
        names = {
            n: tuple(_before(n, k) for k in range(found.depth(n), -1, -1))
            for n, k in found.moves
            if k == 1 and not found.of_guide(n)
        }
        time = Time(found.name, bool(reverse), tuple((names[n], found.sizes[n]) for n in names))
        for msg in trace.trace.values():
            msg["time"], msg["scope"] = time, inside
            msg["firsts"] = [first.trace[msg["name"]] for first, _ in firsts]
            if msg["type"] == "deterministic":
                msg["value"] = in_turn([m["value"] for m in steps_of(msg)], reverse)
        ys = jax.tree.map(lambda *parts: in_turn(parts, reverse), *(y for _, y in firsts), ys)
        self.axes |= {found.before(n, k): found.axis(n, k, last=True) for n, k in found.moves}
        return (steps + len(firsts), key, last), (trace, ys)


def _first(xs: Any, reverse: bool) -> tuple[Any, Any]:
    """What a scan is over in its first step, and in the others."""
    now, later = (slice(-1, None), slice(-1)) if reverse else (slice(1), slice(1, None))
    return jax.tree.map(lambda x: x[now], xs), jax.tree.map(lambda x: x[later], xs)


def in_turn(parts: Sequence[Any], reverse: bool) -> Any:
    """Arrays that have some steps of a scan each, in the order in which they were run."""
    if len(parts) == 1:
        return parts[0]
    shape = jnp.broadcast_shapes(*(x.shape[1:] for x in parts))
    parts = [jnp.reshape(x, (x.shape[0], *(1,) * (len(shape) - x.ndim + 1), *x.shape[1:])) for x in parts]
    return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], *shape)) for x in parts[:: -1 if reverse else 1]])


def _before(name: str, steps: int) -> str:
    return name if steps == 0 else f"{name} {steps} before"


class _Scan:
    """What goes from step to step in a scan."""

    def __init__(self, layout: Layout, drawn: Mapping[str, Message] | None, name: str, history: int):
        self.layout, self.drawn, self.name, self.history = layout, drawn, name, history
        self.sizes: dict[str, int] = {}  # of the sites that are enumerated
        self.moves: dict[tuple[str, int], None] = {}  # which are carried, as the value of so many steps before
        self.draws = False  # has it sites that are not?

    def of_guide(self, name: str) -> bool:
        return self.drawn is None or name in self.drawn

    def axis(self, name: str, ago: int, last: bool = False) -> Axis:
        """Along the dimension of what was so many steps before: in a step, and what the ``last`` one leaves there."""
        if self.of_guide(name):
            return Plate(name, self.before(name, ago), self.sizes[name], values=True, ago=ago - last, last=last)
        return _before(name, ago - last)

    def check(self) -> None:
        """Steps of the model take the values of the guide's in the order in which these are stacked."""
        drawn = self.drawn or {}
        for name in {n for n, _ in self.moves if n in drawn}:
            if drawn[name]["time"].reverse:
                raise site_error(
                    name,
                    "enumerated in a scan of the guide that runs backwards, and carried by that of the model, whose "
                    "steps take its values in the other order",
                    "Write both without reverse=True, or remove the mark in the guide.",
                )

    def before(self, name: str, steps: int) -> int:
        return self.layout.place(_before(name, steps), _GAP)

    def depth(self, name: str) -> int:
        return max(k for n, k in self.moves if n == name)

    def begin(self, run: Any, f: Any, carry: Any) -> tuple[Any, bool]:
        """``carry``, wide enough for whatever a step ends with; is it wider than that?"""
        while True:
            ends: list[Any] = []

            def probe(carry: Any, x: Any, ends: list[Any] = ends) -> Any:
                with _Inside(self):
                    after, _ = f(carry, x)
                ends.append(jax.eval_shape(partial(jax.tree.map, self.moved), after))
                return carry, None

            jax.eval_shape(lambda carry: run(probe, carry)[0][0], carry)
            wide = jax.tree.map(_wide, carry, ends[-1])
            here, grown, end = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (carry, wide, ends[-1]))
            if here == grown:
                return carry, here != end
            carry = wide

    def end(self, f: Any) -> Any:
        """A step whose end is not carried, but comes out of it."""

        def step(before: Any, x: Any) -> Any:
            with _Inside(self):
                after, y = f(before, x)
            return before, (jax.tree.map(self.moved, after), y)

        return step

    def step(self, f: Any, carry: Any) -> Any:
        def step(before: Any, x: Any) -> Any:
            with _Inside(self):
                after, y = f(before, x)
            return jax.tree.map(lambda a, b: jnp.broadcast_to(self.moved(a), jnp.shape(b)), after, before), y

        return step

    def moved(self, x: Any) -> Any:
        """What a step ends with, as the next begins with it."""
        x = jnp.asarray(x)
        ends = {self.before(n, k) for n in self.sizes for k in range(self.history + 1)}
        events = next((e for d in sorted(ends) if 0 <= (e := x.ndim + d) < _GAP), None)
        if events is None:
            return x

        def at(dim: int) -> int:
            return x.ndim + dim - events

        def lies(name: str, steps: int) -> bool:
            dim = at(self.before(name, steps))
            return dim >= 0 and x.shape[dim] != 1

        for n in self.sizes:
            if lies(n, self.history):
                raise site_error(
                    n,
                    f"summed out in a scan that carries what depends on its value {self.history + 1} steps before",
                    f"Say how far a step looks back, scan(..., history={self.history + 1}); what depends on all steps "
                    "before can't be carried.",
                )
            for k in range(self.history, 0, -1):
                if lies(n, k - 1):
                    self.moves.setdefault((n, k))
                    x = jnp.reshape(x, (*(1,) * max(0, -at(self.before(n, k))), *x.shape))
                    x = jnp.swapaxes(x, at(self.before(n, k - 1)), at(self.before(n, k)))
        return x


def _wide(x: Any, end: Any) -> Any:
    shape = jnp.broadcast_shapes(jnp.shape(x), end.shape)
    return x if shape == jnp.shape(x) else jnp.broadcast_to(jnp.asarray(x, end.dtype), shape)


class _Inside(Messenger):
    """Lays out enumerated sites inside a step of a scan."""

    def __init__(self, scan: _Scan):
        super().__init__()
        self.scan, self._promote = scan, _promote_fn_shapes()

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "control_flow":  # something may be drawn in there
            self.scan.draws = True
        if msg["type"] != "sample" or msg["value"] is not None or msg["is_observed"]:
            return
        # no mark reaches the inside of a scan of the model: NumPyro's own handler marks all that can be summed there
        value = self.scan.layout.around(msg, self.scan.drawn, inside=True)
        if value is None:
            self.scan.draws = True
            if twin := (self.scan.drawn or {}).get(msg["name"]):  # as wide as what `replay` puts in its place
                msg["value"] = twin["value"][0] if "scan" in twin else twin["value"]
        else:
            msg["value"] = value
            self.scan.sizes[msg["name"]] = value.shape[0]
            self._promote.postprocess_message(msg)  # or the steps would lie along different dimensions of the two


def countable(fn: Any) -> bool:
    """Has a distribution finitely many values, which it lists?"""
    return bool(fn.has_enumerate_support) or family(fn) == ONEHOT


def support(fn: Any) -> Any:
    """The values of one element, ``[values, *event]``. NumPyro's one-hot categorical is a multinomial, which does not
    list them."""
    if family(fn) == ONEHOT:
        return jnp.eye(fn.event_shape[0], dtype=int)
    values = fn.enumerate_support(expand=False)
    return jnp.reshape(values, (values.shape[0], *values.shape[1 + len(fn.batch_shape) :]))


def is_enumerated(msg: Message) -> bool:
    return "enumerated" in msg


def is_summed(msg: Message) -> bool:
    """Is it a site that only the model has, and enumerates?"""
    return msg.get("summed", False)


def is_stepwise(msg: Message | None) -> bool:
    """Is it enumerated in each step of a scan?"""
    return msg is not None and is_enumerated(msg) and "time" in msg


def steps_of(msg: Message) -> list[Message]:
    """A message, and before it those of the first steps of its scan that are apart from the others."""
    return [*msg.get("firsts", ()), msg]


def cell(side: str, msg: Message, plates: frozenset[Plate], layout: Layout) -> Cell:
    """Where a message's log probability lies."""
    fn, scale, time = msg["fn"], 1.0 if msg["scale"] is None else msg["scale"], msg.get("time")
    scans = msg["infer"].get(SCANS, 0)
    batches = [
        jnp.broadcast_shapes(m["fn"].batch_shape, jnp.shape(m["value"])[: jnp.ndim(m["value"]) - fn.event_dim])
        for m in steps_of(msg)
    ]
    own = jnp.broadcast_shapes(*(shape[scans:] for shape in batches))
    plain = (layout.shapes or {}).get((side, msg["name"]), ())
    for dim in range(-min(len(own), layout.nesting or 0), 0):
        if own[dim] not in (1, plain[dim] if -dim <= len(plain) else 1):
            raise site_error(
                msg["name"],
                f"batch dimension {dim} has size {own[dim]} only where all values of an enumerated site are there at "
                "once, which lie left of all plates",
                "Count dimensions from the right and keep those of plates, x.sum(-1, keepdims=True); what sums over "
                "the elements of a plate can't see an enumerated site in it.",
            )
    axes = placed(msg["name"], own, msg.get("scope", layout.axes), layout.nesting or 0)
    return Cell(plates, axes if time is None else {**axes, -scans - len(own): time}, is_summed(msg), scale)
