"""What a program writes beside its parameters: buffers of modules (the averages of batch normalisation); numbers,
arrays and lists of these in attributes, dictionaries, closures and globals. Further runs leave it as one run does."""

from __future__ import annotations

import types
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from .dependencies import globals_of, own_attributes, walked

_ABSENT = object()
_NUMBERS = (int, float, complex)
_LARGE = 1 << 20  # elements; what is written into larger tensors is noticed only in modules
_LONG = 10_000  # a list
_PLACES = 256  # most that are remembered
_NEW = 16  # most entries that a run adds to a dictionary, unless it is a cache
_DICTIONARIES = (dict, Counter, OrderedDict, defaultdict)


class Slot(NamedTuple):
    """A place where a program keeps something: an entry of ``owner``, if that is a dictionary or a class; all of it, if
    it is a list; the content of a cell or of an array."""

    owner: Any
    key: Any = None

    def read(self) -> Any:
        if isinstance(self.owner, torch.Tensor):
            return self.owner.detach().clone()
        if isinstance(self.owner, np.ndarray):
            return self.owner.copy()
        if isinstance(self.owner, types.CellType):
            return _content(self.owner)
        if isinstance(self.owner, (MutableMapping, type)):
            return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(self.key, _ABSENT)
        return tuple(self.owner)

    def write(self, value: Any) -> None:
        if isinstance(self.owner, torch.Tensor):
            self.owner.data.copy_(value)  # no version moves: what was computed from it may need it
        elif isinstance(self.owner, np.ndarray):
            np.copyto(self.owner, value)
        elif isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        elif isinstance(self.owner, type):
            setattr(self.owner, self.key, value)
        elif isinstance(self.owner, MutableMapping):
            if value is _ABSENT:
                self.owner.pop(self.key, None)
            else:
                self.owner[self.key] = value
        else:
            self.owner.clear()
            self.owner.extend(value)


@dataclass
class Held:
    """What places held: the modules' buffers (as a copy of each, beside the tensor itself), and all else; ``open``, of
    which a run that is being watched will show whether they are written to, as ``entries``, the keys of dictionaries,
    will show which it adds."""

    buffers: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rest: list[tuple[Slot, Any]] = field(default_factory=list)
    open: list[tuple[Slot, Any]] = field(default_factory=list)
    entries: list[tuple[Any, frozenset[Any]]] = field(default_factory=list)

    def settle(self) -> None:
        """The first run is over."""
        self.rest += [(slot, value) for slot, value in self.open if _written(value, slot.read())]
        for owner, keys in self.entries:
            added = [k for k in owner if k not in keys] if len(owner) <= len(keys) + _NEW else []
            self.rest += [(Slot(owner, k), _ABSENT) for k in added if _plain(owner[k])]
        self.open, self.entries = [], []


