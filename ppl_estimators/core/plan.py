"""Which estimator runs at which site, and which counterfactual evaluations a step needs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..estimators.baselines.leave_one_out import LeaveOneOut
from ..estimators.disarm import DisARM
from ..estimators.enumerate import Enumerate
from ..estimators.pathwise import Pathwise
from ..estimators.reinforce import Reinforce
from ..estimators.sticking_the_landing import StickingTheLanding
from .credit import Graph
from .errors import EstimatorError, EstimatorWarning, site_error
from .estimator import Estimator
from .families import BERNOULLI, DISCRETE, RELAXABLE
from .site import Site, Term
from .spec import Spec

#: the default spends at most this many extra evaluations of model and guide per step, all sites together
DEFAULT_BUDGET = 2


def match(mapping: Mapping[str, Any], name: str) -> str | None:
    """The key of ``mapping`` that applies to a site: its exact name, else the first glob pattern that matches."""
    if name in mapping:
        return name
    return next((key for key in mapping if fnmatchcase(name, key)), None)


def check_mapping(mapping: Any, where: str) -> dict[str, Estimator]:
    """``{site name or glob pattern: estimator}``, or one estimator for all sites."""
    if mapping is None:
        return {}
    if isinstance(mapping, Estimator):
        return {"*": mapping}
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where} takes a mapping from site names (or glob patterns) to estimators, got {mapping!r}.")
    for key, value in mapping.items():
        if not isinstance(value, Estimator):
            raise TypeError(f"{where}: the entry for '{key}' is not an estimator: {value!r}{_hint(value)}.")
    return dict(mapping)


def requested(name: str, infer: Mapping[str, Any]) -> Estimator | None:
    """What ``infer={"estimator": ...}`` at a site asks for."""
    asked = infer.get("estimator")
    if asked is None or isinstance(asked, Estimator):
        return asked
    raise site_error(
        name,
        f'infer={{"estimator": ...}} is not an estimator: {asked!r}{_hint(asked)}',
        'Give one, such as infer={"estimator": DisARM()}.',
    )


def _hint(value: Any) -> str:
    if isinstance(value, type):
        return " (write it with parentheses)"
    if isinstance(value, str):
        return " (write the estimator itself, not its name)"
    if isinstance(value, Spec):
        return f" (a baseline goes inside: Reinforce({value!r}))"
    return ""


def check_keys(mapping: Mapping[str, Any], sites: Sequence[str], where: str) -> None:
    """Every key must match a latent site of the guide."""
    for key in mapping:
        if not any(fnmatchcase(name, key) for name in sites) and key not in sites:
            known = ", ".join(f"'{s}'" for s in sites) or "none"
            raise EstimatorError(
                f"{where}: '{key}' matches no latent site of the guide. Sites: {known}. "
                "Use one of these names, or a glob pattern such as 'z_*'."
            )


@dataclass(frozen=True)
class Group:
    """Sites that take counterfactual values together."""

    sites: tuple[str, ...]
    alternatives: int = 0
    relaxations: int = 0
    downstream: str = "relaxed"  # what discrete sites downstream of relaxed values do meanwhile


@dataclass(frozen=True)
class Plan:
    estimators: Mapping[str, Estimator]
    sites: Mapping[str, Site]
    graph: Graph
    groups: tuple[Group, ...]

    @property
    def local(self) -> list[str]:
        """Sites with a surrogate of their own."""
        return [name for name, e in self.estimators.items() if e.local_part]

    @property
    def soft(self) -> frozenset[str]:
        """Discrete sites whose value carries a gradient: only our log probability is differentiable in it."""
        return frozenset(n for n, e in self.estimators.items() if e.pathwise and self.sites[n].family in RELAXABLE)

    @property
    def hard(self) -> frozenset[str]:
        """Sites with a discrete draw whose derivative is made up."""
        return frozenset(n for n, e in self.estimators.items() if e.hard)

    @property
    def sticking(self) -> frozenset[str]:
        """Sites whose -log q is differentiated through the value only."""
        return frozenset(n for n, e in self.estimators.items() if isinstance(e, StickingTheLanding))

    def relaxable(self, name: str) -> bool:
        """Can the site take relaxed values?"""
        return not self.estimators[name].pathwise and self.sites[name].family in RELAXABLE


def make_plan(
    sites: Sequence[Site],
    terms: Sequence[Term],
    graph: Graph,
    *,
    mapping: Mapping[str, Estimator],
    default: Any,
    particles: int,
    objective: Any,
    branches: bool = False,
) -> Plan:
    """Resolve every latent site of the guide (in its order), check the choices, and group the evaluations.

    ``branches``: the program decided something on a drawn value. Who depends on whom then holds for the drawn values
    only, so every site takes its counterfactual values alone.
    """
    chosen: dict[str, Estimator] = {}
    for site in sites:
        key = match(mapping, site.name)
        picked = mapping[key] if key is not None else site.requested
        if picked is None and isinstance(default, Estimator):
            picked = default
        chosen[site.name] = picked
    _fill_defaults(sites, terms, graph, chosen, particles, objective)
    views = {}
    for site in sites:
        estimator = chosen[site.name]
        estimator.check(site, particles)
        objective.check(site, estimator, particles)
        if estimator.lanewise:  # one element at a time, unless nothing couples the elements
            site = replace(site, plates=graph.closed_plates(site.name, terms))
        views[site.name] = site
        if particles == 1 and isinstance(estimator, Reinforce) and estimator.baseline is None:
            warnings.warn(
                f"site '{site.name}': score function without a baseline and with one particle is very noisy. "
                "Pass EstimatorELBO(..., num_particles=2) for leave-one-out, or a baseline such as "
                "Reinforce(MovingAverage()).",
                EstimatorWarning,
                stacklevel=6,
            )
    return Plan(chosen, views, graph, _groups(views, chosen, graph, branches))


def _fill_defaults(
    sites: Sequence[Site],
    terms: Sequence[Term],
    graph: Graph,
    chosen: dict[str, Estimator],
    particles: int,
    objective: Any,
) -> None:
    """``default="auto"``: see `docs/choosing.md` for the table."""
    open_sites = [s for s in sites if chosen[s.name] is None]
    for site in open_sites:
        if site.reparameterised:
            chosen[site.name] = Pathwise()
        elif particles > 1:
            chosen[site.name] = Reinforce(LeaveOneOut())
    open_sites = [s for s in open_sites if chosen[s.name] is None]
    budget = DEFAULT_BUDGET if objective.counterfactual else 0
    binary = [s.name for s in open_sites if s.family == BERNOULLI and not s.time]
    depth = len(graph.levels(binary))
    if 0 < depth <= budget:
        budget -= depth
        chosen.update({name: DisARM() for name in binary})
    for site in open_sites:
        if chosen[site.name] is None and site.family in DISCRETE and not site.time:
            view = replace(site, plates=graph.closed_plates(site.name, terms))
            price = Enumerate().alternatives(view)
            if price <= budget:
                budget -= price
                chosen[site.name] = Enumerate()
    for site in open_sites:
        if chosen[site.name] is None:
            chosen[site.name] = Reinforce()


def _groups(
    views: Mapping[str, Site], chosen: Mapping[str, Estimator], graph: Graph, branches: bool
) -> tuple[Group, ...]:
    groups = []
    alternatives = {n: chosen[n].alternatives(s) for n, s in views.items()}
    relaxations = {n: chosen[n].relaxations(s) for n, s in views.items()}
    for members in _together([n for n, count in alternatives.items() if count], chosen, graph, branches):
        names = tuple(n for n in views if n in members)
        groups.append(Group(names, alternatives=max(alternatives[n] for n in names)))
    relaxed = [n for n, count in relaxations.items() if count]
    for mode, count in dict.fromkeys((chosen[n].downstream, relaxations[n]) for n in relaxed):
        alike = [n for n in relaxed if (chosen[n].downstream, relaxations[n]) == (mode, count)]
        levels = [frozenset(alike)] if mode == "drawn" else _together(alike, chosen, graph, branches)
        for members in levels:
            names = tuple(n for n in views if n in members)
            groups.append(Group(names, relaxations=count, downstream=mode))
        if mode == "relaxed":
            for n in alike:
                _check_relaxable(n, views, chosen, graph)
    return tuple(groups)


def _together(
    sites: Sequence[str], chosen: Mapping[str, Estimator], graph: Graph, branches: bool
) -> list[frozenset[str]]:
    """Sites that can take other values at the same time: those that share, by depth; each of the others alone."""
    together = [n for n in sites if chosen[n].shared and not branches]
    return [*graph.levels(together), *(frozenset([n]) for n in sites if n not in together)]


def _check_relaxable(name: str, views: Mapping[str, Site], chosen: Mapping[str, Estimator], graph: Graph) -> None:
    """A hard draw downstream of a relaxed value would make the cost jump: the gradient would be biased."""
    for down in graph.descendants(frozenset([name])):
        if chosen[down].local_part and (views[down].family not in RELAXABLE or views[down].time):
            raise site_error(
                name,
                f"{type(chosen[name]).__name__} differentiates the cost at relaxed values, but site '{down}' "
                f"({views[down].distribution}) depends on it and cannot be relaxed",
                "Use RELAX() without the model term here, or Reinforce(LeaveOneOut()).",
            )
