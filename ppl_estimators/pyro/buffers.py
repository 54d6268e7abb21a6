"""What a program writes beside its parameters: buffers of modules (the averages of batch normalisation); numbers,
texts, flags, arrays, and lists and sets of these, in attributes, dictionaries, closures and globals. Further runs leave
it as one run does. Not seen is what is written in place, into arrays or long lists, for the first time after the first
step of a structure; what a call's arguments hold, from then on; what Python does not lead to, files and the like."""

from __future__ import annotations

import types
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from .dependencies import globals_of, own_attributes, walked
from .hook import Wrapped

_ABSENT = object()
_NUMBERS = (int, float, complex)
_FLAGS = (bool, str, bytes, type(None))
_LARGE = 1 << 20  # elements; what is written into larger tensors is noticed only in modules
_LONG = 10_000  # a list
_SHORT = 100  # one that is looked at in every step
_PLACES = 256  # most that are remembered
_NEW = 16  # most entries that a run adds to a dictionary, unless it is a cache
_DICTIONARIES = (dict, Counter, OrderedDict, defaultdict)


class Slot(NamedTuple):
    """A place where a program keeps something: an entry of ``owner``, if that is a dictionary or a class; all of it, if
    it is a list or a set; the content of a cell or of an array."""

    owner: Any
    key: Any = None

    def read(self) -> Any:
        if type(self.owner) is dict:  # most are, and are read in every step
            return self.owner.get(self.key, _ABSENT)
        if isinstance(self.owner, torch.Tensor):
            return self.owner.detach().clone()
        if isinstance(self.owner, np.ndarray):
            return self.owner.copy()
        if isinstance(self.owner, types.CellType):
            return _content(self.owner)
        if isinstance(self.owner, (MutableMapping, type)):
            return (vars(self.owner) if isinstance(self.owner, type) else self.owner).get(self.key, _ABSENT)
        return frozenset(self.owner) if isinstance(self.owner, set) else tuple(self.owner)

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
            (self.owner.update if isinstance(self.owner, set) else self.owner.extend)(value)


@dataclass
class Held:
    """What places held: the modules' buffers (as a copy of each, beside the tensor itself), and all else; ``open``, of
    which a run that is being watched will show whether they are written to, as ``entries``, the keys of dictionaries,
    will show which it adds; all that were are ``noted``."""

    buffers: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rest: list[tuple[Slot, Any]] = field(default_factory=list)
    open: list[tuple[Slot, Any]] = field(default_factory=list)
    entries: list[tuple[Any, frozenset[Any]]] = field(default_factory=list)
    noted: Callable[[Slot], None] | None = None

    def settle(self) -> None:
        """The first run is over."""
        found = []
        for slot, value in self.open:
            if (now := slot.read()) is not value and _written(value, now):
                found.append((slot, value, now))
        for owner, keys in self.entries:
            if len(owner) <= len(keys) + _NEW:
                found += [(Slot(owner, k), _ABSENT, owner[k]) for k in owner if k not in keys and owner[k] is not None]
        for slot, value, now in found:  # something that the first call makes, and a flag that says so: they go together
            self.rest.append((slot, value))
            if self.noted is not None and (now is _ABSENT or _inert(now)):
                self.noted(slot)
        self.open, self.entries = [], []


