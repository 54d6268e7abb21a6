"""Which sites are alike, so that one choice serves all of them, and how to name them in a mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..core.estimator import Estimator
from ..core.plan import Plan, match
from .candidates import admitted


@dataclass(frozen=True)
class Alike:
    """Sites of one family and shape, in the same plates, which admit the same candidates."""

    sites: tuple[str, ...]
    candidates: tuple[Estimator, ...]


def alike(plan: Plan, candidates: Sequence[Estimator], particles: int) -> list[Alike]:
    """Every site of the plan in one group."""
    reasons = [(e, admitted(e, plan, particles)) for e in candidates]
    found: dict[Any, list[str]] = {}
    for name, site in plan.sites.items():
        fitting = tuple(e for e, why in reasons if why[name] is None)
        shape = (site.distribution, site.batch_shape, site.event_shape, plan.graph.plates[name], site.time)
        support = None if site.logits is None else site.categories
        found.setdefault((fitting, shape, support, site.reparameterised, site.requested), []).append(name)
    return [Alike(tuple(names), key[0]) for key, names in found.items()]


def keys(names: Sequence[str], sites: Iterable[str]) -> tuple[str, ...]:
    """One glob pattern if one with a common beginning or end matches just these of all ``sites``, else their names."""
    if len(names) == 1:
        return tuple(names)
    start, end = _common(names), _common([n[::-1] for n in names])[::-1]
    pattern = f"{start}*{end}"
    plain = not set("*?[") & set(start + end)
    if plain and start + end and [n for n in sites if match({pattern: 0}, n)] == list(names):
        return (pattern,)
    return tuple(names)


def _common(names: Sequence[str]) -> str:
    """What all begin with."""
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)


def mapping_of(chosen: Mapping[str, Estimator], groups: Iterable[Sequence[str]]) -> dict[str, Estimator]:
    """``{key: estimator}`` that says of each site what ``chosen`` does, in as few keys as patterns allow."""
    short: dict[str, Estimator] = {}
    for names in groups:
        by_estimator: dict[Estimator, list[str]] = {}
        for name in names:
            by_estimator.setdefault(chosen[name], []).append(name)
        for estimator, together in by_estimator.items():
            short.update(dict.fromkeys(keys(together, chosen), estimator))
    found = {name: match(short, name) for name in chosen}
    right = all(key is not None and short[key] == chosen[name] for name, key in found.items())
    return short if right else dict(chosen)
