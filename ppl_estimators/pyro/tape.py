"""A step as a list of tensor operations: noted while it runs, its backward pass included, tidied, and run again as
plain Python.

The step that is noted is a real one: nothing about it is symbolic, and what cannot be noted (a number read out of a
tensor, a shape that depends on data) changes nothing about it. Random operations draw anew when they are run again. The
state of the generators is a value like any other, which an operation takes and gives: so what two runs of a program
draw alike is drawn once, and generators are rewound only where that is not so.
"""

from __future__ import annotations

import functools
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import dependencies
from .graphs import Graph, card_of
from .randomness import Generators, State

Array = torch.Tensor
_ATEN: Any = torch.ops.aten
_FRESH = _ATEN.lift_fresh.default  # what torch.tensor(...) made of numbers
# They look at shapes and types only, and their result is the same at every step.
_LIKE = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor".split())
_ELEMENTS = 1 << 16  # results that are the same at every step are kept, up to this size
# Ways out of a tensor that are no operations.
_EXITS = frozenset("numpy tolist __array__ data_ptr __dlpack__ __reduce_ex__".split())
_ONE_HOT = torch.nn.functional.one_hot  # looks whether its classes are there; without a number of them, how many
_LIBRARIES = ("torch.distributions.", "pyro.")
_CONSTRAINTS = "torch.distributions.constraints"
# Of those that ask for truth values only to raise errors, in `dependencies.CHECKS`.
_CHECKING = frozenset(("__init__", "_validate_sample", "check_site_shape", "warn_if_nan", "warn_if_inf"))
_OURS = tuple(f"{__name__.partition('.')[0]}.{part}." for part in ("core", "estimators", "pyro"))
_NOBODYS = frozenset(("torch", "pyro", "array_api_compat", "contextlib", "functools"))
_WRAPPERS = frozenset((__name__, dependencies.__name__))  # operations pass through their modes


class Value(int):
    """The number of a tensor on the tape."""

    def __repr__(self) -> str:
        return f"v{int(self)}"


@dataclass
class Operation:
    func: Any
    args: tuple[Any, ...]  # with values instead of tensors
    kwargs: dict[str, Any]
    given: tuple[Value, ...]
    outs: Any  # a value, or a list of values and None
    found: tuple[Value, ...]
    writes: frozenset[int]  # memories that it changes
    before: int | None  # states of the generators, of an operation that draws
    after: int | None


