"""What a program reads beside its arguments, and whether it is still the same: numbers, tensors (the objects, not their
data) and functions in globals, closures, attributes and containers; arrays of numpy, with their data."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .dependencies import _ATOMS, _ELEMENTS, _ELSEWHERE, _MODULE, _OBJECTS, _WALKED, _names

_MISSING = object()
_SCALARS = frozenset((bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
# Their own accounts may change from run to run; of these everything counts.
_PLAIN = (dict, list, set, deque, types.FunctionType, type)
_PARTS = (types.FunctionType, types.MethodType, types.ModuleType, type)
_THINGS = 20_000  # looked into
_MANY = 10_000  # elements of a container whose change is seen, and of an array
#: of what every module has, what acts on its results
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

#: what holds something, under which key (None for the variable of a closure), what it held, and is it a library's own?
Slot = tuple[Any, Any, Any, bool]


class Guard:
    """What functions, modules and objects of a program hold, as it is now."""

    def __init__(self, *roots: Any):
        self.tensors: dict[int, torch.Tensor] = {}
        self._slots: list[Slot] = []
        self._contents: list[tuple[Any, Any, bool]] = []
        seen: set[int] = set()
        queue = deque(roots)
        while queue and len(seen) < _THINGS:
            thing = queue.popleft()
            kind: Any = type(thing)
            if isinstance(thing, torch.Tensor):
                self.tensors[id(thing)] = thing
            elif kind not in _ATOMS and id(thing) not in seen:
                seen.add(id(thing))
                library = not issubclass(kind, _PLAIN) and kind.__module__.partition(".")[0] in _ELSEWHERE
                if isinstance(thing, (dict, list, set, deque, np.ndarray)):
                    self._contents.append((thing, _content(thing), False))
                elif not issubclass(kind, _PARTS) and isinstance(own := getattr(thing, "__dict__", None), dict):
                    # a further attribute may hide one of its class
                    self._contents.append((own, len(own), library))
                for holder, key in _holders(thing, kind):
                    if holder is _MISSING:  # it can hold nothing else
                        queue.append(key)
                    else:
                        self._slots.append((holder, key, _held(holder, key), library))
                        queue.append(self._slots[-1][2])

    def changed(self) -> str | None:
        """Something that is another now, in words."""
        for slot in self._slots:
            holder, key, value, _ = slot
            try:
                now = holder[key] if key is not None else holder.cell_contents
            except (KeyError, IndexError, ValueError):
                now = _MISSING
            if now is not value and not _equal(now, value):
                return _words(slot)
        for thing, content, _ in self._contents:
            if not _holds(thing, content):
                return f"a {type(thing).__name__}"
        return None

    def settled(self) -> str | None:
        """After a run of the program: something that the run has changed, but for the accounts of libraries, which are
        watched no more."""
        self._slots = [s for s in self._slots if not s[3] or (now := _held(*s[:2])) is s[2] or _equal(now, s[2])]
        self._contents = [c for c in self._contents if not c[2] or _holds(*c[:2])]
        return self.changed()


def _held(holder: Any, key: Any) -> Any:
    try:
        return holder[key] if key is not None else holder.cell_contents
    except (KeyError, IndexError, ValueError):
        return _MISSING


def _content(thing: Any) -> Any:
    """Of a container the number of its elements, if each of them is watched; otherwise these."""
    if isinstance(thing, np.ndarray):
        return (thing.shape, thing.dtype, thing.tobytes()) if thing.size <= _MANY else None
    if isinstance(thing, set):
        return frozenset(thing) if len(thing) <= _MANY else len(thing)
    values = thing.values() if isinstance(thing, dict) else thing
    return len(thing) if _few(values) or len(thing) > _MANY else tuple(values)


def _holds(thing: Any, content: Any) -> bool:
    if type(content) is int:
        return len(thing) == content
    if type(content) is frozenset:
        return bool(thing == content)
    if isinstance(thing, np.ndarray):
        return content is None or (thing.shape, thing.dtype, thing.tobytes()) == content
    values = thing.values() if isinstance(thing, dict) else thing
    return len(thing) == len(content) and all(map(operator.is_, values, content))


class _Slots:
    """Attributes in slots, as entries of a dictionary."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.thing, name)
        except AttributeError as error:
            raise KeyError(name) from error


