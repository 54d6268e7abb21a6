"""Which estimator runs at which site, and what every site does in each evaluation of a step."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Protocol

from .credit import Graph
from .errors import EstimatorError, site_error, warn
from .estimator import Control, Estimator, Value
from .families import BERNOULLI, CATEGORICAL, ONEHOT, RELAXABLE
from .keep import Hooked
from .site import Plate, Site, Term
from .spec import Spec

#: of a site's infer; the last is Pyro's own
_WORDS = ("estimator", "kl", "baseline")


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
        fact = f"{where} takes a mapping from site names (or glob patterns) to estimators, got {mapping!r}"
        raise TypeError(f"{fact}{_hint(mapping)}.")
    for key, value in mapping.items():
        if not isinstance(value, Estimator):
            raise TypeError(f"{where}: the entry for '{key}' is not an estimator: {value!r}{_hint(value)}.")
    return dict(mapping)


def hooked(
    estimators: Mapping[str, Estimator], name: str, infer: Mapping[str, Any], keeper: Any = None
) -> dict[str, Any]:  # fmt: skip
    """A site's infer, as a guide hook leaves it."""
    key = match(estimators, name)
    asked = infer.get("estimator") if key is None else estimators[key]
    return {**infer, "estimator": asked, "_with_estimators": Hooked(estimators, asked, keeper)}


def requested(name: str, infer: Mapping[str, Any]) -> Estimator | None:
    """What ``infer={"estimator": ...}`` at a site asks for."""
    asked, baseline = infer.get("estimator"), infer.get("baseline")
    if baseline is not None and not isinstance(baseline, Mapping):
        fact = f'infer={{"baseline": ...}} is a dictionary of Pyro\'s, got {baseline!r}'
        raise site_error(name, fact, 'Write infer={"estimator": Reinforce(...)} with the baseline inside.')
    if asked is None or isinstance(asked, Estimator):
        return asked
    raise site_error(
        name,
        f'infer={{"estimator": ...}} is not an estimator: {asked!r}{_hint(asked)}',
        'Give one, such as infer={"estimator": DisARM()}.',
    )


def to_sum(name: str, infer: Mapping[str, Any]) -> bool:
    """Does a site that only the model has ask to be summed out, without a mark?"""
    asked = requested(name, infer)
    return asked is not None and asked.sums


def words(infer: Mapping[str, Any]) -> dict[str, Any]:
    """What a site's infer says to us."""
    ours = {k: v for k, v in infer.items() if k in _WORDS or isinstance(v, Estimator)}
    return {k: v for k, v in ours.items() if v is not None}


def check_words(name: str, infer: Mapping[str, Any]) -> None:
    """A word of ours must be one that is read."""
    for key, value in words(infer).items():
        if key not in _WORDS:
            raise site_error(
                name,
                f'infer={{"{key}": {value!r}}} names an estimator by a word that nothing reads',
                f'Write infer={{"estimator": {value!r}}}.',
            )
    if (kl := infer.get("kl")) not in (None, "analytic"):
        fact = f'infer={{"kl": {kl!r}}} is not known'
        raise site_error(name, fact, 'Write infer={"kl": "analytic"}, or leave it out.')


def check_summed(
    settings: Settings, guide: Mapping[str, Any], model: Mapping[str, Any], drawn: Container[str]
) -> None:  # fmt: skip
    """A site that the ELBO names is not one that a mark sums over. ``guide``, ``model``: messages of a run."""
    for name, estimator in settings.estimators:
        msg = guide.get(name) or model.get(name)
        if msg and msg["infer"].get("enumerate") and not (msg["is_observed"] or name in drawn or estimator.sums):
            raise site_error(
                name,
                f'EstimatorELBO names {estimator!r} for it, which draws a value, and it is marked infer={{"enumerate": '
                f'"{msg["infer"]["enumerate"]}"}}, which sums over all',
                'Leave one of them out; where config_enumerate sets the mark, write infer={"enumerate": None}.',
            )