class Buffers:
    """The places that a program writes to, as far as its runs were watched."""

    def __init__(self) -> None:
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._places: OrderedDict[tuple[int, Any], Slot] = OrderedDict()
        self._open: tuple[list[Slot], list[Any]] = [], []
        self._alive: list[weakref.ref[Any]] = []  # model and guide, of whose places that is

    @contextmanager
    def watched(self, model: Any, guide: Any, *given: Any) -> Iterator[Held]:
        """Notes which places a run inside writes to; what these held before. ``given``: what it is called with."""
        while isinstance(guide, Wrapped):  # whose accounts are ours
            guide = guide.guide
        slots, dictionaries = _slots(model, guide)
        self._watch(model, guide, slots, dictionaries)
        its_slots, its_dictionaries = _slots(*given)
        held, seen = self._held([*slots, *its_slots], [*dictionaries, *its_dictionaries]), set()

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

    def _held(self, slots: list[Slot], dictionaries: list[Any]) -> Held:
        entries = [(d, frozenset(d)) for d in dictionaries]
        return Held(open=[(slot, slot.read()) for slot in slots], entries=entries, noted=self._note)

    def _note(self, slot: Slot) -> None:
        self._places[id(slot.owner), slot.key] = slot
        while len(self._places) > _PLACES:
            self._places.popitem(last=False)

    def _watch(self, model: Any, guide: Any, slots: list[Slot], dictionaries: list[Any]) -> None:
        """From now on every first run is looked after, as long as model and guide live: it may begin to write where it
        did not. Of arrays that would take a copy of each."""

        def forget(_: Any) -> None:
            self._open = [], []

        forget(None)
        with suppress(TypeError):
            self._alive = [weakref.ref(x, forget) for x in (model, guide)]
            quick = [s for s in slots if not isinstance(s.owner, (torch.Tensor, np.ndarray)) and _few(s.owner)]
            self._open = quick[:_PLACES], [d for d in dictionaries if len(d) <= _SHORT][:_PLACES]

    def held(self, *, runs_again: bool = False) -> Held:
        """What the places hold now; others too, if the run that comes is followed by more: it may begin to write."""
        held = self._held(*self._open) if runs_again else Held()
        held.rest = [(slot, slot.read()) for slot in self._places.values()]
        held.buffers = [h for module in self._modules for h in _copied(module)]
        return held

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
        before.settle()
        with torch.no_grad():
            for module, key, tensor, value in before.buffers:
                tensor.copy_(value)
                module._buffers[key] = tensor
            for slot, value in before.rest:
                slot.write(value)


def _few(owner: Any) -> bool:
    return isinstance(owner, (type, types.CellType, dict)) or len(owner) <= _SHORT


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
    # Pyro makes a module's parameters at its first call, and has them in its store from then on.
    its = [m for m in everything if isinstance(m, PyroModule) or (isinstance(m, torch.nn.Module) and not _users(m))]
    parts = {id(d) for m in its for d in (m._parameters, m._modules, vars(m).get("_pyro_params"))}
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
                if _inert(_content(cell)):
                    add(cell)
            for name in globals_of(thing):
                if _inert(thing.__globals__[name]):
                    add(thing.__globals__, name)
        elif type(thing) in (list, deque, set):
            if _inert(list(thing)):
                add(thing)
        elif type(thing) in _DICTIONARIES:
            if id(thing) in parts:
                continue
            dictionaries.append(thing)
            for key, value in thing.items():
                if _inert(value):
                    add(thing, key)
        elif (own := own_attributes(thing)) is not None:
            prepares = isinstance(thing, (AutoGuide, AutoMessenger))
            owner = thing if isinstance(thing, type) else getattr(thing, "__dict__", {})
            if owner is not thing and not prepares:
                dictionaries.append(owner)
            for key, value in own.items():
                if _inert(value) and not (prepares and value is None):
                    add(owner, key)
    return list(found.values()), dictionaries


def _users(thing: Any) -> bool:
    return own_attributes(thing) is not None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _ABSENT


def _plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, torch.nn.Parameter)
    return type(value) in _NUMBERS or type(value) is np.ndarray or isinstance(value, np.number)


def _inert(value: Any, deep: int = 3) -> bool:
    """Does it hold nothing but what may be put back?"""
    if isinstance(value, (tuple, frozenset, list, set)):
        return deep > 0 and len(value) <= _LONG and all(_inert(x, deep - 1) for x in value)
    if type(value) in _DICTIONARIES:
        return deep > 0 and len(value) <= _LONG and all(_inert(x, deep - 1) for x in value.values())
    return type(value) in _FLAGS or _plain(value)


def _written(before: Any, after: Any) -> bool:
    if isinstance(before, (tuple, frozenset)) and type(after) is type(before):
        both = zip(before, after, strict=True)
        return not (
            len(before) == len(after)
            and (before == after if isinstance(before, frozenset) else all(a is b or _equal(a, b) for a, b in both))
        )
    return not _equal(before, after)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.number)) and type(a) is type(b):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return type(a) is type(b) and type(a) in (*_NUMBERS, *_FLAGS) and bool(a == b)
