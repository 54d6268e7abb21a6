"""``default="auto"``: the estimator of every site that nothing else names.

Reparameterisable sites are Pathwise(). With several particles all others are Reinforce(LeaveOneOut()). With one, at
most two further evaluations are spent for all of them together, where they buy most, in this order of preference:

1. Enumerate(): every value, exactly;
2. UnorderedSet(3): three categories of many, each once, where no site is Pathwise();
3. StochasticTriple() at single counts: the drawn value and a neighbour;
4. DisARM() for bits: antithetic pairs, where one evaluation serves all sites: those that do not depend on each other.

Three particles average all noise, that of Pathwise() sites too; sets and pairs that cost as much and lower that of some
sites only had more of it. Steps of a scan are a plate if they do not move each other, and if they do, nothing fits.
Where these do not suffice for every site, both evaluations are further particles (shadows),
and all are each other's baselines. So no site is ever without a control variate, and sites that are alike get the same.
Under an objective to which nothing but the draw counts (`WakeSleep`), all others are Reinforce().
The choice depends on the program alone: plate sizes, batches, seeds and the order of calls do not enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .core import plan
from .core.credit import Graph
from .core.estimator import Estimator
from .core.families import BERNOULLI, CATEGORICAL, COUNTS, DISCRETE, ONEHOT
from .core.plan import Choice, Situation
from .core.site import Site, Term
from .estimators.baselines.leave_one_out import LeaveOneOut
from .estimators.disarm import DisARM
from .estimators.enumerate import Enumerate
from .estimators.pathwise import Pathwise
from .estimators.reinforce import Reinforce
from .estimators.stochastic_triple import StochasticTriple
from .estimators.unordered_set import UnorderedSet


def requested(name: str, infer: Mapping[str, Any]) -> Estimator | None:
    """What a site asks for by ``infer={"estimator": ...}``, or by a mark: each value in a run of its own."""
    asked = plan.requested(name, infer)
    return Enumerate() if asked is None and infer.get("enumerate") == "sequential" else asked


#: further evaluations of model and guide per step, all sites together
BUDGET = 2
SET, PAIR = UnorderedSet(3), DisARM()
#: in order of preference
OPTIONS: tuple[tuple[Estimator, tuple[str, ...]], ...] = (
    (Enumerate(), DISCRETE),
    (SET, (CATEGORICAL, ONEHOT)),
    (StochasticTriple(), tuple(COUNTS)),
    (PAIR, (BERNOULLI,)),
)

#: sites that are treated alike: family, categories, dependent elements (None for those of a plate, or steps)
Kind = tuple[str, int, int | None]


@dataclass(frozen=True)
class Automatic:
    """The policy of this file."""

    def __call__(self, sites: Sequence[Site], terms: Sequence[Term], graph: Graph, situation: Situation) -> Choice:
        chosen: dict[str, Estimator] = {s.name: Pathwise() for s in sites if s.reparameterised}
        rest = [s for s in sites if s.name not in chosen]
        if not rest:
            return Choice(chosen, situation.particles)
        if situation.plain:
            return Choice({**chosen, **dict.fromkeys((s.name for s in rest), Reinforce())}, situation.particles)
        if situation.particles == 1 and not situation.branches:
            spent = _spend(rest, terms, graph, beside=bool(chosen))
            if spent is not None:
                return Choice({**chosen, **spent}, 1)
        chosen |= dict.fromkeys((s.name for s in rest), Reinforce(LeaveOneOut()))
        return Choice(chosen, situation.particles if situation.particles > 1 else 1 + BUDGET)

    def alone(self, site: Site, particles: int) -> Estimator:
        return Pathwise() if site.reparameterised else Reinforce(LeaveOneOut())


AUTOMATIC = Automatic()


def _spend(sites: Sequence[Site], terms: Sequence[Term], graph: Graph, *, beside: bool) -> dict[str, Estimator] | None:
    """Estimators within the budget, the most preferred; None if there are none for every site. ``beside``: are there
    others, which have noise of their own?"""
    if any(s.time and (not graph.follows(s) or graph.circular(s.name)) for s in sites):
        return None  # steps that move others would take an evaluation each
    views = {s.name: replace(s, plates=graph.closed_plates(s.name, terms)) for s in sites}
    apart = {
        s.name for s in sites if views[s.name].plates == s.plates and (not s.time or graph.apart(s.name, terms) == 1)
    }
    kinds: dict[Kind, list[Site]] = {}
    for s in sites:
        v = views[s.name]
        categories = v.categories if v.family in DISCRETE else 0
        kinds.setdefault((s.family, categories, v.lanes if s.name in apart else None), []).append(s)

    def price(options: Iterable[Estimator]) -> int:
        total, shared = 0, []
        for option, members in zip(options, kinds.values(), strict=True):
            if option.alternatives(views[members[0].name]).own_law:
                shared += [s.name for s in members]
            else:
                total += sum(option.alternatives(views[s.name]).count for s in members)
        return total + len(graph.levels([s.name for s in sites if s.name in shared]))

    for options in sorted(product(*map(_options, kinds)), key=_rank):
        if price(options) <= (1 if PAIR in options else BUDGET) and not (beside and SET in options):
            return {s.name: o for o, members in zip(options, kinds.values(), strict=True) for s in members}
    return None


def _options(kind: Kind) -> list[Estimator]:
    family, _, elements = kind
    if family in COUNTS and elements != 1:  # moving one count of many is no better than a particle
        return []
    if elements is None:  # elements that a cost couples would be moved one by one: too many, always
        return [PAIR] if family == BERNOULLI else []
    return [e for e, families in OPTIONS if family in families]


def _rank(options: Sequence[Estimator]) -> int:
    order: Callable[[Estimator], int] = [e for e, _ in OPTIONS].index
    return sum(map(order, options))