def check_unheard(
    settings: Settings, asked: Mapping[str, Mapping[str, Any]], guide: Mapping[str, Mapping[str, Any]]
) -> None:
    """What a site of the model asks for must be said where it counts too: at the guide's site, which is the one that is
    drawn, or to the ELBO. ``asked``: of sites of the model; ``guide``: the guide's messages."""
    for name in asked.keys() & guide.keys():
        heard = {*words(guide[name]["infer"])}
        if settings.asked(name, None) is not None or heard & {"estimator", "baseline"}:
            heard |= {"estimator", "baseline"}
        if settings.objective.analytic(name):
            heard.add("kl")
        for key in asked[name].keys() - heard:
            said, or_else = asked[name][key], ""
            if key == "kl":
                or_else = f', or EstimatorELBO(objective=AnalyticKL("{name}"))'
            elif isinstance(said, Estimator):
                or_else = f', or guide = with_estimators(guide, {{"{name}": {said!r}}})'
            raise site_error(
                name,
                f'infer={{"{key}": {said!r}}} stands at the site of the model, and the guide\'s is drawn',
                f"Write it at the guide's site '{name}'{or_else}.",
            )


def _hint(value: Any) -> str:
    if isinstance(value, type):
        return " (write it with parentheses)"
    if isinstance(value, str):
        return " (write the estimator itself, not its name)"
    if isinstance(value, int):
        return f" (particles are num_particles={value})"
    if isinstance(value, Spec):
        return f" (a baseline goes inside: Reinforce({value!r}))"
    return ""


def check_keys(keys: Iterable[str], sites: Sequence[str], where: str, others: Sequence[str] = ()) -> None:
    """Every key must match a latent site of the guide; or one of ``others``, which are latent at another time; or be
    numbered as some of them are: a longer sequence may come. A call without latent sites says nothing of the rest."""
    for key in keys:
        if any(fnmatchcase(name, key) or name == key for name in (*sites, *others)):
            continue
        known = ", ".join(f"'{s}'" for s in sites) or "none"
        fact = f"{where}: '{key}' matches no latent site of the guide. Sites: {known}."
        stem = key.rstrip("0123456789")
        if not sites:
            warn(f"{fact} It waits for a call that has some.")
        elif stem != key and any(name.rstrip("0123456789") == stem != name for name in sites):
            warn(f"{fact} It waits for a call that has '{key}'; if there is none, use one of these names or '{stem}*'.")
        else:
            raise EstimatorError(f"{fact} Use one of these names, or a glob pattern such as 'z_*'.")


class Policy(Protocol):
    """Chooses for the sites that nothing else names: ``default="auto"``."""

    def __call__(self, sites: Sequence[Site], terms: Sequence[Term], graph: Graph, situation: Situation) -> Choice: ...

    def alone(self, site: Site, particles: int) -> Estimator:
        """The estimator of a site of which nothing else is known."""


@dataclass(frozen=True)
class Situation:
    """What a policy may look at beside the sites: ``asked``, the estimators that were named for other sites;
    ``branches``, on which of all sites' drawn values the program decides something; ``plain``, that nothing but the
    draw counts."""

    asked: Mapping[str, Estimator]
    particles: int
    branches: frozenset[str]
    plain: bool


@dataclass(frozen=True)
class Choice:
    """Estimators by site, and how many particles a step needs for them."""

    estimators: Mapping[str, Estimator]
    particles: int


@dataclass(frozen=True)
class Settings:
    """What an ELBO was told. Two with the same settings make the same plans."""

    estimators: tuple[tuple[str, Estimator], ...]
    default: Estimator | Policy
    objective: Any
    particles: int
    max_parallel: int
    average_model: bool

    def __hash__(self) -> int:
        return self._hash  # asked for several times a step

    @cached_property
    def _hash(self) -> int:
        return hash((self.estimators, self.default, self.objective, self.particles, self.average_model))

    @cached_property
    def mapping(self) -> dict[str, Estimator]:
        return dict(self.estimators)

    def asked(self, name: str, requested: Estimator | None) -> Estimator | None:
        """What is named for a site: by the ELBO's mapping, else by hook or site."""
        if not self.estimators:
            return requested
        key = match(self.mapping, name)
        return requested if key is None else self.mapping[key]

    def sums(self, name: str, infer: Mapping[str, Any]) -> bool:
        """Is a site that only the model has to be summed out, though no mark says so?"""
        asked = self.asked(name, requested(name, infer))
        return asked is not None and asked.sums

    def alone(self, site: Site) -> Estimator:
        """The estimator of a site that no plan knows."""
        asked = self.asked(site.name, site.requested)
        if asked is not None:
            return asked
        return self.default if isinstance(self.default, Estimator) else self.default.alone(site, self.particles)