class Tape(TorchDispatchMode):
    """Notes the operations of a step; ``given`` are its arguments. ``reason`` says what cannot be noted."""

    def __init__(self, given: Sequence[Array]):
        super().__init__()
        self.operations: list[Operation] = []
        self.tensors: list[Array] = []
        self.memory: list[int] = []
        self.fixed: set[int] = set()  # values that are the same at every step
        self.written: set[int] = set()  # memories
        self.outside: dict[Value, str] = {}  # tensors that existed before, and where they were first met
        self.reason: str | None = None
        self.unsteady = False
        self.checking = 0  # inside an operation that looks at data only to raise errors
        self.clock, self._ticks = 0, 0
        self._states: dict[int, tuple[State, int]] = {}  # by id, which lives as long
        self._numbers: dict[int, Value] = {}
        self._exits = _Exits(self)
        self.given = [self._new(x) for x in given]

    def __enter__(self) -> Tape:
        self._exits.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._exits.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs: list[Value] = []
        if func is _FRESH and id(args[0]) not in self._numbers:
            self.fixed.add(self._new(args[0]))
        noted_args = self._noted(args, inputs)
        noted_kwargs = {k: self._noted(v, inputs) for k, v in kwargs.items()}
        if not isinstance(result, (torch.Tensor, list, tuple)):
            if result is not None:
                self.read(inputs)
            return result
        self._check(func, args, kwargs, inputs)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        before = after = None
        if draws:
            self._ticks += 1
            before, after, self.clock = self.clock, self._ticks, self._ticks
        writes = frozenset(_memory(x) for x in _written(func, args, kwargs))
        self.written |= writes
        if writes and (draws or not self.fixed.issuperset(inputs)):
            self.fixed = {v for v in self.fixed if self.memory[v] not in writes}
        found: list[Value] = []
        outs = self._results(result, found)
        name = func._schema.name.partition("::")[2]
        if not draws and not writes and (name in _LIKE or self.fixed.issuperset(inputs)):
            self.fixed.update(found)
        self.operations.append(
            Operation(func, noted_args, noted_kwargs, tuple(inputs), outs, tuple(found), writes, before, after)
        )
        return result

    def value(self, x: Array) -> Value | None:
        """The number of a tensor, if it is on the tape."""
        return self._numbers.get(id(x))

    def _new(self, x: Array) -> Value:
        number = self._numbers[id(x)] = Value(len(self.tensors))
        self.tensors.append(x)
        self.memory.append(_memory(x))
        return number

    def _noted(self, x: Any, inputs: list[Value]) -> Any:
        if isinstance(x, torch.Tensor):
            number = self._numbers.get(id(x))
            if number is None:
                number = self._new(x)
                self.outside[number] = _line() or ""
            inputs.append(number)
            return number
        if isinstance(x, (list, tuple)):
            return [self._noted(i, inputs) for i in x]
        if isinstance(x, torch.Generator):
            self._impossible("draws from a generator of its own")
        return x

    def _results(self, x: Any, found: list[Value]) -> Any:
        if isinstance(x, torch.Tensor):
            number = self._numbers.get(id(x))
            if number is None:
                number = self._new(x)
                found.append(number)
            return number
        if isinstance(x, (list, tuple)):
            return [self._results(i, found) for i in x]
        return None

    # ---- what cannot be noted ---------------------------------------------------------------------------------------

    def read(self, inputs: Iterable[Value]) -> None:
        """A number was read out of tensors."""
        if self.checking or all(v in self.fixed and self.memory[v] not in self.written for v in inputs):
            return
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith(dependencies.CHECKS) and frame.f_code.co_name in _CHECKING:
                return
            if module.startswith(_OURS) and module not in _WRAPPERS:
                self.unsteady = True  # the step looked at something for the first time
                return
            if module != _CONSTRAINTS:  # for whom they look is what counts
                if module.startswith(_LIBRARIES) or not (module.startswith("torch.") or module in _WRAPPERS):
                    break
            frame = frame.f_back
        self._impossible("reads a number out of a tensor")

    def _check(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[Value]) -> None:
        if torch.Tag.dynamic_output_shape in func.tags and not self.fixed.issuperset(inputs):
            indices = args[1] if func is _ATEN.index.Tensor else None
            masks = (torch.bool, torch.uint8)
            if indices is None or any(i is not None and i.dtype in masks for i in indices):
                self._impossible("makes a tensor whose shape depends on data")
        if func is _ATEN.as_strided.default and args[3:] not in ((), (None,)):  # counted from where memory begins
            if self.memory[inputs[0]] in [self.memory[v] for v in self.given]:
                self._impossible("looks at a place in the memory of an argument")
        if func._schema.name in ("aten::set_", "aten::resize_"):
            self._impossible("changes the memory of a tensor")

    def refuse(self, why: str) -> None:
        self.reason = self.reason or why

    def _impossible(self, what: str) -> None:
        if self.reason is None:
            self.reason = f"{what}{_line() or ''}"

    # ---- random numbers ---------------------------------------------------------------------------------------------

    def state(self, state: State) -> State:
        """The generators told their state."""
        self._states[id(state)] = state, self.clock
        return state

    def restored(self, state: State) -> None:
        """They were put into a state."""
        if id(state) in self._states:
            self.clock = self._states[id(state)][1]
        else:
            self._impossible("sets the state of a random generator")


class Recorded(Generators):
    """Generators that tell a tape when they are rewound."""

    def __init__(self, generators: Generators, tape: Tape):
        self.__dict__.update(generators.__dict__)
        self.tape = tape

    def state(self, *, everything: bool = False) -> State:
        return self.tape.state(super().state(everything=everything))

    def restore(self, state: State) -> None:
        super().restore(state)
        self.tape.restored(state)


