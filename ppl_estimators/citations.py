"""`citation`: the papers behind what you use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .core.spec import Spec

REFERENCES = Path(__file__).with_name("references.bib")


def citation(used: Any) -> str:
    """BibTeX of the papers behind the estimators, baselines and objectives that are used, each once.

    ``used``: an `EstimatorELBO` (its estimators, its objective, and its ``default`` if that is an estimator), a guide
    wrapped in `with_estimators`, a spec, or a mapping or an iterable of any of these. Parts of compositions and sums
    are looked into. Entries are ordered by key.

    What ``default="auto"`` picks, what the guide hook says and what sites ask for themselves is not part of an ELBO:
    pass ``[elbo, guide, DisARM()]``. An estimator of your own adds what its docstring names of these papers.

    Raises `TypeError` for anything else.

    >>> from ppl_estimators import DisARM, Pathwise
    >>> citation({"z_*": DisARM(), "w": Pathwise()}).count("@")
    4
    """
    library = references()
    keys = {key for spec in _specs(used) for key in papers_of(type(spec))}
    return "\n\n".join(library[key] for key in sorted(keys))


def papers_of(cls: type) -> tuple[str, ...]:
    """BibTeX keys of the papers that a class names under "Reference:" in its own docstring: by their arXiv numbers, and
    those without by their keys, as in "[williams1992simple]"."""
    reference = (vars(cls)["__doc__"] or "").partition("Reference:")[2]
    prints = {number: key for key, entry in references().items() for number in re.findall(r"eprint = \{(.+?)\}", entry)}
    named = re.findall(r"arXiv:(\d{4}\.\d{4,5})|\[(\w+)\]", reference)
    return tuple(key or prints[number] for number, key in named if key or number in prints)


@cache
def references() -> dict[str, str]:
    """Every BibTeX entry by its key."""
    entries = REFERENCES.read_text(encoding="utf-8").strip().split("\n\n")
    return {re.match(r"@\w+\{([^,]+),", entry)[1]: entry for entry in entries}  # type: ignore[index]


def _specs(used: Any) -> Iterator[Spec]:
    """Every spec inside ``used``, the parts of a spec after it."""
    if isinstance(used, Spec):
        yield used
        for field in dataclasses.fields(used):  # type: ignore[arg-type]
            value = getattr(used, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Spec):
                    yield from _specs(part)
    elif isinstance(used, Mapping):
        yield from _specs(used.values())
    elif isinstance(used, Iterable) and not isinstance(used, (str, bytes)):
        for one in used:
            yield from _specs(one)
    elif isinstance(chosen := getattr(used, "estimators", None), Mapping):
        yield from _specs(chosen)
        for name in ("default", "objective"):
            if isinstance(one := getattr(used, name, None), Spec):
                yield from _specs(one)
    else:
        raise TypeError(f"citation takes an EstimatorELBO, a spec such as DisARM(), or several of them, got {used!r}.")