@dataclass(frozen=True)
class Group:
    """Sites that take counterfactual values together."""

    sites: tuple[str, ...]
    alternatives: int = 0
    weighed: bool = False  # have the drawn values and these weights?
    alone: bool = False  # does each element of a plate take them by itself?
    relaxations: int = 0
    downstream: str = "relaxed"  # what discrete sites downstream of relaxed values do meanwhile


@dataclass(frozen=True)
class Plan:
    estimators: Mapping[str, Estimator]
    sites: Mapping[str, Site]
    terms: tuple[Term, ...]  # without values
    graph: Graph
    groups: tuple[Group, ...]
    particles: int
    branches: frozenset[str] = frozenset()  # sites on whose drawn values the program decides something
    keeps_score: bool = False  # -log q, in the objective
    analytic: frozenset[str] = frozenset()  # sites whose divergence from the model's law is taken in closed form

    @cached_property
    def local(self) -> list[str]:
        """Sites whose estimator is asked for its `local`."""
        return [n for n, e in self.estimators.items() if e.asked]

    @cached_property
    def soft(self) -> frozenset[str]:
        """Discrete sites whose value carries a gradient: only our log probability is differentiable in it."""
        return frozenset(n for n, e in self.estimators.items() if e.value.moves and self.sites[n].family in RELAXABLE)

    @cached_property
    def hard(self) -> frozenset[str]:
        """Sites with a discrete draw whose derivative is made up, and whose -log q has no other that counts."""
        return frozenset(n for n, e in self.estimators.items() if e.value is Value.HARD and not self.keeps_score)

    @cached_property
    def alone(self) -> frozenset[str]:
        """Sites whose elements take other values one at a time."""
        return frozenset(n for g in self.groups if g.alone for n in g.sites)

    @cached_property
    def sticking(self) -> frozenset[str]:
        """Sites whose -log q is differentiated through the value only."""
        return frozenset(n for n, e in self.estimators.items() if e.sticks)

    @cached_property
    def differentiated(self) -> list[str]:
        """Sites whose gradient is wrong where a cost has no derivative in their value, though it moves with it."""
        relaxed = {n for g in self.groups if g.relaxations and g.downstream == "relaxed" for n in g.sites}
        return [n for n, e in self.estimators.items() if e.value.moves or n in relaxed]

    @cached_property
    def depends_on(self) -> dict[tuple[str, str], frozenset[str]]:
        return {(t.side, t.site): t.depends_on for t in self.terms}

    @property
    def reruns(self) -> bool:
        """Does a step run the program more than once for a particle?"""
        return bool(self.groups or self.sticking)

    @cached_property
    def saturated(self) -> bool:
        """Would nothing be another if more depended on what was drawn? Every term counts for all sites with a surrogate
        that were drawn before it, whose plates all later sites are in; and nothing is run again, or in closed form."""
        if self.reruns or self.analytic or self.branches:
            return False
        before, drawn, plates = {}, frozenset[str](), frozenset[Plate]()
        for name in self.sites:
            its = self.graph.plates[name]
            if not plates <= its:
                return False
            if name in self.local:
                drawn, plates = drawn | {name}, plates | its
            before["guide", name] = drawn
        return all(t.depends_on >= before.get((t.side, t.site), drawn) for t in self.terms)

    def relaxable(self, name: str) -> bool:
        """Can the site take relaxed values?"""
        return not self.estimators[name].value.moves and self.sites[name].family in RELAXABLE

    def below(self, group: Group) -> frozenset[str]:
        """Sites that are drawn again when the group takes other values."""
        members = frozenset(group.sites)
        return self.graph.descendants(members) | frozenset(n for n in members if self.graph.circular(n))

    def softened(self, group: Group) -> frozenset[str]:
        """Sites below relaxed values that are relaxed with them."""
        if not (group.relaxations and group.downstream in ("relaxed", "mean")):
            return frozenset()
        return frozenset(n for n in self.below(group) if self.relaxable(n)) - frozenset(group.sites)