class Buffers:
    """The places that a program writes to, as far as its runs were watched."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._places: OrderedDict[tuple[int, Any], Slot] = OrderedDict()

    @contextmanager
    def watched(self, *program: Any) -> Iterator[Held]:
        """Notes which places a run inside writes to; what these held before."""
        slots, dictionaries = _slots(*program)
        entries = [(d, frozenset(d)) for d in dictionaries]
        held, seen = Held(open=[(slot, slot.read()) for slot in slots], entries=entries), set()

        def note(module: torch.nn.Module, _: Any) -> None:
            if module._buffers and id(module) not in seen:
                seen.add(id(module))
                held.buffers.extend(_copied(module))

        hook = register_module_forward_pre_hook(note)
        try:
            with warnings.catch_warnings():  # noting a module of `torch.compile` twice does no harm
                warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
                yield held
        finally:
            hook.remove()
            held.buffers[:] = [
                h for h in held.buffers if h[0]._buffers.get(h[1]) is not h[2] or not torch.equal(h[2], h[3])
            ]
            self._modules.update(module for module, *_ in held.buffers)
            held.settle()
            for slot, _ in held.rest:
                self._places[id(slot.owner), slot.key] = slot
            while len(self._places) > _PLACES:
                self._places.popitem(last=False)

    def held(self) -> Held:
        """What the places hold now."""
        rest = [(slot, slot.read()) for slot in self._places.values()]
        return Held([h for module in self._modules for h in _copied(module)], rest)

    @staticmethod
    @contextmanager
    def lent(before: Held) -> Iterator[None]:
        """Inside, every place holds what it held before (a buffer: a copy of it)."""
        before.settle()
        now = [(module, key, module._buffers.get(key)) for module, key, _, _ in before.buffers]
        rest = [(slot, slot.read()) for slot, _ in before.rest]
        for module, key, _, value in before.buffers:
            module._buffers[key] = value.clone()
        for slot, value in before.rest:
            slot.write(value)
        try:
            yield
        finally:
            for module, key, tensor in now:
                module._buffers[key] = tensor
            for slot, value in rest:
                slot.write(value)

    @staticmethod
    def restore(before: Held) -> None:
        """Every place holds again what it held before."""
        with torch.no_grad():
            for module, key, tensor, value in before.buffers:
                tensor.copy_(value)
                module._buffers[key] = tensor
            for slot, value in before.rest:
                slot.write(value)


def _copied(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]]:
    buffers = [(key, x) for key, x in module._buffers.items() if x is not None and not is_lazy(x)]
    return [(module, key, x, x.detach().clone()) for key, x in buffers]


def _slots(*program: Any) -> tuple[list[Slot], list[Any]]:
    """Places of a program that hold nothing, a number, an array, or a list or a dictionary of these; and dictionaries
    that it may add to."""
    found: dict[tuple[int, Any], Slot] = {}
    dictionaries: list[Any] = []

    def add(owner: Any, key: Any = None) -> None:
        found[id(owner), key] = Slot(owner, key)

    everything = walked(*program)
    buffers = {id(x) for thing in everything if isinstance(thing, torch.nn.Module) for x in thing._buffers.values()}
    for thing in everything:
        if isinstance(thing, torch.Tensor):
            small = not is_lazy(thing) and thing.layout is torch.strided and thing.numel() <= _LARGE
            if small and not thing.requires_grad and id(thing) not in buffers:
                add(thing)
        elif type(thing) is np.ndarray:
            if thing.size <= _LARGE and thing.dtype.kind in "biufc" and thing.flags.writeable:
                add(thing)
        elif isinstance(thing, types.FunctionType):
            for cell in thing.__closure__ or ():
                if _may_be_written(_content(cell)):
                    add(cell)
            for name in globals_of(thing):
                if _may_be_written(thing.__globals__[name]):
                    add(thing.__globals__, name)
        elif type(thing) in (list, deque):
            if len(thing) <= _LONG and all(map(_plain, thing)):
                add(thing)
        elif type(thing) in _DICTIONARIES:
            dictionaries.append(thing)
            for key, value in thing.items():
                if _may_be_written(value):
                    add(thing, key)
        elif (own := own_attributes(thing)) is not None:
            owner = thing if isinstance(thing, type) else getattr(thing, "__dict__", {})
            if owner is not thing:
                dictionaries.append(owner)
            for key, value in own.items():
                if _may_be_written(value):
                    add(owner, key)
    return list(found.values()), dictionaries


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _ABSENT


def _plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, torch.nn.Parameter)
    return type(value) in _NUMBERS or type(value) is np.ndarray or isinstance(value, np.number)


def _may_be_written(value: Any) -> bool:
    return value is None or _plain(value)


def _written(before: Any, after: Any) -> bool:
    """Is it another thing that may be put back?"""
    if before is after:
        return False
    if isinstance(before, tuple):
        same = len(before) == len(after) and all(a is b or _equal(a, b) for a, b in zip(before, after, strict=True))
        return not same and all(map(_plain, after))
    return _plain(after) and not _equal(before, after)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.number)) and type(a) is type(b):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return type(a) is type(b) and type(a) in _NUMBERS and bool(a == b)