class _Exits(TorchFunctionMode):
    """Sees data leave tensors by ways that are no operations."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        places = [*args[1:2], *kwargs.values()] if name == "tensor_split" else ()  # where to split, which it looks at
        for x in args[:1] if name in _EXITS else places:
            if isinstance(x, torch.Tensor) and self.tape.value(x) not in self.tape.fixed:
                self.tape._impossible("hands the data of a tensor to other code")
        checks = func is _ONE_HOT and (kwargs.get("num_classes", -1) if len(args) < 2 else args[1]) > 0
        self.tape.checking += checks
        try:
            return func(*args, **kwargs)
        finally:
            self.tape.checking -= checks


def _memory(x: Array) -> int:
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse: nothing shares its memory
        return id(x)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Array]:
    """The tensors that an operation changes."""
    if "batch_norm" in func._schema.name and "backward" not in func._schema.name:  # which does not say so
        yield from (x for x in args[3:5] if isinstance(x, torch.Tensor))
    if not func._schema.is_mutable:
        return
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            x = args[i] if i < len(args) else kwargs.get(a.name)
            yield from (y for y in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(y, torch.Tensor))


def _line() -> str | None:
    """Where the user's program is, if it is running."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if not module.startswith(_OURS) and module.partition(".")[0] not in _NOBODYS and name[:1] != "<":
            code = linecache.getline(name, frame.f_lineno).strip()
            return f" at {name}:{frame.f_lineno}: {code}"
        frame = frame.f_back
    return None


# ---- running it again --------------------------------------------------------------------------------------------


@dataclass
class Program:
    """A tape that can be run: ``run(*arguments)`` with those of ``constants`` behind them."""

    run: Callable[..., list[Array]]
    source: str
    calls: list[Any]  # the operations
    constants: list[Array]
    written: list[int] = field(default_factory=list)  # which of its arguments and constants it changes


def compiled(tape: Tape, results: Sequence[Array], generators: Generators, backend: str | None) -> Program:
    """What computes ``results`` again, each in memory of its own; ``backend`` of `torch.compile`, if it is to."""
    wanted = [tape._numbers[id(x)] for x in results]
    operations, same, clock = _merged(tape)
    wanted = [same.get(v, v) for v in wanted]
    needed = _needed(tape, operations, wanted, clock)
    return _Writer(tape, generators, backend).program(needed, wanted, clock)


def _merged(tape: Tape) -> tuple[list[Operation], dict[Value, Value], int]:
    """Operations without names for the same thing, results that are always the same, and what is computed twice."""
    same: dict[Value, Value] = {}
    clocks: dict[int, int] = {}
    known: dict[Any, Any] = {}
    kept: list[Operation] = []
    tidy = _Arithmetic(tape)
    roots: dict[Value, Value] = {}  # whose memory a value sees

    def renamed(x: Any) -> Any:
        if type(x) is Value:
            return same.get(x, x)
        return [renamed(i) for i in x] if type(x) is list else x

    for op in tape.operations:
        free = not any(tape.memory[v] in tape.written for v in (*op.given, *op.found))
        if op.func is _FRESH and not free:
            op = replace(op, func=_ATEN.clone.default)
        if free and op.found and tape.fixed.issuperset(op.found):
            if all(tape.tensors[v].numel() <= _ELEMENTS for v in op.found):
                continue  # kept as it is
        args, kwargs = tuple(map(renamed, op.args)), {k: renamed(v) for k, v in op.kwargs.items()}
        before = None if op.before is None else clocks.get(op.before, op.before)
        op = replace(op, args=args, kwargs=kwargs, given=tuple(same.get(v, v) for v in op.given), before=before)
        if len(op.found) == 1 and not op.writes:
            (out,) = op.found
            root = next((v for v in op.given if tape.memory[v] == tape.memory[out]), None)
            if root is not None:
                root = roots[out] = roots.get(root, root)
                known.setdefault((root, *_layout(tape.tensors[root])), root)
                place = known.setdefault((root, *_layout(tape.tensors[out])), out)
                if place is not out:  # the same memory, seen in the same way
                    same[out] = place
                    continue
            if free:
                op = tidy(op)
                if op.func is None:
                    same[out] = op.given[0]
                    continue
        if free and not op.writes:
            first = known.setdefault((op.func, repr(op.args), repr(op.kwargs), before), op)
            if first is not op:
                same.update(zip(op.found, first.found, strict=True))
                if op.after is not None:
                    clocks[op.after] = first.after
                continue
        kept.append(op)
    return kept, same, clocks.get(tape.clock, tape.clock)


def _layout(x: Array) -> Any:
    return x.shape, x.stride(), x.storage_offset(), x.dtype