def make_plan(
    sites: Sequence[Site],
    terms: Sequence[Term],
    graph: Graph,
    settings: Settings,
    *,
    branches: frozenset[str] = frozenset(),
) -> Plan:
    """Resolve every latent site of the guide (in its order), check the choices, and group the evaluations.

    ``branches``: sites on whose drawn values the program decided something. If there are any, who depends on whom holds
    for the drawn values only, so every site takes its counterfactual values alone.
    """
    particles, objective = settings.particles, settings.objective
    asked = {s.name: settings.asked(s.name, s.requested) for s in sites}
    chosen = {name: e for name, e in asked.items() if e is not None}
    missing = [s for s in sites if s.name not in chosen]
    if isinstance(settings.default, Estimator):
        chosen |= dict.fromkeys((s.name for s in missing), settings.default)
    elif missing:
        situation = Situation(chosen, particles, branches, plain=not objective.moves)
        choice = settings.default(missing, terms, graph, situation)
        chosen, particles = {**chosen, **choice.estimators}, choice.particles
    chosen = {s.name: chosen[s.name] for s in sites}
    views = {}
    for site in sites:
        estimator = chosen[site.name]
        estimator.check(site, particles)
        objective.check(site, estimator, settings.particles)
        if site.time:
            site = _in_time(site, estimator, graph, terms)
        if not estimator.alternatives(site).own_law:  # one element at a time, unless nothing couples the elements
            closed = graph.closed_plates(site.name, terms)
            site = replace(site, plates=closed, coupled=site.plates - closed)
        views[site.name] = site
    bare = [s for s in sites if particles == 1 and chosen[s.name].control is Control.NOTHING]
    if bare and objective.moves:
        warn(_bare(bare))
    groups = _groups(views, chosen, graph, branches)
    if objective.keeps_score:
        _check_sticking(chosen, graph)
    facts = tuple(replace(t, value=None) for t in terms)
    analytic = frozenset(s.name for s in sites if s.analytic or objective.analytic(s.name))
    for name in analytic:
        _check_analytic(views[name], terms, graph, objective)
    return Plan(chosen, views, facts, graph, groups, particles, branches, objective.keeps_score, analytic)


def _in_time(site: Site, estimator: Estimator, graph: Graph, terms: Sequence[Term]) -> Site:
    """Of a site in a scan: in how many evaluations its steps take another value. All at once where they draw it from
    their own law and move no other step; so far apart that no cost sees two of them; else one after another."""
    asked, name = estimator.alternatives(site), type(estimator).__name__
    if not graph.follows(site):
        if asked.count or not (estimator.value.library or type(estimator).noise is Estimator.noise):
            raise site_error(
                site.name,
                f"{name} takes the steps of a scan one by one, which it cannot in a cond, in the third of three nested "
                "scans, or where JAX is not to compile them",
                "Use Reinforce(LeaveOneOut()) with several particles.",
            )
        return site
    if not asked.count:
        return site
    if asked.own_law:
        return replace(site, turns=site.steps if graph.circular(site.name) else 1)
    return replace(site, turns=int(min(graph.apart(site.name, terms), site.steps)))


def _bare(sites: Sequence[Site]) -> str:
    """What is wrong with a score function by itself, and what to type, by the evaluations that it adds to a step."""
    names = ", ".join(f"'{s.name}'" for s in sites[:3]) + f", ... ({len(sites)} sites)" * (len(sites) > 3)
    fixes = ["Reinforce(MovingAverage()) (no further evaluation a step)"]
    if all(s.family == BERNOULLI for s in sites):
        fixes.append("DisARM() (1 for all that do not depend on each other)")
    fixes.append("Reinforce(LeaveOneOut()) with num_particles=2 (1)")
    if all(s.family in (CATEGORICAL, ONEHOT) for s in sites):
        fixes.append(f"UnorderedSet(3) ({sum(2 * s.lanes for s in sites)})")
    return (
        f"site{'s' * (len(sites) > 1)} {names}: score function without a baseline and with one particle is very noisy. "
        f"Name no estimator there, and the default spends two further evaluations; or type {', or '.join(fixes)}."
    )


