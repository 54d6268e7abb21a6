"""One plain run of the user's guide and model, before anything is measured: a mistake is named here, in their terms.

Deep inside a gradient, or under `jit`, the libraries' own words name neither guide nor model nor site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..backends import Library, named, of_elbo, of_program
from ..core.errors import EstimatorError, site_error
from ..measure.gradients import check_sites
from ..measure.look import said


def check_call(call: str, model: Any, guide: Any, args: Any, backend: str | None = None) -> None:
    """Arguments in another order than ``call`` shows."""
    for role, thing in (("model", model), ("guide", guide)):
        if of_elbo(thing) is not None or not callable(thing):
            raise EstimatorError(f"the {role} is {_short(thing)}, not a function. The order is {call}.")
    if not isinstance(args, tuple):
        raise EstimatorError(f"args is {_short(args)}, not a tuple. The order is {call}; write args as (data,).")
    if backend is not None:
        named(backend)


def check_program(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    backend: str | None = None,
    anywhere: bool = True,
) -> Library:
    """The library of the program, after one run of guide and model at the present point.

    ``anywhere``: is the present point the one to be measured? Else its values may be as they like.

    Raises `EstimatorError` where either raises, where they disagree (a latent that the guide forgets, plates, shapes),
    where they stand in each other's place, where there is nothing latent, and for a cost that is not finite.
    """
    library = of_program(model, guide, args, kwargs) if backend is None else named(backend)
    inner, outer = library.part("look").look(model, guide, args, kwargs)
    if not outer.observed and (inner.observed or not inner.latents) and outer.latents:
        seen = f"observes '{inner.observed[0]}'" if inner.observed else "has no latent site"
        raise EstimatorError(
            f"the guide {seen} and the model observes nothing: they seem to be in each other's place. "
            "The model comes first."
        )
    check_sites(inner.latents, ["not yet known"])
    for name, sizes in inner.plates.items():
        if outer.plates.get(name, sizes) != sizes:
            guides, models = ("{1} of {0}".format(*p) for p in (sizes, outer.plates[name]))
            raise EstimatorError(
                f"plate '{name}': {guides} elements in the guide, {models} in the model. "
                "Give both the same size and subsample_size."
            )
    for name, shape in outer.latents.items():
        if name not in inner.latents and name not in outer.enumerated:
            raise site_error(
                name,
                "a latent site of the model that the guide does not draw",
                "Add a site of this name to the guide, observe it with obs=..., or marginalise it in the model.",
            )
        if not _broadcast(shape, inner.latents.get(name, shape)):
            raise site_error(
                name,
                f"its values have shape {inner.latents[name]} in the guide and {shape} in the model",
                "Give both distributions the same batch and event shape.",
            )
    if anywhere:
        for side, ran in (("model", outer), ("guide", inner)):
            for name, value in ran.bad.items():
                raise site_error(
                    name,
                    f"its log probability in the {side} is {value:g} at a draw of the guide",
                    "Look for a value outside the support, a scale of zero or an overflow in its parameters.",
                )
    return library


def within(what: str) -> AbstractContextManager[None]:
    """Whatever else goes wrong in ``what`` is said in one line."""
    return said(f"guide and model run by themselves, but not in {what}:")


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        return False
    return True


def _short(thing: Any) -> str:
    text = repr(thing)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(thing).__name__}"