class _Arithmetic:
    """Simpler operations with the same result, to the last bit: for what a program and its derivative are full of."""

    def __init__(self, tape: Tape):
        self.tape = tape
        self._negative: dict[Value, Value] = {}
        self._slices: dict[Value, tuple[Any, dict[int, Value]]] = {}  # zero but for these slices

    def __call__(self, op: Operation) -> Operation:
        """``op``, or another for it; without a function if the result is the first that it is given."""
        tensors, (out,) = self.tape.tensors, op.found
        if op.func is _ATEN.neg.default:
            (x,) = op.args
            if x in self._negative:
                return self._is(op, self._negative[x])
            self._negative[out] = x
        elif op.func in (_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.sub.Tensor) and not op.kwargs:
            a, b = op.args
            neutral = 0 if op.func is _ATEN.sub.Tensor else 1
            for x, other in ((a, b), (b, a)) if op.func is _ATEN.mul.Tensor else ((a, b),):
                if type(x) is Value and self._everywhere(other, neutral) and _alike(tensors[x], tensors[out]):
                    return self._is(op, x)
        elif op.func is _ATEN.add.Tensor and not op.kwargs:
            a, b = op.args
            if b in self._negative:
                b = self._negative[b]
                return replace(op, func=_ATEN.sub.Tensor, args=(a, b), given=(a, b))
            if a in self._slices and b in self._slices:
                return self._sum_of_slices(op, a, b)
        elif op.func is _ATEN.select_backward.default:
            gradient, size, dim, index = op.args
            self._slices[out] = (tuple(size), dim % len(size)), {index % size[dim]: gradient}
        return op

    def _is(self, op: Operation, x: Value) -> Operation:
        return replace(op, func=None, given=(x,))

    def _everywhere(self, x: Any, number: int) -> bool:
        if type(x) is not Value:
            return isinstance(x, (int, float)) and x == number
        tensor = self.tape.tensors[x]
        fixed = x in self.tape.fixed and self.tape.memory[x] not in self.tape.written
        return fixed and tensor.numel() <= _ELEMENTS and bool((tensor == number).all())

    def _sum_of_slices(self, op: Operation, a: Value, b: Value) -> Operation:
        """The derivatives of x[0], x[1], ... add up to that of x: they are stacked instead."""
        (whole, some), (also, others) = self._slices[a], self._slices[b]
        if whole != also or not some.keys().isdisjoint(others):
            return op
        (out,), (size, dim) = op.found, whole
        together = some | others
        self._slices[out] = whole, together
        if len(together) < size[dim] or self.tape.tensors[out].numel() < len(together):
            return op
        parts = [together[i] for i in range(size[dim])]
        return replace(op, func=_ATEN.stack.default, args=(parts, dim), given=tuple(parts))


def _alike(x: Array, y: Array) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


def _needed(tape: Tape, operations: Sequence[Operation], wanted: Iterable[Value], clock: int) -> list[Operation]:
    """Those that lead to what is wanted, change what existed before, or leave the generators where they are left."""
    live = set(wanted)
    memories = {tape.memory[v] for v in (*live, *tape.outside, *tape.given)}
    clocks = {clock}
    kept = []
    for op in reversed(operations):
        if live.isdisjoint(op.found) and memories.isdisjoint(op.writes) and op.after not in clocks:
            continue
        kept.append(op)
        live.update(op.given)
        memories.update(tape.memory[v] for v in op.given if tape.memory[v] in tape.written)
        if op.before is not None:
            clocks.add(op.before)
    return kept[::-1]


