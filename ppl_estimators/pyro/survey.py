"""The structure of a program, as a run that was followed shows it: which latent sites and cost terms there are, who
depends on whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.enumeration import warn_of_minibatches
from ..core.estimator import Estimator
from ..core.site import Term
from ..core.structure import Structure
from .dependencies import Provenance, Sites
from .run import Message, Traces, view


def dependencies(traces: Traces, order: Sequence[str] | None = None) -> dict[tuple[str, str], Sites]:
    """The sites behind each cost term. Where that was found to be wrong, by the ``order`` in which sites were drawn:
    all that came before it."""
    found: dict[tuple[str, str], Sites] = {}
    values = traces.values
    for side, record in (("model", traces.model), ("guide", traces.guide)):
        for name, msg in record.items():
            key = side, name if values is None else values.term(side, name)
            found[key] = found.get(key, 0) | msg["behind"]
            for site in () if values is None else values.deciding(side, name):
                found[key] |= traces.guide[site]["behind"]
    if order is None:
        return found
    before, drawn = {n: (2 << i) - 1 for i, n in enumerate(order)}, 0
    for side, name in found:
        if side == "guide":
            drawn |= before.get(name, 0)
        found[side, name] = drawn if side == "guide" else (1 << len(order)) - 1
    return found


def survey(
    traces: Traces, follow: Provenance, behind: dict[tuple[str, str], Sites],
    requested: Callable[[Message], Estimator | None],
) -> Structure:  # fmt: skip
    """``behind``: see `dependencies`; ``requested``: what a site asks for."""
    latents, bits = traces.latents(), {n: 1 << i for i, n in enumerate(follow.order)}
    if traces.values is not None:
        warn_of_minibatches(traces.values)
    return Structure(
        [replace(view(m), requested=requested(m)) for m in latents.values()],
        [Term(*k, None, traces.plates(*k), follow.names(d)) for k, d in behind.items()],
        {n: follow.names(behind["guide", n] & ~bits.get(n, 0)) for n in latents},
        list(traces.model),
        follow.names(follow.control),
    )
