"""What a program reads beside its arguments, and whether it is still the same: numbers, tensors (the objects, not their
data) and functions in globals, closures, attributes and containers."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from .dependencies import _ATOMS, _ELEMENTS, _ELSEWHERE, _MODULE, _OBJECTS, _WALKED, _names

_MISSING = object()
_SCALARS = frozenset((bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
# Their own accounts may change from run to run; of these everything counts.
_PLAIN = (dict, list, set, deque, types.FunctionType, type)

#: what holds something, under which key (None for the variable of a closure), what it held, and is it a library's own?
Slot = tuple[Any, Any, Any, bool]


class Guard:
    """What functions, modules and objects of a program hold, as it is now."""

    def __init__(self, *roots: Any):
        self.tensors: dict[int, torch.Tensor] = {}
        self._slots: list[Slot] = []
        self._sizes: list[tuple[Any, int]] = []
        seen: set[int] = set()
        queue = deque(roots)
        while queue and len(seen) < _OBJECTS:
            thing = queue.popleft()
            kind: Any = type(thing)
            if isinstance(thing, torch.Tensor):
                self.tensors[id(thing)] = thing
            elif kind not in _ATOMS and id(thing) not in seen:
                seen.add(id(thing))
                library = not issubclass(kind, _PLAIN) and kind.__module__.partition(".")[0] in _ELSEWHERE
                if isinstance(thing, (dict, list, set, deque)):
                    self._sizes.append((thing, len(thing)))
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
        for thing, size in self._sizes:
            if len(thing) != size:
                return f"the length of a {type(thing).__name__}"
        return None

    def settled(self) -> str | None:
        """After a run of the program: something that the run has changed, but for the accounts of libraries, which are
        watched no more."""
        self._slots = [s for s in self._slots if not s[3] or (now := _held(*s[:2])) is s[2] or _equal(now, s[2])]
        return self.changed()


def _held(holder: Any, key: Any) -> Any:
    try:
        return holder[key] if key is not None else holder.cell_contents
    except (KeyError, IndexError, ValueError):
        return _MISSING


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
        for slot in (s for c in kind.__mro__ for s in vars(c).get("__slots__", ()) if s not in ("__dict__",)):
            with suppress(AttributeError):
                yield from _leads(getattr(thing, slot))


def _leads(*things: Any) -> Iterator[tuple[Any, Any]]:
    return ((_MISSING, thing) for thing in things if thing is not None)


def _few(things: Any) -> bool:
    return len(things) <= _ELEMENTS or (len(things) <= _OBJECTS and isinstance(next(iter(things)), torch.Tensor))


def _of_function(function: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    yield from ((cell, None) for cell in function.__closure__ or ())
    yield from _leads(function.__defaults__, function.__kwdefaults__, vars(function) or None)
    if (function.__module__ or "").partition(".")[0] in _ELSEWHERE:
        return
    names, held = _names(function.__code__), function.__globals__
    for n in names:
        if n in held:
            yield held, n
            module = held[n]
            if type(module) is types.ModuleType and module.__name__.partition(".")[0] not in _ELSEWHERE:
                yield from ((vars(module), m) for m in names if m in vars(module))