class _Writer:
    """Writes operations as a Python function."""

    def __init__(self, tape: Tape, generators: Generators, backend: str | None):
        self.tape, self.backend = tape, backend
        self.names: dict[str, Any] = {"save": generators.state, "restore": generators.restore}
        self._named: dict[Any, str] = {}

    def program(self, operations: Sequence[Operation], wanted: Sequence[Value], clock: int) -> Program:
        tape, made = self.tape, {v for op in operations for v in op.found}
        used = dict.fromkeys(v for op in operations for v in op.given)
        given, inputs = set(tape.given), dict.fromkeys([*used, *wanted])
        constants = [v for v in inputs if v not in made and v not in given]
        last = {v: i for i, op in enumerate(operations) for v in (*op.given, *op.found)}
        dying: dict[int, list[Value]] = {}
        for v, i in last.items():
            if v in made and v not in wanted:
                dying.setdefault(i, []).append(v)
        lines, now = [], 0
        returns = _returns(operations, clock)
        if 0 in returns:
            lines.append("s0 = save()")
        for i, op in enumerate(operations):
            if op.before is not None and op.before != now:
                lines.append(f"restore(s{op.before})")
            lines.append(self._line(op))
            if op.after is not None:
                now = op.after
                if now in returns:
                    lines.append(f"s{now} = save()")
            if i in dying:
                lines.append(f"del {', '.join(map(repr, dying[i]))}")
        if now != clock:
            lines.append(f"restore(s{clock})")
        lines.append(f"return [{', '.join(self._own(wanted, inputs, made))}]")
        parameters = [*tape.given, *constants]
        source = f"def run({', '.join(map(repr, parameters))}):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(source, "<compiled step>", "exec"), self.names)
        tensors = tape.tensors
        written = [i for i, v in enumerate(parameters) if tape.memory[v] in tape.written]
        run = self.names["run"]
        card = self._card(operations, [v for v in inputs if v not in made], constants)
        if self.backend is not None:
            # the draws of torch
            options: dict[str, Any] | None = {"fallback_random": True} if self.backend == "inductor" else None
            checks = torch.distributions.Distribution._validate_args
            run = torch.compile(run, backend=self.backend, dynamic=False, options=options)
            torch.distributions.Distribution.set_default_validate_args(checks)  # the compiler has switched them off
        if card is not None and not (self.backend and returns):  # compilers leave calls to generators to Python
            run = Graph(run, self.names, len(tape.given), card, trials=1 if self.backend else 0)
        return Program(run, source, [op.func for op in operations], [tensors[v] for v in constants], written)

    def _card(self, operations: Sequence[Operation], inputs: Iterable[Value], constants: Iterable[Value]) -> Any:
        """That on which the whole step is, if there is one, and its arguments stay what they are."""
        tape = self.tape
        if any(tape.memory[v] in tape.written for v in tape.given):
            return None
        fixed = {v for v in constants if v in tape.fixed and tape.memory[v] not in tape.written}
        made = {*inputs, *(v for op in operations for v in op.found)} - {*tape.given, *fixed}
        return card_of(*([tape.tensors[v] for v in some] for some in (made, tape.given, fixed)))

    def _line(self, op: Operation) -> str:
        func = op.func if self.backend is not None else _binding(op.func)  # which compilers know
        call = f"{self._name(func)}({', '.join(self._arguments(op))})"
        return f"{_pattern(op.outs, op.found)} = {call}" if op.found else call

    def _arguments(self, op: Operation) -> list[str]:
        return [*map(self._text, op.args), *(f"{k}={self._text(v)}" for k, v in op.kwargs.items())]

    def _text(self, x: Any) -> str:
        if type(x) is list:
            return f"[{', '.join(map(self._text, x))}]"
        if x is None or type(x) in (Value, bool, int, str) or (type(x) is float and abs(x) < float("inf")):
            return repr(x)
        return self._name(x)

    def _name(self, x: Any) -> str:
        key = (type(x), id(x))
        if key not in self._named:
            self._named[key] = f"c{len(self._named)}"
            self.names[self._named[key]] = x
        return self._named[key]

    def _own(self, wanted: Sequence[Value], inputs: Iterable[Value], made: set[Value]) -> Iterator[str]:
        """The results, copied where their memory is somebody else's too."""
        tape, taken = self.tape, {self.tape.memory[v] for v in inputs if v not in made}
        for v in wanted:
            x, memory = tape.tensors[v], tape.memory[v]
            whole = x.layout is not torch.strided or x.untyped_storage().nbytes() == x.numel() * x.element_size()
            yield repr(v) if memory not in taken and whole else f"{v!r}.clone()"
            taken.add(memory)


def _returns(operations: Sequence[Operation], clock: int) -> set[int]:
    """States to which the generators return."""
    now, found = 0, set()
    for op in operations:
        if op.before is not None and op.after is not None:
            if op.before != now:
                found.add(op.before)
            now = op.after
    return found | ({clock} if now != clock else set())


def _pattern(outs: Any, found: Sequence[Value]) -> str:
    if type(outs) is list:
        return f"[{', '.join(_pattern(o, found) for o in outs)}]"
    return repr(outs) if outs in found else "_"


def _binding(func: Any) -> Any:
    """What Python calls for an operation: torch's own function or method of its name, which costs half as much."""
    space, _, name = func._schema.name.partition("::")
    if name == "mkldnn_rnn_layer":
        return functools.partial(_followed, func._op)
    if space == "aten":
        for holder in (torch._C._VariableFunctions, torch._C.TensorBase):
            found = getattr(holder, name, None)
            if found is not None:
                return found
    return func._op


def _followed(func: Any, *args: Any) -> Any:
    """For an LSTM on the processor, which makes what its derivative needs only if gradients are asked for."""
    with torch.enable_grad():
        return func(*(x.detach() if isinstance(x, torch.Tensor) else x for x in args))