def _equal(now: Any, value: Any) -> bool:
    if type(now) is tuple and type(value) is tuple:
        return len(now) == len(value) and all(a is b or _equal(a, b) for a, b in zip(now, value, strict=True))
    return type(now) is type(value) and type(now) in _SCALARS and bool(now == value)


def _words(slot: Slot) -> str:
    holder, key = slot[:2]
    if key is None:
        return f"a variable of an enclosing function ({_held(holder, key)!r})"
    module = holder.get("__name__") if isinstance(holder, dict) else None
    return f"{key!r}" + (f" of module {module}" if isinstance(module, str) else "")


def _holders(thing: Any, kind: Any) -> Iterator[tuple[Any, Any]]:
    """Where a thing holds what it leads to."""
    if kind is types.FunctionType:
        yield from _of_function(thing)
    elif kind is types.MethodType:
        yield from _leads(thing.__self__, thing.__func__)
    elif issubclass(kind, functools.partial):
        yield from _leads(thing.func, thing.args, thing.keywords)
    elif issubclass(kind, weakref.ref):
        yield from _leads(thing())
    elif kind in (staticmethod, classmethod):
        yield from _leads(thing.__func__)
    elif kind is property:
        yield from _leads(thing.fget)
    elif issubclass(kind, (tuple, set, frozenset)):
        yield from _leads(*(thing if _few(thing) else ()))
    elif issubclass(kind, dict):
        yield from ((thing, k) for k in (thing.keys() if _few(thing.values()) else ()))
    elif issubclass(kind, (list, deque)):
        yield from ((thing, i) for i in (range(len(thing)) if _few(thing) else ()))
    elif isinstance(thing, type):
        if thing.__module__.partition(".")[0] not in _ELSEWHERE:
            yield from ((vars(thing), k) for k in vars(thing) if k not in ("__dict__", "__weakref__", "__doc__"))
            yield from _leads(*thing.__bases__)
    elif kind.__module__.partition(".")[0] not in _ELSEWHERE or kind.__module__.startswith(_WALKED):
        held = getattr(thing, "__dict__", {})
        yield from _leads(kind)
        yield from ((held, k) for k in held if k not in _MODULE or k == "training")
        if isinstance(thing, torch.nn.Module):
            yield from _leads(*(held.get(k) for k in _HOOKS))
        slots = [vars(c).get("__slots__", ()) for c in kind.__mro__]
        names = [n for some in slots for n in ((some,) if isinstance(some, str) else some)]
        yield from ((_Slots(thing), n) for n in names if n not in ("__dict__", "__weakref__"))


def _leads(*things: Any) -> Iterator[tuple[Any, Any]]:
    return ((_MISSING, thing) for thing in things if thing is not None)


def _few(things: Any) -> bool:
    return len(things) <= _ELEMENTS or (len(things) <= _OBJECTS and isinstance(next(iter(things)), torch.Tensor))


def _of_function(function: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    yield from ((cell, None) for cell in function.__closure__ or ())
    yield from _leads(function.__defaults__, function.__kwdefaults__, vars(function) or None)
    if (function.__module__ or "").partition(".")[0] in _ELSEWHERE:
        return
    names, scopes = _names(function.__code__), [function.__globals__]
    for held in scopes:  # which grow by modules that are named
        for n in names:
            if n in held:
                yield held, n
                module = held[n]
                if type(module) is types.ModuleType and module.__name__.partition(".")[0] not in _ELSEWHERE:
                    scopes += [vars(module)] if all(vars(module) is not s for s in scopes) else []
