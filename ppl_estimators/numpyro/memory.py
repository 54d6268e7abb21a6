"""What an ELBO remembers between steps, and what it knows a program and its structure by."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import ref

from numpyro import distributions as dist

from ..core.plan import Plan, Settings
from ..core.site import Term
from .run import Traces


class _Remembered(NamedTuple):
    settings: Settings
    program: tuple[ref[Any], ...]
    plan: Plan
    kinds: Hashable


class Memory:
    """The plan of the last program, if all that it asks for is the library's own draws: then it is of no account who
    depends on whom, and the next call need not be traced beforehand if its run shows the same ``kinds``."""

    last: _Remembered | None = None  # one attribute, so that no thread sees the plan of one program and another's name

    def recall(self, settings: Settings, *program: Any) -> _Remembered | None:
        last = self.last
        if last is None or settings is not last.settings:
            return None
        return last if all(a() is b for a, b in zip(last.program, program, strict=True)) else None

    def store(self, settings: Settings, plan: Plan, kinds: Hashable, *program: Any) -> None:
        with suppress(TypeError):  # nothing lives longer for being remembered: a model may hold the values of a trace
            self.last = _Remembered(settings, tuple(map(ref, program)), plan, kinds)

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """A copy of an ELBO, or one that was pickled, looks at its programs anew."""
        return Memory, ()


def kinds_of(traces: Traces, terms: Sequence[Term]) -> tuple[Any, ...] | None:
    """What a plan sees of a run where all that is drawn is the library's own; None if a site asks for something."""
    sites = []
    for record in (traces.guide, traces.model):
        for name, msg in record.items():
            if msg["type"] == "sample":
                infer = frozenset(msg["infer"])
                if infer & {"estimator", "_with_estimators"} or "scan" in msg:
                    return None
                sites.append((name, msg["is_observed"], infer, *_kinds(msg["fn"])))
    return tuple(sites), tuple((t.side, t.site, t.plates) for t in terms)


def _kinds(fn: Any) -> Iterator[tuple[Any, ...]]:
    while isinstance(fn, dist.Distribution):  # what a user's class holds by these names may be anything
        transforms = tuple(map(type, fn.transforms)) if isinstance(fn, dist.TransformedDistribution) else ()
        yield type(fn), fn.has_rsample, fn.batch_shape, fn.event_shape, transforms
        fn = getattr(fn, "base_dist", None)
