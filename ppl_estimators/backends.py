"""Which library is this? The one place that knows, and the tools' one way to an adapter.

A library that nobody has imported cannot be meant, so asking imports neither; an adapter is loaded when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from enum import StrEnum
from importlib import import_module
from types import ModuleType
from typing import Any

from .core.errors import EstimatorError
from .measure.look import raised_by


class Library(StrEnum):
    """A library, which compares and prints as its name."""

    pyro = "pyro"
    numpyro = "numpyro"

    @property
    def compiles(self) -> bool:
        """Is the first step of a program slower than the others?"""
        return self is Library.numpyro

    @property
    def adapter(self) -> Any:
        """`ppl_estimators.pyro` or `ppl_estimators.numpyro`."""
        return self.part("")

    def part(self, name: str) -> Any:
        """A file of the adapter."""
        return import_module(f"{__package__}.{self}.{name}".rstrip("."))

    @property
    def gradients(self) -> Any:
        """The class that draws gradients."""
        return self.part("gradients").Gradients

    def stock(self, name: str) -> Any:
        """What the library's own ``infer`` module calls ``name``, None where it has no such thing."""
        return vars(import_module(f"{self}.infer")).get(name)

    def _has(self, thing: Any, name: str) -> bool:
        infer: ModuleType | None = sys.modules.get(f"{self}.infer")
        return infer is not None and isinstance(thing, vars(infer)[name])


def named(name: str) -> Library:
    if name not in list(Library):
        raise EstimatorError(f'backend={name!r} is not known. Write "pyro" or "numpyro", or leave it out.')
    return Library(name)


def of_elbo(thing: Any) -> Library | None:
    """The library whose `ELBO` this is, None where it is neither's."""
    return next((library for library in Library if library._has(thing, "ELBO")), None)


def of_svi(thing: Any) -> Library | None:
    """The library whose `SVI` this is, None where it is neither's."""
    return next((library for library in Library if library._has(thing, "SVI")), None)


def of_program(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Library:
    """Whose sample statements run when the guide does (or the model, if the guide has none).

    Parameter store and random state stay as they are. Raises `EstimatorError` where that run fails, and where it is of
    neither or of both.
    """
    loaded = [library for library in Library if library in sys.modules]
    if len(loaded) == 1:
        return loaded[0]
    for role, program in (("guide", guide), ("model", model)) if loaded else ():
        with ExitStack() as stack, raised_by(role):
            heard = {library: stack.enter_context(library.part("look").listening()) for library in loaded}
            program(*args, **kwargs)
        found = [library for library, sites in heard.items() if sites]
        if len(found) == 1:
            return found[0]
        if found:
            raise EstimatorError(
                "the program runs sample statements of both Pyro and NumPyro. Use one of them, or pass backend=."
            )
    raise EstimatorError(
        "neither the guide nor the model runs a sample statement of Pyro or NumPyro. Check that they are the functions "
        'themselves and take these arguments, or pass backend="pyro" or backend="numpyro".'
    )
