"""A smaller program that fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .description import Latent, Parents, Program, Under
from .generate import parts

Same = Callable[[Program], bool]


def shrink(program: Program, same: Same, seconds: float = 120.0) -> Program:
    """The first simpler program for which ``same`` holds, again and again, until there is none or time is up."""
    end = time.monotonic() + seconds
    found: Program | None = program
    while found is not None:
        program, found = found, None
        for candidate in simpler(program):
            if time.monotonic() > end:
                return program
            if same(candidate):
                found = candidate
                break
    return program


def simpler(program: Program) -> Iterator[Program]:
    """Programs with one thing less, the largest things first."""
    if len(program.latents) > 1:
        for z in program.latents:
            yield _without(program, z.name)
    for kind in ("observed", "factors"):
        for x in getattr(program, kind):
            yield replace(program, **{kind: tuple(y for y in getattr(program, kind) if y is not x)})
    for axis in (*program.layout, "e"):
        if any(axis in x.axes for x in (*program.latents, *program.observed, *program.factors)):
            yield _without_axis(program, axis)
    for z in program.latents:
        for code in (*parts(z.estimator), None) if z.estimator is not None else ():
            yield _with(program, "latents", z, estimator=code)
    for kind in ("latents", "observed", "factors"):
        for x in getattr(program, kind):
            for change in _changes(x):
                yield _with(program, kind, x, **change)
    for name, plain in (("average_model", False), ("vectorized", True), ("reverse_model", False), ("nested", False),
                        ("reverse_plates", False)):  # fmt: skip
        if getattr(program, name) != plain:
            yield replace(program, **{name: plain})
    if program.subsampled is not None:
        yield replace(program, subsampled=None)
    if program.reverse_model:
        yield replace(program, reverse_model=False, latents=tuple(replace(z, model={}) for z in program.latents))
    for fewer in range(1, program.particles):
        yield replace(program, particles=fewer)
    used = {a for x in (*program.latents, *program.observed, *program.factors) for a in x.axes}
    if any(a not in used for a in program.layout) and program.subsampled in (used | {None}):
        yield replace(program, layout=tuple(a for a in program.layout if a in used))


def _changes(x: Any) -> Iterator[dict[str, Any]]:
    """Fields of one site, each simpler than it is."""
    for name in ("guide", "model", "parents"):
        if name in x.__dataclass_fields__:
            for parent in getattr(x, name):
                yield {name: {p: c for p, c in getattr(x, name).items() if p != parent}}
    for name in ("under", "under_guide", "under_model"):
        if name in x.__dataclass_fields__:
            under = getattr(x, name)
            if under.scale is not None:
                yield {name: replace(under, scale=None)}
            if under.mask is not None:
                yield {name: replace(under, mask=None)}
    for name in ("shared", "auxiliary", "learned"):
        if getattr(x, name, False):
            yield {name: False}
    if getattr(x, "mark", None):
        yield {"mark": None}
    if getattr(x, "tied", ()):
        yield {"tied": ()}
    for axis in x.axes:
        yield _less(x, axis)
    if isinstance(x, Latent) and x.family != "bernoulli":
        yield {"family": "bernoulli"}


def _with(program: Program, kind: str, x: Any, **change: Any) -> Program:
    """``program`` with one site changed."""
    return replace(program, **{kind: tuple(replace(y, **change) if y is x else y for y in getattr(program, kind))})


def _without(program: Program, name: str) -> Program:
    def rid(parents: Parents) -> Parents:
        return {p: c for p, c in parents.items() if p != name}

    return replace(
        program,
        latents=tuple(
            replace(z, guide=rid(z.guide), model=rid(z.model)) for z in program.latents if z.name != name
        ),
        observed=tuple(replace(x, parents=rid(x.parents)) for x in program.observed),
        factors=tuple(replace(f, parents=rid(f.parents)) for f in program.factors),
    )  # fmt: skip


def _without_axis(program: Program, axis: str) -> Program:
    def every(sites: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(x, **_less(x, axis)) for x in sites)

    return replace(
        program,
        latents=every(program.latents),
        observed=every(program.observed),
        factors=every(program.factors),
        layout=tuple(a for a in program.layout if a != axis),
        subsampled=None if program.subsampled == axis else program.subsampled,
    )


def _less(x: Any, axis: str) -> dict[str, Any]:
    """What changes when a site loses an axis: its masks and scales do too."""
    change: dict[str, Any] = {"axes": tuple(a for a in x.axes if a != axis)}
    if isinstance(x, Latent):
        change["tied"] = tuple(a for a in x.tied if a != axis)
    for name in ("under", "under_guide", "under_model"):
        if name in x.__dataclass_fields__:
            change[name] = _narrowed(getattr(x, name), axis)
    return change


def _narrowed(under: Under, axis: str) -> Under:
    scale, mask = under.scale, under.mask
    if isinstance(scale, tuple):
        scale = tuple(a for a in scale if a != axis) or None
    if isinstance(mask, tuple):
        mask = tuple(a for a in mask if a != axis) or None
    return Under(scale, mask)
