"""Is a program what its first run said of it? Run again with the same values, and with others at some sites.

The same values must give the same cost terms: else a further run is another program, and nothing that is learnt from it
can be used. Other values at some sites must move no term that is not credited to one of them: else a dependency was
lost on the way. Sites are tested in groups, each against the terms that are credited to none of the group.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from .ops import Array

#: side and site of a cost term
Key = tuple[str, str]
#: the cost terms when some latent sites take other values
Evaluate = Callable[[Sequence[str]], Mapping[Key, Array]]
#: says whether a term has the same value as another time
Same = Callable[[Array, Array], bool]

#: most further runs of the program
BUDGET = 24


def unstable(evaluate: Evaluate, terms: Mapping[Key, Array], same: Same) -> list[Key]:
    """The terms that are not the same when the program is run again with the same values."""
    again = evaluate(())
    return [k for k, value in terms.items() if k not in again or not same(value, again[k])]


def lost(
    evaluate: Evaluate, terms: Mapping[Key, Array], depends_on: Mapping[Key, frozenset[str]], sites: Sequence[str],
    same: Same,
) -> tuple[Key, str] | None:  # fmt: skip
    """A term that moves with a site on which it was said not to depend, if there is one."""
    for group, silent in groups({k: depends_on[k] for k in terms}, sites):
        moved = _moved(evaluate, terms, group, silent, same)
        if moved is None:
            continue
        while len(group) > 1:
            half = group[: len(group) // 2]
            found = _moved(evaluate, terms, half, [moved], same)
            group = half if found else group[len(half) :]
        return moved, group[0]
    return None


def _moved(
    evaluate: Evaluate, terms: Mapping[Key, Array], group: Sequence[str], silent: Sequence[Key], same: Same
) -> Key | None:
    elsewhere = evaluate(group)
    return next((k for k in silent if k in elsewhere and not same(terms[k], elsewhere[k])), None)


def groups(
    depends_on: Mapping[Key, frozenset[str]], sites: Sequence[str], budget: int = BUDGET
) -> Iterator[tuple[list[str], list[Key]]]:
    """Groups of sites, each with the terms that are credited to none of it, until every pair was met or the budget is
    spent: each time the group that tests most pairs, of those that some term is not credited to, and halves of them."""
    everything = frozenset(sites)
    open_pairs = {k: everything - deps for k, deps in depends_on.items() if everything - deps}
    choose = random.Random(0)
    for _ in range(budget):
        candidates = {pairs for pairs in open_pairs.values() if pairs}
        if not candidates:
            return
        for pairs in list(candidates):
            ordered = sorted(pairs)
            if len(ordered) > 1:
                candidates.add(frozenset(choose.sample(ordered, len(ordered) // 2)))

        def tested(group: frozenset[str]) -> int:
            return sum(len(group & open_pairs[k]) for k in open_pairs if not group & depends_on[k])

        group = max(sorted(candidates, key=sorted), key=tested)
        silent = [k for k in open_pairs if not group & depends_on[k]]
        for k in silent:
            open_pairs[k] -= group
        yield sorted(group), silent
