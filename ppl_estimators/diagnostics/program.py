"""One plain run of the user's guide and model, before anything is measured: a mistake is named here, in their terms.

Deep inside a gradient, or under `jit`, the libraries' own words name neither guide nor model nor site.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import EstimatorError, site_error
from ..core.gradients import check_sites
from ..testing.library import BACKENDS, backend_of, elbo_backend, named


@dataclass
class Ran:
    """What one run of a guide or a model had: shapes of its latent sites, what it observes, plates with their full and
    drawn size, latents marked to be summed out, sites whose log probability is not finite (and what it was)."""

    latents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    observed: list[str] = field(default_factory=list)
    plates: dict[str, tuple[int, int]] = field(default_factory=dict)
    enumerated: set[str] = field(default_factory=set)
    bad: dict[str, float] = field(default_factory=dict)


def check_call(call: str, model: Any, guide: Any, args: Any, backend: str | None = None) -> None:
    """Arguments in another order than ``call`` shows."""
    for role, thing in (("model", model), ("guide", guide)):
        if elbo_backend(thing) is not None or not callable(thing):
            raise EstimatorError(f"the {role} is {_short(thing)}, not a function. The order is {call}.")
    if not isinstance(args, tuple):
        raise EstimatorError(f"args is {_short(args)}, not a tuple. The order is {call}; write args as (data,).")
    if backend is not None and backend not in BACKENDS:
        raise EstimatorError(f'backend={backend!r} is not known. Write "pyro" or "numpyro", or leave it out.')


def check_program(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    backend: str | None = None,
    anywhere: bool = True,
) -> str:
    """The library of the program, after one run of guide and model at the present point.

    ``anywhere``: is the present point the one to be measured? Else its values may be as they like.

    Raises `EstimatorError` where either raises, where they disagree (a latent that the guide forgets, plates, shapes),
    where they stand in each other's place, where there is nothing latent, and for a cost that is not finite.
    """
    library = backend or backend_of(model, guide, args, kwargs)
    run = _run_pyro if library == "pyro" else _run_numpyro
    inner, outer = run(model, guide, args, kwargs)
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


@contextmanager
def within(what: str) -> Iterator[None]:
    """Whatever else goes wrong in ``what`` is said in one line, with the original as cause."""
    try:
        yield
    except EstimatorError:
        raise
    except Exception as error:
        raise EstimatorError(f"guide and model run by themselves, but not in {what}: {named(error)}") from error


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        return False
    return True


def _short(thing: Any) -> str:
    text = repr(thing)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(thing).__name__}"


# ---- one run in each library ----------------------------------------------------------------------------------------


@contextmanager
def _raised_by(role: str) -> Iterator[None]:
    try:
        yield
    except EstimatorError:
        raise
    except Exception as error:
        raise EstimatorError(f"the {role} raised {named(error)}") from error


def _run_pyro(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Ran, Ran]:
    import pyro
    import torch
    from pyro import poutine
    from pyro.poutine.util import site_is_subsample

    from ..pyro.exact import untouched

    with untouched(), torch.no_grad():
        pyro.set_rng_seed(0)
        with _raised_by("guide"):
            inner = poutine.trace(guide).get_trace(*args, **kwargs)
            inner.compute_log_prob()
        with _raised_by("model"):
            outer = poutine.trace(poutine.replay(model, trace=inner)).get_trace(*args, **kwargs)
            outer.compute_log_prob()
    found = []
    for trace in (inner, outer):
        ran = Ran()
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site_is_subsample(site):
                ran.plates[name] = (site["fn"].size, site["fn"].subsample_size or site["fn"].size)
                continue
            _note(ran, name, site, site["is_observed"], site["log_prob"].sum().item())
        found.append(ran)
    return found[0], found[1]


def _run_numpyro(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Ran, Ran]:
    from numpyro import handlers

    with _raised_by("guide"):
        inner = handlers.trace(handlers.seed(guide, 0)).get_trace(*args, **kwargs)
    with _raised_by("model"):
        replayed = handlers.replay(handlers.seed(model, 1), trace=inner)
        outer = handlers.trace(replayed).get_trace(*args, **kwargs)
    found = []
    for role, trace in (("guide", inner), ("model", outer)):
        ran = Ran()
        for name, site in trace.items():
            if site["type"] == "plate":
                size, drawn = site["args"]
                ran.plates[name] = (size, drawn or size)
            elif site["type"] == "sample":
                with _raised_by(f"{role}'s log probability at site '{name}'"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a value outside the support is said in our own words
                    log_p = float(site["fn"].log_prob(site["value"]).sum())
                _note(ran, name, site, site["is_observed"], log_p)
        found.append(ran)
    return found[0], found[1]


def _note(ran: Ran, name: str, site: Any, observed: bool, log_p: float) -> None:
    if observed:
        ran.observed.append(name)
    else:
        ran.latents[name] = tuple(np.shape(site["value"]))
        if site["infer"].get("enumerate"):
            ran.enumerated.add(name)
    if not np.isfinite(log_p):
        ran.bad[name] = log_p
