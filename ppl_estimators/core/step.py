"""One evaluation of the loss, the same for every library: draw, measure, evaluate other values, assemble.

A `library.Library` runs the program and knows its distributions; which estimator runs where, and what each site does in
every further evaluation (given, kept, relaxed, drawn again), is the plan's. Arrays of one particle carry no lead axes;
`Library.particles` joins those of all particles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from . import averaging, bounds, objectives, relaxation, verify
from .assembly import Evaluated, assemble
from .averaging import Average
from .credit import Graph, downstream_costs
from .enumeration import Unplaced
from .errors import site_error
from .estimator import Estimator, Measure, Noise
from .families import DISCRETE
from .keep import Kept
from .library import CompiledLibrary, Joined, Library, Message, Run, Traces, Values
from .objectives import Elsewhere, Locally, Weighted
from .ops import Array, Ops
from .plan import Group, Plan, Settings, check_summed, check_unheard, weighed_apart
from .posterior import Posterior, posterior
from .site import Costs, Draw, Site, Term, weighed


class Turn(NamedTuple):
    """Another value of a site in a scan, and the steps that take it."""

    value: Array
    steps: Array


@dataclass(frozen=True)
class Step:
    """One evaluation of the loss of a program in its library."""

    settings: Settings
    library: Library

    def value(self) -> Array:
        """−objective of fresh particles."""

        joined = self.library.particles(self.drawn, self.settings.particles)
        return -self._combined(joined.arrays["objective"])[0]

    def drawn(self, source: Any) -> tuple[dict[str, Any], Run]:
        """One particle's objective, and nothing else of it."""
        run = self.run(source)
        return {"objective": self._collected(self._weighed(run, run.terms)), "sites": {}}, run

    def log_weights(self, count: int) -> tuple[Array, float]:
        """log w of so many particles as the program itself draws them, ``[K, ...]``, without what multiplies it, the
        N/B of its plates; and that."""
        library, objective, scale = self.library, bounds.WEIGHTS, []

        def one(source: Any) -> tuple[dict[str, Any], Run]:
            run = self._plain(source)
            run.terms = list(library.terms(run.traces, run.plan, frozenset()))
            scale.append(objective.scale(run.terms))
            return {"objective": objective.collect(library.ops, run.terms), "sites": {}}, run

        return library.particles(one, count).arrays["objective"], scale[-1]

    def loss(self) -> tuple[Array, dict[str, dict[str, Array]], Joined]:
        """The loss, whose gradient is the estimate; the new state of every site that keeps some; all particles."""
        joined = self.library.particles(self.particle)
        loss, states = self.assemble(joined)
        objective = self.settings.objective
        if declared := objective.keeps():
            past = self.library.past(declared)
            states[objectives.NAME] = objective.after(past)
            joined = joined._replace(kept={**joined.kept, objectives.NAME: Kept(state=past)})
        return loss, states, joined

    def posterior(self, count: int) -> Posterior:
        """What is known of the latent sites after so many runs of the program as it draws itself."""
        library, names = self.library, set[str]()

        def one(source: Any) -> tuple[dict[str, Any], Run]:
            run = self._plain(source)
            found = posterior(library.ops, run.traces.values, library.tables(run.traces), library.uniform(source))
            if other := names and names ^ found.samples.keys():
                raise site_error(min(other), "in some of the draws only", "Ask for one at a time, num_samples=1.")
            names.update(found.samples)
            return {"objective": library.zero(), "sites": {}, "posterior": found._asdict()}, run

        return Posterior(**library.particles(one, count).arrays["posterior"])

    def _plain(self, source: Any) -> Run:
        """A run of the program as it draws itself."""
        run = Run(source, self.library.plan())
        run.traces = self.library.run(self.library.own, source, first=True)
        run.plan = self.library.plan(run.traces)
        return run

    def check(self) -> verify.Checked:
        """One particle, and all that can be asked of its program. Raises `EstimatorError`."""
        found: list[verify.Checked] = []

        def one(source: Any) -> tuple[dict[str, Any], Run]:
            drawn, run = self.drawn(source)
            found.append(verify.checked(self.library, run))
            return drawn, run

        self.library.particles(one, 1)
        return found[-1]

    # ---- one particle -------------------------------------------------------------------------------------------

    def particle(self, source: Any) -> tuple[dict[str, Any], Run]:
        """Everything that the assembly needs, as arrays."""
        library, ops, run = self.library, self.library.ops, self.run(source)
        given, costs = self._measured(run), self._costs(run)
        elsewhere: dict[str, dict[str, Array]] = {"alternatives": {}, "relaxed": {}, "relaxed_slope": {}}
        several, explicit = [g for g in run.plan.groups if g.alternatives], self._explicit(run)
        compiled = library.compiled
        if compiled is not None and len(several) > 2 and not self.settings.average_model:
            elsewhere["alternatives"] = self._alternatives_of_all(compiled, run, several)
            several = []
        for group in run.plan.groups:
            if group in several:
                elsewhere["alternatives"] |= self._alternatives(run, group, explicit)
            elif group.relaxations:
                relaxed, slopes = self._relaxations(run, group)
                elsewhere["relaxed"] |= relaxed
                elsewhere["relaxed_slope"] |= slopes
        explicit = averaging.averaged(ops, explicit, run.averages)
        averages = {"elsewhere": {str(i): w._asdict() for i, w in enumerate(run.weighted)}}
        found = {
            name: {
                "site": library.arrays(site),
                "draw": {"value": run.draws[name].value, "extra": dict(run.draws[name].extra)},
                "given": given[name],
                "cost": costs[name],
                "elsewhere": {k: x[name] for k, x in elsewhere.items() if name in x},
            }
            for name, site in run.sites.items()
        }
        collected, held, dreamt = self._collected(explicit), self._held(run), self._dreamt(run)
        return {"objective": collected, "held": held, "dreamt": dreamt, "averages": averages, "sites": found}, run

    def run(self, source: Any) -> Run:
        """The particle itself: its values and its cost terms."""
        library, run = self.library, Run(source, self.library.plan())
        run.traces = library.run(partial(self._draw, run), source, first=True)
        if run.traces.asked:
            check_unheard(self.settings, run.traces.asked, run.traces.guide)
        latents = run.traces.latents()
        check_summed(self.settings, run.traces.guide, run.traces.model, latents)
        expected, run.plan = run.plan, library.plan(run.traces)
        drawn, run.sites = run.sites, {}
        for name in run.plan.local:
            known = run.plan is expected and name in drawn
            site = run.sites[name] = drawn[name] if known else library.view(run.plan, latents[name])
            site.value = latents[name]["value"]
            if name not in run.draws:
                run.draws[name] = self._afterwards(run, latents[name], site)
        run.terms = library.terms(run.traces, run.plan, run.plan.soft, first=True)
        library.check(run)
        if declared := self.settings.objective.keeps():
            run.past = library.past(declared)
        return run

    def _weighed(self, run: Run, terms: Sequence[Term], traces: Any = None) -> Sequence[Term]:
        """The cost terms of a run, by default of the particle's own, as they count for the objective."""
        if run.plan.analytic:
            terms = self._analytic(run.plan, terms, traces or run.traces)
        return self.settings.objective.weighed(self.library.ops, terms, run.plan.estimators, run.past)

    def _analytic(self, plan: Plan, terms: Sequence[Term], traces: Traces) -> Sequence[Term]:
        """With the divergence in the place of log p, as a function of the site's parents, and without −log q."""
        found = [t for t in terms if t.site not in plan.analytic]
        for name in dict.fromkeys(t.site for t in terms if t.site in plan.analytic):
            ours, theirs = traces.guide[name], traces.model[name]
            if ("model", name) not in plan.depends_on or any(t.weight is not None for t in terms if t.site == name):
                raise site_error(
                    name,
                    "a closed divergence was asked for, and it depends on values that are summed over",
                    "Leave the site out of AnalyticKL(...).",
                )
            unlike = self.library.unlike(ours, theirs)
            if unlike is True:
                raise weighed_apart(name)
            try:
                value = -self.library.divergence(ours, theirs)
            except NotImplementedError as error:
                kinds = [type(m["fn"]).__name__ for m in (ours, theirs)]
                raise site_error(
                    name,
                    f"no divergence of {kinds[0]} from {kinds[1]} is known in closed form",
                    "Leave the site out of AnalyticKL(...).",
                ) from error
            if unlike is not False:
                value = self.library.ops.where(unlike, math.nan, value)
            deps = plan.depends_on["model", name] | plan.depends_on["guide", name]
            plates = frozenset().union(*(t.plates for t in terms if t.site == name))
            found.append(Term("model", name, value, plates, deps - {name}))
        return found

    def _draw(self, run: Run, msg: Message) -> Array:
        name, estimator = msg["name"], self.library.estimator(run.plan, msg)
        if estimator.value.library:
            value = self.library.own(msg)
            return value if self.settings.objective.moves else self.library.ops.stop_gradient(value)
        site = self.library.view(run.plan, msg)
        draw, noise = self._drawn(run, msg, site, estimator, {})
        held = _held(self.library.ops, draw)
        if not self.library.step(msg, noise):
            run.draws[name], run.sites[name], run.noise[name] = held, site, noise
        return draw.value if estimator.value.moves else self.library.sampled(msg, held.value)

    def _afterwards(self, run: Run, msg: Message, site: Site) -> Draw:
        """The draw of a site whose value was made elsewhere: by the library, or step by step in a scan. Of the latter
        it is made once more, all steps at once, from the noise of these."""
        library, ops, name = self.library, self.library.ops, msg["name"]
        estimator, held = run.plan.estimators[name], Draw(ops.stop_gradient(site.value))
        if estimator.value.library:
            return held
        run.noise[name] = noise = dict(msg["noise"])
        for label, n in estimator.noise(site).items():
            if n.law == "state":
                noise[label] = library.state(site, estimator, label)
        return replace(_held(ops, estimator.draw(ops, site, noise)), value=held.value)

    def _drawn(
        self, run: Run, msg: Message, site: Site, estimator: Estimator, before: Mapping[str, Array]
    ) -> tuple[Draw, dict[str, Array]]:
        """What an estimator draws at a site, and from which noise: that of ``before``, but for what the site's own
        parameters shape."""
        library, ops = self.library, self.library.ops
        declared = estimator.noise(site)
        noise: dict[str, Array] = {}
        with library.differentiating(False):
            for i, (label, n) in enumerate(declared.items()):  # values first: a draw again may ask for nothing else
                if n.law == "value":
                    noise[label] = ops.stop_gradient(library.value(run.source, msg, i))
            for i, (label, n) in enumerate(declared.items()):
                if n.law == "state":
                    noise[label] = library.state(site, estimator, label)
                elif n.law != "value":
                    if label in before and n.concentration is None:
                        noise[label] = library.part(msg, before[label])
                    else:
                        noise[label] = library.noise(run.source, msg, site, label, n, i)
            if not estimator.value.moves:
                return estimator.draw(ops, site, noise), noise
        return estimator.draw(ops, site, noise), noise

    def _measured(self, run: Run) -> dict[str, Values]:
        """Measure what the estimators want to know under the sites' laws; the arrays that their specs bring along."""
        library, latents, found = self.library, run.traces.latents(), {}
        for name, site in run.sites.items():
            msg, estimator, draw = latents[name], run.plan.estimators[name], run.draws[name]
            value = draw.value if site.family in DISCRETE else site.value
            extra: dict[str, Array] = {}
            measures = estimator.measures
            if Measure.LOG_Q in measures:
                site.log_q = library.log_q(msg, value)
                extra |= {label: library.log_q(msg, v) for label, v in estimator.scored(draw).items()}
            if Measure.SCORE_NORM in measures:
                site.score_norm = library.score_norm(site, msg, value)
            if Measure.FUNCTIONS in measures:
                extra |= estimator.measured(value, msg["fn"])
            if extra:
                run.draws[name] = Draw(draw.value, {**draw.extra, **extra})
            asked = self.settings.asked(name, library.requested(msg)) or estimator
            found[name] = given = library.given(msg, asked)
            like = next(x for x in (site.logits, site.log_q, value) if x is not None)
            run.kept[name] = library.keep(site, estimator, given, like)
        return found

    def _costs(self, run: Run) -> dict[str, Array]:
        """What the objective wants of every site with a surrogate, at the drawn values: its downstream cost."""
        sites = list(run.sites.values())
        if not sites:
            return {}
        with self.library.differentiating(False):
            credited = partial(self._downstream, run.plan.graph, sites)
            terms = self._weighed(run, run.terms)
            return dict(self.settings.objective.drawn(self.library.ops, terms, sites, credited))

    def _elsewhere(
        self, run: Run, sites: Sequence[Site], alone: frozenset[str] = frozenset(), *,
        explicit: Sequence[Term] | None = None,
    ) -> Elsewhere:  # fmt: skip
        """The same, where some sites take other values, each element of those in ``alone`` by itself; differentiable
        in what the ``explicit`` terms lead to, if they are given."""
        objective, plan, ops = self.settings.objective, run.plan, self.library.ops
        with self.library.differentiating(explicit is not None):
            terms = self._weighed(run, run.terms) if explicit is None else explicit
            if explicit is None and plan.keeps_score:
                terms = [replace(t, value=ops.stop_gradient(t.value)) for t in terms]
            return objective.elsewhere(ops, terms, sites, alone, partial(self._downstream, plan.graph, sites))

    def _downstream(self, graph: Graph, sites: Sequence[Site], terms: Sequence[Term]) -> dict[str, Array]:
        found = downstream_costs(self.library.ops, graph, terms, sites)
        return {s.name: self.library.zero(s) if found[s.name] is None else found[s.name] for s in sites}

    def _explicit(self, run: Run) -> Sequence[Term]:
        """The terms whose own gradient counts: -log q of a score site has mean zero and is held fixed."""
        library, ops, plan = self.library, self.library.ops, run.plan
        fixed: dict[str, Term] = {}
        if plan.sticking:
            again = library.guide_again(run.traces, run.source)
            terms = library.terms(again, plan, plan.soft, only=plan.sticking)
            fixed = {t.site: t for t in terms if t.side == "guide" and t.site in plan.sticking}
        explicit = []
        for t in run.terms:
            if t.side == "guide" and t.site in fixed:
                stuck = fixed[t.site]
                t = stuck if t.weight is None else weighed(ops, replace(t, value=stuck.cost), t.weight)
            elif t.side == "guide" and t.site in plan.estimators and not self.settings.objective.keeps_score:
                if not plan.estimators[t.site].value.moves:
                    t = t.fixed(ops)
            explicit.append(t)
        return self._weighed(run, explicit)

    def _held(self, run: Run) -> Array | None:
        """What the objective needs of the particle where values whose -log q is differentiated through them only stand
        still, and only where it wants to know."""
        library, plan, first = self.library, run.plan, run.traces.guide
        if not (plan.sticking and self.settings.objective.keeps_score):
            return None
        down = plan.graph.descendants(plan.sticking) - plan.sticking

        def draw(msg: Message) -> Array:
            name = msg["name"]
            if name in down:
                return self._drawn_again(run, msg)
            return library.again(msg, first[name], constants=name in plan.sticking)

        terms = library.terms(library.run(draw, run.source), plan, plan.soft)
        fixed = [t.side == "guide" and t.site in plan.sticking for t in terms]
        stop = library.ops.stop_gradient
        held = [replace(t, value=stop(t.value)) if f else t for f, t in zip(fixed, terms, strict=True)]
        return self._collected(self._weighed(run, held))

    def _dreamt(self, run: Run) -> Array | None:
        """What the guide learns from the model's own draws, if the objective wants that."""
        library, plan, weight = self.library, run.plan, self.settings.objective.dreams()
        if not weight:
            return None
        try:
            traces = library.dream(run.source)
        except Unplaced as error:
            raise site_error(
                error.site,
                "drawn by the guide only, and what the model dreams has no value for it",
                "Leave out sleep_phi, or draw it in the model too.",
            ) from error
        for name, msg in traces.guide.items():
            factor = msg["type"] == "sample" and name not in traces.latents()
            if factor and plan.depends_on.get(("model", name)) != frozenset():
                raise site_error(
                    name,
                    "a factor of the model that depends on what is drawn, and draws of the model would be without it",
                    "Make it the log probability of an observed site, or leave out sleep_phi.",
                )
        terms = library.terms(traces, plan, frozenset())
        return objectives.Dreamt(weight).collect(
            library.ops, [t for t in terms if ("guide", t.site) in plan.depends_on]
        )

    # ---- other values -------------------------------------------------------------------------------------------

    def _again(
        self, run: Run, group: Group, values: Values, *, constants: bool, temperature: Array | None = None,
        uniforms: Values | None = None, wide: Any = None,
    ) -> Sequence[Term]:  # fmt: skip
        """Cost terms downstream of the group when its sites take other values. What is not downstream keeps its
        value; what is, is drawn again from the same noise; where the values are relaxed, the discrete sites downstream
        do what the group says."""
        library, plan, members = self.library, run.plan, frozenset(group.sites)
        down, soft, first = plan.below(group), plan.softened(group), run.traces.guide

        def draw(msg: Message) -> Array:
            name = msg["name"]
            if name in values:
                return self._given(run, msg, values[name], name in down)
            if name not in first:  # a branch that the drawn values did not take
                if group.relaxations:
                    raise site_error(
                        name,
                        "drawn only in a branch that relaxed values take, and a branch has no derivative",
                        "Use Reinforce(LeaveOneOut()) or DisARM() at the site that decides the branch.",
                    )
                with library.differentiating(False):
                    return library.own(msg)
            if name not in down:
                return library.again(msg, first[name], constants=constants)
            if name in soft:
                site = library.view(plan, msg)
                u = None if temperature is None else (uniforms or {})[name]
                return relaxation.downstream(library.ops, site.family, site.logits, u, temperature)
            return self._drawn_again(run, msg, wide)

        settled = not (down or plan.branches) and all(not plan.estimators[n].value.moves for n in members)
        above = run.traces if settled and not group.relaxations else None
        traces = library.run(draw, run.source, constants=constants, wide=wide, above=above)
        relaxed = plan.soft | (soft | {n for n in members if plan.relaxable(n)} if group.relaxations else frozenset())
        terms = self._weighed(run, library.terms(traces, plan, relaxed, only=members), traces)
        return [t for t in terms if t.depends_on & members]

    def _given(self, run: Run, msg: Message, value: Array | Turn, below: bool) -> Array:
        """The other value of a site. Steps of a scan that do not have their turn keep theirs, or take it from the same
        noise, which is the same up to the first that has it."""
        library = self.library
        if not isinstance(value, Turn):
            return library.part(msg, value)
        first = run.traces.guide[msg["name"]]
        other = self._drawn_again(run, msg) if below else library.again(msg, first, constants=True)
        return library.ops.where(library.part(msg, value.steps), library.part(msg, value.value), other)

    def _drawn_again(self, run: Run, msg: Message, wide: Any = None) -> Array:
        """What a site below others takes when these have changed, from the noise that it had."""
        library, name = self.library, msg["name"]
        estimator = run.plan.estimators[name]
        if estimator.value.library:
            return library.own(msg)
        site = library.view(run.plan, msg, wide)
        value = self._drawn(run, msg, site, estimator, run.noise.get(name, {}))[0].value
        return value if estimator.value.moves else library.sampled(msg, library.ops.stop_gradient(value))

    def _alternatives(self, run: Run, group: Group, explicit: Sequence[Term]) -> dict[str, Array]:
        """Downstream costs at each counterfactual value, ``[A, *plates]`` per site; where the model's own gradient is
        averaged over these values, what that needs is added to the run."""
        library, ops, plan = self.library, self.library.ops, run.plan
        members = [run.sites[n] for n in group.sites]
        average = self.settings.average_model and averaging.possible_at(plan, group)
        bound = average and plan.keeps_score
        elsewhere = self._elsewhere(run, members, plan.alone, explicit=explicit if bound else None)
        like = members[0].logits
        weights = averaging.weights(ops, plan, group, run.sites, run.draws, like) if average else None

        def values(index: Any) -> Values:
            found = {}
            for site in members:
                estimator, draw = plan.estimators[site.name], run.draws[site.name]
                value = _alternative(ops, estimator, site, draw, index, group.alternatives)
                if weights is not None:
                    value = averaging.possible(ops, site, weights[1 + index], value, draw.value)
                value = library.sampled(run.traces.guide[site.name], value)
                found[site.name] = _turn(ops, estimator, site, value, index)
            return found

        def evaluate(
            values: Values, sites: Sequence[Site] = members, graph: Graph = plan.graph, wide: Any = None
        ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:
            terms = self._again(run, group, values, constants=not average, wide=wide)
            beside = frozenset() if wide is None else frozenset([wide])
            costs = elsewhere(terms, sites, partial(self._downstream, graph, sites), beside)
            counted = averaging.counted(plan, group, terms) if average and not bound else []
            return costs, {(t.side, t.site): t.value for t in counted}

        costs, terms = library.each(evaluate, values, group, run, average)
        if bound:
            drawn = self.settings.objective.drawn(ops, explicit, members[:1], partial(self._downstream, plan.graph))
            log_w = ops.concat([drawn[members[0].name][None], costs[members[0].name]], axis=0)
            weights = ops.broadcast_to(averaging.aligned(ops, weights, log_w[0]), log_w.shape)
            run.weighted.append(Weighted(weights, log_w))
        elif weights is not None:
            run.averages.append(Average(weights, terms))
        return {s.name: ops.stop_gradient(_each_turn(ops, s, costs[s.name])) for s in members}

    def _alternatives_of_all(self, library: CompiledLibrary, run: Run, groups: Sequence[Group]) -> dict[str, Array]:
        """The same for many groups, by one evaluation that serves them all: data say which sites are given a value,
        which keep theirs and which are drawn again. A compiler sees one more copy of the program, however many groups
        there are; the price is that every evaluation runs the whole of it."""
        ops, plan, first = library.ops, run.plan, run.traces.guide
        jobs = [(group, i) for group in groups for i in range(group.alternatives)]
        members = [run.sites[n] for n in run.sites if any(n in g.sites for g in groups)]
        down = frozenset().union(*(plan.below(g) for g in groups))
        number = {s.name: [i if s.name in g.sites else -1 for g, i in jobs] for s in members}
        below = {n: [n in plan.below(g) for g, _ in jobs] for n in down}
        elsewhere = self._elsewhere(run, members, plan.alone)

        def one(job: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
            values = {}
            for site in members:
                index, draw = job["number"][site.name], run.draws[site.name]
                most = 1 + max(number[site.name])
                estimator, index = plan.estimators[site.name], ops.clip(index, 0, most - 1)
                value = library.sampled(first[site.name], _alternative(ops, estimator, site, draw, index, most))
                values[site.name] = _turn(ops, estimator, site, value, index)

            def decide(msg: Message) -> Array:
                name = msg["name"]
                value = library.again(msg, first[name], constants=True)
                if name in down:
                    value = library.either(job["below"][name], self._drawn_again(run, msg), value, msg, first[name])
                if name in values:
                    other = values[name]
                    moved, other = (other.steps, other.value) if isinstance(other, Turn) else (None, other)
                    mine = job["number"][name] >= 0
                    mine = mine if moved is None else mine & library.part(msg, moved)
                    value = ops.where(mine, library.part(msg, other), value)
                return value

            traces = library.run(decide, run.source, constants=True)
            terms = self._weighed(run, library.terms(traces, plan, plan.soft, only=frozenset(values)), traces)
            return elsewhere(terms, members, partial(self._downstream, plan.graph, members))

        costs = library.mapped(one, {"number": number, "below": below})
        rows = {n: [e for e, i in enumerate(numbers) if i >= 0] for n, numbers in number.items()}
        costs = {s.name: _each_turn(ops, s, library.rows(costs[s.name], rows[s.name])) for s in members}
        return {n: ops.stop_gradient(c) for n, c in costs.items()}

    def _relaxations(self, run: Run, group: Group) -> tuple[dict[str, Array], dict[str, Array]]:
        """Costs ``[M, *plates]`` at relaxed values and their slopes ``[M, *batch, *event]``, differentiable in what
        the estimators keep and in nothing else."""
        library, ops, plan = self.library, self.library.ops, run.plan
        members = [run.sites[n] for n in group.sites]
        relaxed: dict[str, list[Array]] = {n: [] for n in group.sites}
        slope: dict[str, list[Array]] = {n: [] for n in group.sites}
        elsewhere = self._elsewhere(run, members)
        uniforms = self._uniforms(run, plan.softened(group)) if group.downstream == "relaxed" else {}
        for index in range(group.relaxations):
            values = {
                s.name: plan.estimators[s.name].relaxed(ops, s, run.draws[s.name], index, run.kept[s.name])
                for s in members
            }
            first = members[0]
            temperature = plan.estimators[first.name].downstream_temperature(ops, first, index, run.kept[first.name])

            def total(values: Values, temperature: Array | None = temperature) -> tuple[Array, Values]:
                terms = self._again(run, group, values, constants=True, temperature=temperature, uniforms=uniforms)
                costs = elsewhere(terms, members, partial(self._downstream, plan.graph, members))
                return sum((ops.sum(t.value) for t in terms), library.zero()), costs

            slopes, costs = library.slopes(total, values)
            for n in group.sites:
                relaxed[n].append(costs[n])
                slope[n].append(slopes[n])
        return {n: ops.stack(x) for n, x in relaxed.items()}, {n: ops.stack(x) for n, x in slope.items()}

    def _uniforms(self, run: Run, sites: Iterable[str]) -> dict[str, Array]:
        """Noise for sites that are relaxed because something above them is: their own where it has the right shape."""
        found = {}
        for name in sites:
            site, noise = run.sites[name], run.noise.get(name, {})
            for label in ("u", "relaxed u"):
                if label in noise and noise[label].shape == site.logits.shape:
                    found[name] = noise[label]
            if name not in found:
                wanted, msg = Noise("uniform", tuple(site.logits.shape)), run.traces.guide[name]
                found[name] = self.library.noise(run.source, msg, site, "relaxed u", wanted, 0)
                run.noise.setdefault(name, {})["relaxed u"] = found[name]
        return found

    # ---- all particles ------------------------------------------------------------------------------------------

    def assemble(self, joined: Joined) -> tuple[Array, dict[str, dict[str, Array]]]:
        """The loss and the new states, from what all particles found."""
        averages = [Weighted(**a) for a in joined.arrays["averages"]["elsewhere"].values()]
        value, local = self._combined(joined.arrays["objective"], joined.arrays["held"], averages)
        if (dreamt := joined.arrays["dreamt"]) is not None:
            likely = self.library.ops.mean(dreamt)
            value = value + (likely - self.library.ops.stop_gradient(likely))
        evaluated, kept = {}, {}
        for name, facts in joined.sites.items():
            found = joined.arrays["sites"][name]
            site = facts.filled(lead=1, value=None, law=None, **found["site"])
            evaluated[name] = Evaluated(site, Draw(**found["draw"]), Costs(found["cost"], **found["elsewhere"]))
            given, known = found["given"], joined.kept[name]
            kept[name] = replace(known, given=given) if given else known
        return assemble(self.library.ops, value, local, joined.estimators, evaluated, kept, joined.count)

    def _collected(self, terms: Sequence[Term]) -> Array:
        """What the objective needs of one particle; a program without sites has nothing to say."""
        return self.settings.objective.collect(self.library.ops, terms) if terms else self.library.zero()

    def _combined(
        self, collected: Array, held: Array | None = None, averages: Sequence[Weighted] = ()
    ) -> tuple[Array, Locally]:
        objective, terms = self.settings.objective, self.library.plan().terms
        scale = objective.scale(terms) if terms else 1.0
        return objective.combine(self.library.ops, collected, scale, held, averages)


def _alternative(ops: Ops, estimator: Estimator, site: Site, draw: Draw, index: Any, most: int) -> Array:
    """The counterfactual value number ``index``; the drawn one where this site has fewer than its group."""
    n = estimator.alternatives(site).count
    if n * site.turns == most:
        return estimator.alternative(ops, site, draw, index if site.turns == 1 else index % n)
    if isinstance(index, int):
        return estimator.alternative(ops, site, draw, index) if index < n else draw.value
    value = estimator.alternative(ops, site, draw, ops.clip(index, 0, n - 1))
    return ops.where(index < n, value, draw.value)


def _turn(ops: Ops, estimator: Estimator, site: Site, value: Array, index: Any) -> Array | Turn:
    """``value``, and the steps that take it in evaluation number ``index`` if they do so one after another."""
    if site.turns == 1:
        return value
    turn = ops.asarray(index) // estimator.alternatives(site).count
    mine = ops.indices(site.steps, value) % site.turns == turn
    return Turn(value, ops.reshape(mine, site.batch_shape[: site.time]))


def _each_turn(ops: Ops, site: Site, costs: Array) -> Array:
    """``[turns * A, *steps, ...]`` to ``[A, *steps, ...]``: of each step that of the evaluations in which it moves."""
    if site.turns == 1:
        return costs
    by_turn = ops.reshape(costs, (site.turns, -1, *costs.shape[1:]))
    turn, step = ops.indices(site.turns, costs), ops.indices(site.steps, costs) % site.turns
    shape = (*site.batch_shape[: site.time], *(1,) * (costs.ndim - 1 - site.time))
    mine = ops.reshape(turn[:, None] == step, (site.turns, 1, *shape))
    return ops.sum(ops.where(mine, by_turn, ops.zeros_like(by_turn)), axis=0)


def _held(ops: Ops, draw: Draw) -> Draw:
    return Draw(ops.stop_gradient(draw.value), {k: ops.stop_gradient(x) for k, x in draw.extra.items()})
