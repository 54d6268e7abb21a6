"""Which library a program is written in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from ..core.errors import EstimatorError

BACKENDS = ("pyro", "numpyro")


def backend_of(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """ "pyro" or "numpyro": whose sample statements run when the guide does (or the model, if the guide has none).

    Parameter store and random state stay as they are. A library that nobody has imported cannot be meant.
    Raises `EstimatorError` where that run fails, and where it is of neither or of both.
    """
    loaded = [name for name in BACKENDS if name in sys.modules]
    if len(loaded) == 1:
        return loaded[0]
    for role, program in (("guide", guide), ("model", model)) if loaded else ():
        try:
            found = _ran(program, args, kwargs)
        except EstimatorError:
            raise
        except Exception as error:
            raise EstimatorError(f"the {role} raised {named(error)}") from error
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


def _ran(program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    from numpyro import handlers
    from pyro import poutine

    from ..pyro.exact import untouched

    with ExitStack() as stack:
        stack.enter_context(untouched())
        pyro_trace = stack.enter_context(poutine.trace())
        numpyro_trace = stack.enter_context(handlers.trace())
        stack.enter_context(handlers.seed(rng_seed=0))
        program(*args, **kwargs)
        sites = {"pyro": pyro_trace.trace.nodes, "numpyro": numpyro_trace}
        return [n for n, s in sites.items() if any(site["type"] == "sample" for site in s.values())]


def named(error: Exception) -> str:
    """An exception of somebody else's in one line, without the trace that Pyro appends."""
    text = str(error).partition("Trace Shapes:")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"


def elbo_backend(elbo: Any) -> str | None:
    """The library whose `ELBO` this is, None where it is neither's."""
    modules = {base.__module__.partition(".")[0] for base in type(elbo).__mro__ if base.__name__ == "ELBO"}
    return next((name for name in BACKENDS if name in modules), None)