def _groups(
    views: Mapping[str, Site], chosen: Mapping[str, Estimator], graph: Graph, branches: frozenset[str]
) -> tuple[Group, ...]:
    groups = []
    alternatives = {n: chosen[n].alternatives(s) for n, s in views.items()}
    relaxations = {n: chosen[n].relaxations(s) for n, s in views.items()}
    moved = {n: a.own_law and views[n].turns == 1 and not branches for n, a in alternatives.items() if a.count}
    for members in _together(moved, graph):
        names = tuple(n for n in views if n in members)
        asked = [alternatives[n] for n in names]
        turns = max(views[n].turns for n in names)  # of a site by itself, if there are several
        weighed = turns == 1 and all(a.own_law or a.weights is not None for a in asked)
        alone = turns > 1 or not all(a.own_law for a in asked)
        groups.append(Group(names, turns * max(a.count for a in asked), weighed, alone))
    for kind in dict.fromkeys(r for r in relaxations.values() if r.count):
        alike = [n for n, r in relaxations.items() if r == kind]
        levels = [frozenset(alike)]
        if kind.downstream != "drawn":
            levels = _together(dict.fromkeys(alike, not branches), graph)
        for members in levels:
            names = tuple(n for n in views if n in members)
            groups.append(Group(names, relaxations=kind.count, downstream=kind.downstream))
        if kind.downstream == "relaxed":
            for n in alike:
                _check_relaxable(n, views, chosen, graph)
    return tuple(groups)


def _together(shares: Mapping[str, bool], graph: Graph) -> list[frozenset[str]]:
    """Sites that can take other values at the same time: those that share, by depth; each of the others alone."""
    together = graph.levels([n for n, yes in shares.items() if yes])
    return [*together, *(frozenset([n]) for n, yes in shares.items() if not yes)]


def _check_analytic(site: Site, terms: Sequence[Term], graph: Graph, objective: Any) -> None:
    """Given its parents, a site has E[log p − log q] = −KL only if nothing below it moves p."""
    prior = next((t for t in terms if t.side == "model" and t.site == site.name), None)
    reason = None
    if prior is None:
        reason = "the model has no such site"
    elif objective.joint(2) != 1:
        reason = f"{objective!r} is no sum of cost terms"
    elif site.time:
        reason = "the steps of a scan are each other's parents"
    elif below := prior.depends_on & graph.descendants(frozenset([site.name])):
        reason = f"its law in the model depends on '{min(below)}', which the guide draws below it"
    if reason:
        raise site_error(
            site.name,
            f"a closed divergence was asked for, and {reason}",
            "Leave the site out of AnalyticKL(...).",
        )


def weighed_apart(name: str) -> EstimatorError:
    return site_error(
        name,
        "a closed divergence was asked for, and guide and model scale it differently, or mask it",
        "Leave the site out of AnalyticKL(...), or scale and mask both sides alike.",
    )


def _check_sticking(chosen: Mapping[str, Estimator], graph: Graph) -> None:
    """The path of such a value has a weight of its own, from its site's parameters on: nothing that moves may come in
    from above with another, and no score function below would see it."""
    for name in (n for n, e in chosen.items() if e.sticks):
        for up in graph.ancestors[name]:
            if chosen[up].value.moves and not chosen[up].sticks:
                raise site_error(
                    name,
                    f"{chosen[name]!r} under a bound weighs the path of its value, and site '{up}' "
                    f"above it has {chosen[up]!r}, whose path weighs otherwise",
                    f"Use {chosen[name]!r} at both, or Pathwise() at both.",
                )
        for down in graph.descendants(frozenset([name])):
            if not chosen[down].sticks and chosen[down].value not in (Value.LIBRARY, Value.OWN):
                raise site_error(
                    name,
                    f"{chosen[name]!r} under a bound of several particles needs values below it that carry their "
                    f"gradient, and site '{down}' has {chosen[down]!r}",
                    "Use Pathwise() here.",
                )


def _check_relaxable(name: str, views: Mapping[str, Site], chosen: Mapping[str, Estimator], graph: Graph) -> None:
    """A hard draw downstream of a relaxed value would make the cost jump: the gradient would be biased."""
    for down in graph.descendants(frozenset([name])):
        if not chosen[down].value.whole and (views[down].family not in RELAXABLE or views[down].time):
            raise site_error(
                name,
                f"{type(chosen[name]).__name__} differentiates the cost at relaxed values, but site '{down}' "
                f"({views[down].distribution}) depends on it and cannot be relaxed",
                "Use RELAX() here, or Reinforce(LeaveOneOut()) with num_particles=2 or more.",
            )
