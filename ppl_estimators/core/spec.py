"""Specs: frozen, hashable, comparable values whose repr can be pasted back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable
from typing import Any


class Spec:
    """Base of estimators, baselines and objectives: a frozen dataclass *is* the choice.

    Subclasses are decorated with ``@dataclass(frozen=True, eq=False, repr=False)``. Fields that cannot be hashed
    (arrays, networks of some libraries) are compared by identity, so that every spec can be a dictionary key.
    """

    def _key(self) -> tuple[Any, ...]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return (type(self), *(_hashable(getattr(self, f.name)) for f in fields))

    def structure(self) -> Hashable:
        """The choice without the arrays it brings along, which may be new ones at every step."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return (type(self), *(_structure(getattr(self, f.name)) for f in fields))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = []
        positional = True
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if _same(value, _default(f)):
                positional = False
                continue
            plain = positional and not f.kw_only
            shown.append(_shown(value) if plain else f"{f.name}={_shown(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    """A function by its name, anything else as it shows itself."""
    name = getattr(value, "__name__", None) if callable(value) else None
    return repr(value) if name is None else name


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return ("identity", id(value))
    return value


def _structure(value: Any) -> Hashable:
    if isinstance(value, Spec):
        return value.structure()
    if isinstance(value, tuple):
        return tuple(map(_structure, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, types.FunctionType):  # made anew at every step, perhaps, by the same line
        return value.__code__
    if _hashable(value) is not value:  # an array, or what stands for one while a program is traced
        return "array"
    kind: type = type(value)
    return id(value) if callable(value) else kind


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and _hashable(value) == _hashable(default))
