"""The structure of a program, as a library found it, and the plan for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import averaging
from .credit import Graph, Steps
from .enumeration import check_objective
from .estimator import Estimator
from .plan import Plan, Settings, check_keys, make_plan
from .site import Site, Term


@dataclass(frozen=True)
class Structure:
    """Which latent sites and cost terms there are, and who depends on whom.

    ``ancestors``: of each latent site, the sites that its value depends on. ``in_model``: the sites of the model.
    ``branches``: sites on whose drawn values the program decides something. ``steps``: see `credit.Steps`, by side and
    site.
    """

    sites: Sequence[Site]
    terms: Sequence[Term]
    ancestors: Mapping[str, frozenset[str]]
    in_model: Sequence[str]
    branches: frozenset[str] = frozenset()
    steps: Mapping[tuple[str, str], Steps] = field(default_factory=dict)

    def plan(self, settings: Settings, keys: Mapping[str, Estimator], others: Sequence[str] = ()) -> Plan:
        """The plan under some settings. ``keys``: the user's own, which may name ``others`` that are latent at another
        time."""
        names, objective = [s.name for s in self.sites], settings.objective
        check_keys(objective.names(), names, type(objective).__name__, others)
        others = [*others, *self.in_model]
        check_keys(keys, names, "EstimatorELBO", others)
        for hooked in {id(h): h for s in self.sites if (h := s.declared) is not None}.values():
            check_keys(hooked.estimators, names, "with_estimators", others)
        check_objective(objective, self.terms, self.in_model)
        own = [t for t in self.terms if t.side == "guide" and any(p.values and p.name == t.site for p in t.plates)]
        enumerated = {t.site: t for t in own}
        graph = Graph(self.ancestors, {s.name: s.plates for s in self.sites}, self.steps, enumerated)
        plan = make_plan(self.sites, self.terms, graph, settings, branches=self.branches)
        if settings.average_model:
            averaging.check(plan)
        return plan
