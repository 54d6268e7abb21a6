"""What Pyro does for one evaluation of the loss (`core.library.Library`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import check_model_guide_match, check_site_shape
from torch.utils._pytree import tree_map

from ..core import averaging
from ..core.credit import Graph
from ..core.enumeration import Unplaced
from ..core.errors import site_error, warn
from ..core.estimator import Estimator, Noise
from ..core.keep import Keeps, Kept
from ..core.library import Joined, Library, Run, Values
from ..core.objectives import NAME, check_dreams
from ..core.plan import Group, Plan, Settings, weighed_apart
from ..core.posterior import Tables, Uniform
from ..core.site import Plate, Site, Term
from ..core.verify import (
    BUDGET,
    Along,
    Found,
    Height,
    Key,
    cost_of,
    coupled_by_values,
    cut,
    equal,
    look,
    not_the_same,
    run_again,
    warn_of_coupling,
    warn_of_cuts,
)
from ..policy import requested
from .baseline import from_baseline
from .buffers import Buffers, Held
from .dependencies import Provenance, StopParameters, Threads, as_written, led, reachable
from .distributions import (
    Law,
    another,
    divergence,
    is_point,
    line,
    log_q,
    named,
    natural_parameters,
    score_norm,
    unlike,
)
from .enumeration import Layout
from .keep import Keeper, read_state
from .memory import Memory, code_of, kind_of, shape_of
from .ops import OPS
from .particles import Particles, moved
from .randomness import Randomness, SideBySide, Stream
from .run import Message, Traces, execute, plates_of, tables_of, terms_of, traced, turned, view
from .survey import dependencies, survey

Array = torch.Tensor
_ALTERNATIVES = "_counterfactual_values"
_STRUCTURES = 8  # so many of a program are verified in full, and as many as are remembered with few runs
_FEW = 2
_NOTHING_KEPT = Kept()  # one for all such sites


class _Unplanned(Exception):
    """A run has come upon what the expected plan does not know, before anything depended on a drawn value, or where
    that was not followed. It is made again, from the same random numbers, and nothing is selected by that."""


@dataclass(eq=False)
class PyroLibrary(Library):
    """A Pyro program: model, guide and their arguments. ``vectorize`` puts either into the plate of the particles;
    ``guess`` finds ``max_plate_nesting``."""

    settings: Settings
    randomness: Randomness
    memory: Memory
    keeper: Keeper
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    max_plate_nesting: float
    side_by_side: bool
    vectorize: Callable[[Any], Any] | None
    standalone: bool
    verify: bool
    guess: Callable[[], int]

    ops = OPS
    compiled = None
    passing = "svi.step(batch)"
    choosing = "EstimatorELBO({})"

    def __post_init__(self) -> None:
        model, guide, arguments = self.model, self.guide, (self.args, tuple(sorted(self.kwargs.items())))
        self.call = (self.settings, code_of(model), code_of(guide), *map(shape_of, arguments))
        self.program = self.call[1:3]
        self.written, self.vectorized = guide, self.vectorize is not None
        self.observes = isinstance(getattr(guide, "guide", guide), GuideMessenger)
        if self.vectorize is not None:
            self.model, self.guide = self.vectorize(model), self.vectorize(guide)
        self.axis = Particles(self.vectorized, self.max_plate_nesting)
        self.subsamples: dict[str, Array] = {}
        self._plan: Plan | None = self.memory.expected.recall(self.call)
        self._term: Array | None = None  # of the run, whose device and type others take
        self._used: dict[str, Estimator] = {}
        self._credits = self._plan is None or not self._plan.saturated  # may it matter who depends on whom?
        self._follow: Any = None  # the `Provenance` of the last first run; None if it was not followed
        self._pinned = False  # no run is thrown away any more
        self._new = self._unchecked = False  # is the structure new; and are its shapes not checked yet?
        self._stands = False  # need a guide that does the same not be run again?
        self._recorded = False  # is the stream of the last first run known?
        self._threads = Threads()

    # ---- structure: which sites there are, who depends on whom ------------------------------------------------------

    def plan(self, traces: Traces | None = None) -> Plan:
        if traces is not None:
            self._plan = self._planned(traces)
        return self._plan if self._plan is not None else _nothing_known(self.settings)

    def _planned(self, traces: Traces) -> Plan:
        """The plan for the structure of a run: what is in it and, if it was followed, who depends on whom."""
        follow = self._follow
        control = follow is not None and follow.control
        if follow is not None and follow.stale() and not control and not self._pinned:
            raise _Unplanned
        latents = traces.latents()
        behind = dict.fromkeys(traces.own_terms()) if follow is None else self._behind(traces)
        facts = (
            self.settings,
            tuple((n, m.get("kind") or kind_of(m), m["fn"].batch_shape, plates_of(m)) for n, m in latents.items()),
            tuple(behind),
            tuple(traces.plates(*k) for k in behind),
            tuple(traces.subsamples),
        )
        signature = facts, None if follow is None else (tuple(behind.values()), control)
        plan = self.memory.plans.recall(signature)
        if plan is None:
            if follow is None:
                raise _Unplanned
            plan = self._made(traces, follow)
            self.memory.plans.store(signature, plan)
            if plan.saturated:  # then the next runs are not followed
                self.memory.plans.store((facts, None), plan)
            self._unchecked = True
        self._new |= plan is not self.memory.expected.recall(self.call)  # another program may have the same plan
        if plan is not self._plan or plan is not self.memory.last:
            self.memory.expected.store(self.call, plan)
            self.memory.last = plan
        if plan.reruns and not self._recorded:
            self._plan = plan
            raise _Unplanned
        others = {n: e for n, e in self._used.items() if plan.estimators[n] is not e}
        if any(plan.estimators[n].structure() != e.structure() for n, e in others.items()):
            if follow is None or not (control or self._pinned):  # nothing that was drawn decided which structure it is
                self._plan = plan
                raise _Unplanned
            settings = replace(self.settings, estimators=tuple({**self.settings.mapping, **self._used}.items()))
            return self._made(traces, follow, settings)
        if others:  # made anew at every run
            return replace(plan, estimators={**plan.estimators, **self._used})
        return plan

    def _behind(self, traces: Traces) -> dict[tuple[str, str], int]:
        return dependencies(traces, self._follow.order if self.program in self.memory.distrusted else None)

    def _made(self, traces: Traces, follow: Provenance, settings: Settings | None = None) -> Plan:
        latents, behind = traces.latents(), self._behind(traces)
        self.memory.seen |= latents.keys()
        found = survey(traces, follow, behind, self.requested)
        others = list(self.memory.seen - latents.keys())  # of other structures
        plan = found.plan(settings or self.settings, self.settings.mapping, others)
        if is_validation_enabled():
            check_model_guide_match(traced(traces.model), traced(traces.guide), self.max_plate_nesting)
        # arrays of this run are not wanted: only facts
        none: dict[str, Any] = {"value": None, "scale": 1.0, "logits": None, "named": {}, "law": None}
        return replace(plan, sites={n: replace(s, kind=kind_of(latents[n]), **none) for n, s in plan.sites.items()})

    def _survey(self) -> None:
        """Look at the structure of the program before drawing with the right estimators; leaves no trace."""

        def look(source: Stream) -> None:
            with torch.enable_grad():  # what is differentiable is part of the structure
                traces = self.run(lambda msg: msg["fn"](*msg["args"], **msg["kwargs"]), source, first=True)
                self._plan = self._planned(traces)
            raise _Unplanned

        self._plan = None
        self._attempt(look)

    def _attempt(self, one: Callable[[Stream], Any]) -> Any:
        """``one`` with a new stream; None if it cannot be told yet how to draw, and then all is as it was before: what
        was drawn, the minibatch, the buffers of modules."""
        memory, known, placed, result = self.memory, self._plan is not None, True, None
        program = self.model, self.guide, self.args, self.kwargs
        self._used, self.subsamples = {}, {}
        memory.generators.look(*program, everything=not known)
        before = memory.generators.state(everything=not known)
        places = memory.buffers
        again = self._plan is not None and self._plan.reruns
        with nullcontext(places.held(runs_again=again)) if known else places.watched(*program) as held:
            try:
                result = one(Stream(memory.generators, held))
            except _Unplanned:
                pass
            except Unplaced:
                self._place()
                placed = False
        if not known:
            memory.generators.learn(before, memory.generators.state(everything=True))
        if result is None:
            memory.generators.restore(before)
            Buffers.restore(held)
        return result if placed else self._attempt(one)

    def _place(self) -> None:
        """In the handler of `Unplaced`: from now on the program's enumerated values are laid out."""
        if self.program in self.memory.enumerating:
            raise
        self.memory.enumerating.add(self.program)
        if math.isinf(self.max_plate_nesting):
            self.max_plate_nesting = self.guess()

    # ---- one run ------------------------------------------------------------------------------------------------

    def run(
        self, draw: Callable[[Message], Array], source: Stream, *, first: bool = False, constants: bool = False,
        wide: Plate | None = None, above: Traces | None = None,
    ) -> Traces:  # fmt: skip
        model, guide, args, kwargs = self.model, self.guide, self.args, self.kwargs
        if wide is not None:
            model, guide = _along(wide)(model), _along(wide)(guide)
        if constants and torch.is_grad_enabled():
            args, kwargs = tree_map(_detached, (args, kwargs))
        layout = self._layout(wide)
        if first:  # further runs will want to know what this one drew, if there are any
            expected = self._plan
            self._recorded = expected is None or expected.reruns or bool(expected.branches) or self._pinned
            follows = self._credits
        with ExitStack() as stack:
            stack.enter_context(as_written())
            if first:
                self._follow = Provenance(self.memory.holdings_of(self.program)) if follows else None
                stack.enter_context(self._follow or nullcontext())
                stack.enter_context(self._threads)
            else:
                stack.enter_context(self._once_more(source))
                if constants and torch.is_grad_enabled():
                    stack.enter_context(StopParameters())
            return execute(
                model, guide, args, kwargs, draw=draw, subsamples=self.subsamples, observes=self.observes,
                provenance=self._follow if first else None, stream=source if self._recorded or not first else None,
                layout=layout, above=above if self._stands and wide is None else None,
            )  # fmt: skip

    def _layout(self, wide: Plate | None = None) -> Layout | None:
        """Where the values of enumerated sites go in a run, if the program has some."""
        if self.program not in self.memory.enumerating:
            return None
        nesting = int(self.max_plate_nesting) if wide is None else -wide.dim
        return Layout(nesting, self.settings.sums)

    @contextmanager
    def _once_more(self, source: Stream) -> Iterator[None]:
        """A further run of a particle: random numbers and buffers are what its first run found, and afterwards what it
        left."""
        generators = self.memory.generators
        now = generators.state()
        generators.restore(source.start)
        try:
            with Buffers.lent(source.buffers):
                yield
        finally:
            generators.restore(now)

    def guide_again(self, traces: Traces, source: Stream) -> Traces:
        first = traces.guide

        def replay(msg: Message) -> Array:
            return first[msg["name"]]["value"].clone()  # no transform may answer from its cache

        with as_written(), self._once_more(source), StopParameters():
            return execute(
                None, self.guide, self.args, self.kwargs, draw=replay, subsamples=self.subsamples, stream=source,
                layout=self._layout(),
            )  # fmt: skip

    def dream(self, source: Stream) -> Traces:
        check_dreams(self.written)

        def draw(msg: Message) -> Array:
            return self.randomness.value(f"dreamt {msg['name']}", msg["fn"], *msg["args"], **msg["kwargs"]).detach()

        guide, model = turned(self.model, self.guide)
        with as_written(), Buffers.lent(source.buffers):
            return execute(guide, model, self.args, self.kwargs, draw=draw, subsamples=self.subsamples)

    def given(self, msg: Message, asked: Estimator) -> Values:
        return asked.given(self.args, self.kwargs)

    def terms(
        self, traces: Traces, plan: Plan, relaxed: frozenset[str], *, only: frozenset[str] | None = None,
        first: bool = False,
    ) -> list[Term]:  # fmt: skip
        if not first:
            return terms_of(traces, plan.depends_on, relaxed, only=only, hard=plan.hard)
        local = frozenset(n for n in plan.local if not plan.estimators[n].value.moves)
        score_only = frozenset() if self.settings.objective.keeps_score else local
        terms = terms_of(traces, plan.depends_on, relaxed, score_only, local=local, hard=plan.hard)
        if terms:
            self._term = terms[0].value
        if self._unchecked and is_validation_enabled():
            for record in (traces.model, traces.guide):
                for msg in record.values():
                    check_site_shape(msg, self.max_plate_nesting)
        self._unchecked = False
        return terms

    def tables(self, traces: Traces) -> Tables:
        return tables_of(traces)

    def uniform(self, source: Stream) -> Uniform:
        return self.randomness.uniform

    # ---- one site -----------------------------------------------------------------------------------------------

    def estimator(self, plan: Plan, msg: Message) -> Estimator:
        name, facts = msg["name"], plan.sites.get(msg["name"])
        asked = self.settings.asked(name, self.requested(msg))
        msg["kind"] = kind = kind_of(msg)
        if facts is not None and facts.kind == kind:
            msg["kind"] = facts.kind  # of a thousand sites, so many objects less for the garbage collector
            chosen = plan.estimators[name] if asked is None else asked
        elif self._follow is None:
            raise _Unplanned
        else:  # a structure that was not met before
            site, particles = replace(view(msg), requested=asked), self.settings.particles
            chosen = self.settings.alone(site)
            named = asked is not None or isinstance(self.settings.default, Estimator)
            if named:
                chosen.check(site.filled(value=self._anything(msg)), particles)
            needs_plan = not chosen.alternatives(site).own_law or not (chosen.value.moves or named or particles > 1)
            if needs_plan and not self._follow.control and not self._pinned:
                raise _Unplanned
        self._used[name] = chosen
        return chosen

    def _anything(self, msg: Message) -> Array:
        """A value of the site's, drawn without a trace."""
        generators = self.memory.generators
        now = generators.state()
        with torch.no_grad():
            value = msg["fn"].sample()
        generators.restore(now)
        return value

    def requested(self, msg: Message) -> Estimator | None:
        """The site's own request: ``infer={"estimator": ...}``, or Pyro's ``infer={"baseline": {...}}``."""
        asked = requested(msg["name"], msg["infer"])
        baseline = msg["infer"].get("baseline")
        return from_baseline(baseline) if asked is None and baseline else asked

    def view(self, plan: Plan, msg: Message, wide: Plate | None = None) -> Site:
        facts = plan.sites.get(msg["name"])
        fn = msg["fn"]
        if facts is None or wide is not None:
            site = view(msg)
            return site if site.named else site.filled(named=named(fn))
        logits = natural_parameters(fn, facts.family)
        arrays = {
            "scale": msg["scale"],
            "logits": logits,
            "named": named(fn) if logits is None else {"logits": logits},
            "law": Law(fn),
            "value": msg["value"],
            "declared": msg["infer"].get("_with_estimators"),
        }
        if facts.batch_shape != fn.batch_shape:  # another batch size
            coupled, plates = {p.name for p in facts.coupled}, plates_of(msg)
            arrays["plates"] = frozenset(p for p in plates if p.name not in coupled)
            arrays["coupled"] = plates - arrays["plates"]
            arrays["batch_shape"] = tuple(fn.batch_shape)
        return facts.filled(**arrays)

    def own(self, msg: Message) -> Array:
        return self.randomness.value(msg["name"], msg["fn"], *msg["args"], **msg["kwargs"])

    def value(self, source: Stream, msg: Message, number: int) -> Array:
        return self.own(msg)

    def again(self, msg: Message, first: Message, *, constants: bool) -> Array:
        return first["value"].detach() if constants else first["value"]

    def noise(self, source: Stream, msg: Message, site: Site, label: str, noise: Noise, number: int) -> Array:
        return self.randomness.noise(site.name, label, noise, _of(site))

    def state(self, site: Site, estimator: Estimator, label: str) -> Array:
        present = read_state(site.name, label, estimator.keeps(site, {}).state[label], _of(site))
        return present.detach().clone()  # the step ends by writing the new one in its place

    def keep(self, site: Site, estimator: Estimator, given: Values, like: Array) -> Kept:
        if self.vectorized:
            site = self.axis.led(site)
        declared = estimator.keeps(site, given)
        if not declared:
            return Kept(given=given) if given else _NOTHING_KEPT
        if site.declared is None:
            self._check_trained(site, estimator, declared)
        keeper = self.keeper if site.declared is None else site.declared.keeper
        like = like if like.is_floating_point() else self._like()
        return keeper.declare(site, declared, given, like.detach())

    def _check_trained(self, site: Site, estimator: Estimator, declared: Keeps) -> None:
        trains = declared.parameters or declared.networks
        if trains and self.standalone and not any(isinstance(m, TraceMessenger) for m in _stack()):
            raise site_error(
                site.name,
                f"{estimator!r} has parameters to train, and outside SVI only the guide can hand them to an optimiser",
                f'Wrap the guide: guide = with_estimators(guide, {{"{site.name}": {estimator!r}}}).',
            )

    def unlike(self, ours: Message, theirs: Message) -> bool | Array:
        one_side = (ours["mask"] is None) != (theirs["mask"] is None)
        return one_side or unlike(*((m["fn"], m["scale"], m["mask"]) for m in (ours, theirs)))

    def divergence(self, ours: Message, theirs: Message) -> Array:
        found = divergence(ours["fn"], theirs["fn"])
        return scale_and_mask(scale_and_mask(found, ours["scale"], ours["mask"]), 1.0, theirs["mask"])

    def past(self, declared: Keeps) -> Values:
        return {k: read_state(NAME, k, v, self._like()).detach().clone() for k, v in declared.state.items()}

    def log_q(self, msg: Message, value: Array) -> Array:
        return msg["log_q"] if value is msg["value"] and "log_q" in msg else log_q(msg["fn"], value)

    def score_norm(self, site: Site, msg: Message, value: Array) -> Array:
        return score_norm(site, msg["fn"], value)

    def arrays(self, site: Site) -> dict[str, Any]:
        return site.arrays(OPS, site.scale)

    def zero(self, site: Site | None = None) -> Array:
        return self._like().new_zeros(site.plate_shape if site is not None else ())

    def _like(self) -> Array:
        return torch.zeros(()) if self._term is None else self._term

    def differentiating(self, yes: bool) -> AbstractContextManager[Any]:
        return nullcontext() if yes else torch.no_grad()

    # ---- many evaluations ---------------------------------------------------------------------------------------

    def each(
        self, evaluate: Callable[..., Any], values: Callable[[Any], Values], group: Group, run: Run,
        differentiable: bool,
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:  # fmt: skip
        shapes = {(t.side, t.site): t.value.shape for t in run.terms}
        chunk = self.settings.max_parallel if self.side_by_side else 1
        found: list[dict[str, Array]] = []
        rows: list[dict[averaging.Key, Array]] = []
        for start in range(0, group.alternatives, chunk):
            indices = range(start, min(start + chunk, group.alternatives))
            with torch.no_grad():
                several = [values(i) for i in indices]
            with self.differentiating(differentiable):
                together = self._together(evaluate, several, group, run) if len(several) > 1 else None
                costs, terms = self._one_by_one(evaluate, several, group, run) if together is None else together
            found.append(costs)
            rows.append({k: x.reshape(-1, *shapes[k]) for k, x in terms.items()})
        return (
            {n: torch.cat([costs[n] for costs in found]) for n in group.sites},
            {k: torch.cat([row[k] for row in rows]) for k in rows[0]},
        )

    def _together(
        self, evaluate: Callable[..., Any], values: Sequence[Values], group: Group, run: Run
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]] | None:
        """The same in one run; None if the program does not broadcast, which is asked once for each structure."""
        memory, program = self.memory, self.program
        if program in memory.narrow:
            return None
        depth = 1 + int(self.max_plate_nesting)
        if program not in memory.enumerating:
            records = (run.traces.guide, run.traces.model)
            depth = max(depth, 1 + max(len(m["fn"].batch_shape) for r in records for m in r.values()))
        sharing = SideBySide(len(values), depth, memory.generators)
        try:
            found = self._side_by_side(evaluate, values, group, run, sharing)
        except Exception:  # raised again one by one, if that is not the reason
            found = None
        key = (*self._structure(run.plan), group.sites, len(values), frozenset(sharing.unclear))
        if found is not None and (not self.verify or key in memory.broadcasts):
            return found
        memory.broadcasts.store(key, True)
        costs, terms = self._one_by_one(evaluate, values, group, run)
        if found is None or not all(equal(OPS, found[0][n], costs[n]) for n in group.sites):
            names = ", ".join(f"'{n}'" for n in group.sites)
            warn(
                f"site {names}: {len(values)} other values side by side, as vectorize_particles=True allows, give "
                "other costs than one after another: guide or model does not broadcast to an axis left of all others. "
                "They run one after another from now on: right, and slower. Count axes from the right (z[..., 0], "
                "z.sum(-1)), or pass vectorize_particles=False.",
            )
            memory.narrow.add(program)
        return costs, terms

    def _one_by_one(
        self, evaluate: Callable[..., Any], values: Sequence[Values], group: Group, run: Run
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:
        """The same one after another. A guide of which nothing is below the group is not run again: what it gives the
        model is known. Whether that is so in truth is asked of each site once it takes another value."""
        memory, held, plan, members = self.memory, run.source.buffers, run.plan, frozenset(group.sites)
        held.settle()
        stands = not (held.buffers or held.rest or self._follow.carried or self.observes)
        stands &= not (plan.below(group) or plan.branches or torch.is_grad_enabled())
        stands &= not any(t.side == "guide" and t.site not in members and t.depends_on & members for t in plan.terms)
        if stands:
            key, drawn = (*self._structure(plan), group.sites), run.traces.guide
            known = memory.standing.recall(key) or dict.fromkeys(members)  # None: not asked yet
            new = [n for n in members if known[n] is None and not torch.equal(values[0][n], drawn[n]["value"])]
            if new and False not in known.values():
                try:
                    self._stands = True
                    costs, _ = evaluate(values[0])
                    self._stands = False
                    again, _ = evaluate(values[0])
                    same = all(equal(OPS, costs[n], again[n]) for n in members)
                except Exception:
                    same = False
                memory.standing.store(key, known := {**known, **dict.fromkeys(new, same)})
            stands = all(known.values())
        try:
            self._stands = stands
            costs, terms = zip(*map(evaluate, values), strict=True)
        finally:
            self._stands = False
        return _stacked(costs), _stacked(terms)

    def _side_by_side(
        self, evaluate: Callable[..., Any], values: Sequence[Values], group: Group, run: Run, sharing: SideBySide
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:
        """Several counterfactual values in one run, as a plate to the left of all others."""
        members = [run.sites[n] for n in group.sites]
        count, depth = sharing.count, sharing.depth
        plate = Plate(_ALTERNATIVES, -depth, count)
        stacked, wide, places = {}, [], {}
        for s in members:
            own = len(s.batch_shape)
            pad, place = max(0, depth - 1 - own), max(0, own - (depth - 1))  # left of it are enumerated values
            places[s.name] = place
            x = torch.stack([v[s.name] for v in values])
            stacked[s.name] = x.reshape(count, *(1,) * pad, *x.shape[1:]).movedim(0, place)
            shape = (*s.batch_shape[:place], count, *(1,) * pad, *s.batch_shape[place:])
            wide.append(replace(s, plates=_beside(s.plates, plate), batch_shape=shape))
        graph = run.plan.graph
        plates = {n: _beside(p, plate) for n, p in graph.plates.items()}
        enumerated = {n: replace(t, plates=_beside(t.plates, plate)) for n, t in graph.enumerated.items()}
        graph = Graph(graph.ancestors, plates, enumerated=enumerated)
        with sharing:
            costs, terms = evaluate(stacked, wide, graph, plate)
        return {
            s.name: costs[s.name].expand(w.plate_shape).movedim(places[s.name], 0).reshape(count, *s.plate_shape)
            for s, w in zip(members, wide, strict=True)
        }, {k: x.movedim(-depth, 0) if x.ndim > depth else x for k, x in terms.items()}

    def slopes(
        self, total: Callable[[Values], tuple[Array, Values]], values: Values
    ) -> tuple[Mapping[str, Array], Values]:
        values = {n: v if v.requires_grad else v.clone().requires_grad_() for n, v in values.items()}
        height, costs = total(values)
        if not height.requires_grad:
            return {n: torch.zeros_like(v) for n, v in values.items()}, costs
        found = torch.autograd.grad(height, list(values.values()), create_graph=True, allow_unused=True)
        slopes = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(values.items(), found, strict=True)}
        return slopes, costs

    def particles(self, one: Callable[[Any], tuple[dict[str, Any], Run]], count: int | None = None) -> Joined:
        """``one(source)`` for every particle, of which there are ``count`` or as many as the plan wants."""
        found = [self._first(one)]
        self._pinned = True
        try:
            while not self.vectorized and len(found) < (self.plan().particles if count is None else count):
                shadow = len(found) >= self.settings.particles  # no particle of the user's: leaves no trace
                held = self.memory.buffers.held() if shadow else Held()
                with Buffers.lent(held):
                    found.append(self._further(one))
        except Unplaced:  # in a branch that no particle took before: all of them once more
            self._place()
            self._rewind(found[0][1].source)
            return self.particles(one, count)
        arrays, runs = zip(*found, strict=True)
        total = self.settings.particles if self.vectorized else len(found)
        sites: dict[str, Site] = {}
        estimators, kept, joined = {}, {}, {}
        for name in dict.fromkeys(n for a in arrays for n in a["sites"]):
            here = [(a["sites"][name], r) for a, r in found if name in a["sites"]]
            run = here[0][1]
            sites[name] = self.axis.facts(run.sites[name])
            estimators[name], kept[name] = run.plan.estimators[name], run.kept[name]
            joined[name] = self.axis.of_site(run.sites[name], [a for a, _ in here])
        labels = ("objective", "held", "dreamt")
        collected = {label: self.axis.collected([a.get(label) for a in arrays], total) for label in labels}
        both = {label: self.axis.joined([a.get(label, {}) for a in arrays]) for label in ("averages", "posterior")}
        return Joined({**collected, **both, "sites": joined, "runs": runs}, sites, estimators, kept, total)

    def _first(self, one: Callable[[Any], tuple[dict[str, Any], Run]]) -> tuple[dict[str, Any], Run]:
        """The first particle, drawn once the structure of the program is known as far as its choices need."""
        expected = self._plan
        result = self._attempt(one)
        if result is None and self._follow is None:  # a structure that was not met before
            self._credits = True
            result = self._attempt(one)
        if result is None and self._plan is expected:
            self._survey()
            if self._plan is None:  # a tensor turned up that nobody knew: see `Provenance.stale`
                self._survey()
        self._pinned = True
        while result is None:  # once more, and again if a dependency was found to be lost
            result = self._attempt(one)
        return result

    def _further(self, one: Callable[[Any], tuple[dict[str, Any], Run]]) -> tuple[dict[str, Any], Run]:
        """Another particle."""
        again = self._plan is not None and self._plan.reruns
        source = Stream(self.memory.generators, self.memory.buffers.held(runs_again=again))
        while True:
            self._used = {}
            try:
                return one(source)
            except _Unplanned:  # a structure that was not met before, if the run was not followed or a dependency lost
                self._credits = True
                self._rewind(source)

    def _rewind(self, source: Stream) -> None:
        """To before the first run of a particle."""
        self.memory.generators.restore(source.start)
        Buffers.restore(source.buffers)

    def check(self, run: Run) -> None:
        """Is the program what its first run says of it? Asked once for each structure, before any other run of it, see
        `core.verify`. If a dependency was lost, everything counts as depending on all that was drawn before it from
        now on, and the particle is drawn anew."""
        if (self._new or self._threads.started) and not self._verified(run):
            raise _Unplanned
        if self.memory.undifferentiated and torch.is_grad_enabled():
            left = [sites for sites in self.memory.undifferentiated if sites is not run.plan.sites]
            if len(left) < len(self.memory.undifferentiated):
                self.memory.undifferentiated = left
                warn_of_cuts(self.settings, run.plan, self.cut(run))

    def _verified(self, run: Run) -> bool:
        self._new = False
        plan = run.plan
        for name in plan.analytic:
            if self.unlike(run.traces.guide[name], run.traces.model[name]):
                raise weighed_apart(name)
        structure: Any = (*self._structure(plan), self._threads.started)
        known: Any = self.memory.verified
        program = structure[0]
        if not self.verify or structure in known or len(known) == known.size:
            return True
        others = sum(s[0] == program for s in known)
        known.store(structure, True)
        again = run_again(self, plan)
        if not again and reachable(self.model, self.guide, self.args, self.kwargs, kinds=Iterator):
            return True  # to ask it would take from it
        if again or not all(deps.issuperset(plan.local) for deps in plan.depends_on.values()):
            found = look(self, run, BUDGET if others < _STRUCTURES else _FEW)
            if found.changing and again:
                raise not_the_same(self, plan, [n for _, n in found.changing], again) from found.cause
        else:
            found = Found([])
        if found.lost is None:
            if not found.changing and others < _STRUCTURES:
                warn_of_coupling(coupled_by_values(self, run))
                if plan.differentiated:
                    self.memory.undifferentiated.append(plan.sites)
            return True
        term, site = found.lost
        warn(
            f"site '{site}': {cost_of(term)} moves with its value, by a way that cannot be followed (code that torch "
            "does not see). From now on every cost of this program counts for all sites that were drawn before it: "
            "right, and noisier.",
        )
        self.memory.distrusted.add(program)
        return False

    def moved(self, run: Run, sites: Sequence[str], pattern: int | Along) -> dict[tuple[str, str], Array]:
        with torch.no_grad():
            return self._elsewhere(run, sites, pattern, run.plan.soft)

    def _elsewhere(
        self, run: Run, others: Sequence[str], pattern: int | Along, relaxed: frozenset[str],
        leaves: dict[str, Array] | None = None,
    ) -> dict[Key, Array]:  # fmt: skip
        """The cost terms where some sites take other values. ``leaves``: sites whose values there a derivative is to
        lead to; it is filled with these."""
        latents = run.traces.latents()

        def draw(msg: Message) -> Array:
            name = msg["name"]
            if name not in latents:
                return msg["fn"].sample()
            value = latents[name]["value"].detach()
            if name in others:
                value = another(msg["fn"], value, pattern)
            if leaves is not None and name in leaves:
                value = leaves[name] = value.clone().requires_grad_()
            return value

        terms = terms_of(self.run(draw, run.source), run.plan.depends_on, relaxed)
        return {(t.side, t.site): t.value for t in terms}

    def _above_points(self, run: Run) -> dict[str, frozenset[str]]:
        """Sites above those point masses whose gradient is wanted, which move with these."""
        latents, ancestors = run.traces.latents(), run.plan.graph.ancestors
        points = {n for n in run.plan.differentiated if is_point(latents[n]["fn"])}
        return {n: ancestors[n] - points for n in points}

    def leading(self, run: Run) -> list[str]:
        latents, above, moves = run.traces.latents(), self._above_points(run), run.plan.estimators
        led_here = {
            n: latents[n]["value"] if moves[n].value.moves else run.sites[n].logits for n in run.plan.differentiated
        }
        return [n for n, x in led_here.items() if x.requires_grad and above.get(n, True)]

    def tilted(self, run: Run, sites: Sequence[str], step: float, number: int) -> dict[Key, Height]:
        plan, latents = run.plan, run.traces.latents()
        along = torch.tensor(step, dtype=torch.double, requires_grad=True)
        values = {n: m["value"].detach() for n, m in latents.items()}
        values |= {n: line(run.traces.model.get(n, latents[n])["fn"], values[n], number)(along) for n in sites}
        soft = plan.soft | frozenset(n for n in sites if plan.relaxable(n))

        def draw(msg: Message) -> Array:
            return values[msg["name"]] if msg["name"] in values else msg["fn"].sample()

        found = {}
        for t in terms_of(self.run(draw, run.source), plan.depends_on, soft):
            total, slope = t.value.sum(), None
            if total.requires_grad and not step:
                (slope,) = torch.autograd.grad(total, along, retain_graph=True, allow_unused=True)
            size, precision = t.value.detach().abs().sum().item(), torch.finfo(t.value.dtype).eps
            found[t.side, t.site] = Height(total.item(), 0.0 if slope is None else slope.item(), size, precision)
        return found

    def cut(self, run: Run) -> dict[str, Key]:
        plan, latents, above, sites = run.plan, run.traces.latents(), self._above_points(run), self.leading(run)
        terms = {(t.side, t.site): t.value for t in run.terms}
        leads = led(terms, {n: latents[n]["value"] for n in sites if plan.estimators[n].value.moves})
        if all(leads[k].issuperset(plan.depends_on[k].intersection(sites)) for k in terms):
            return {}
        soft = plan.soft | frozenset(n for n in sites if plan.relaxable(n))

        def evaluated(
            others: Sequence[str] = (), pattern: int = 0
        ) -> tuple[dict[Key, Array], dict[Any, frozenset[str]]]:
            """The terms where some sites take other values, and to which sites' values a derivative leads there."""
            leaves = {n: latents[n]["value"] for n in sites}
            found = self._elsewhere(run, others, pattern, soft, leaves)
            return {k: x.detach() for k, x in found.items()}, led(found, leaves)

        def moved(group: Sequence[str], pattern: int) -> Mapping[Key, Array]:
            found, leads = evaluated([*group, *(m for n in group for m in above.get(n, ()))], pattern)
            # on that side of a kink that Python decides about, min(z, 1) say, there may be a derivative
            return {k: x for k, x in found.items() if leads[k].isdisjoint(group)}

        def same(a: Array, b: Array) -> bool:  # beyond a support no derivative is missed
            return equal(OPS, a, b) or not bool(torch.isfinite(b).all())

        terms = {k: x.detach() for k, x in terms.items()}
        found, leads = evaluated()
        if not all(k in found and equal(OPS, x, found[k]) for k, x in terms.items()):
            return {}
        for n in above:  # what a point costs is a function of what it is made of
            leads["guide", n] = leads.get(("guide", n), frozenset()) | {n}
        return cut(moved, terms, leads, plan, sites, same)

    def _structure(self, plan: Plan) -> tuple[Hashable, ...]:
        sites = tuple((n, s.kind) for n, s in plan.sites.items())
        given = (*self.args, *self.kwargs.items())
        flags = tuple(x for x in given if x is None or isinstance(x, (bool, str)))
        return self.program, sites, tuple(plan.depends_on.items()), flags


def _of(site: Site) -> Array:
    """A parameter of a site's, for its device and type."""
    if site.logits is not None:
        return site.logits
    return next(iter(site.named.values())) if site.named else torch.empty(())


def _stacked(rows: Sequence[Mapping[Any, Array]]) -> dict[Any, Array]:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def _along(plate: Plate) -> Any:
    return pyro.plate(plate.name, plate.size, dim=plate.dim)


def _nothing_known(settings: Settings) -> Plan:
    return Plan({}, {}, (), Graph({}, {}), (), settings.particles)


def _beside(plates: frozenset[Plate], alternatives: Plate) -> frozenset[Plate]:
    """With a plate of alternatives, which lies right of enumerated values."""
    return frozenset(moved(p, -1) if p.values else p for p in plates) | {alternatives}


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def _stack() -> list[Any]:
    from pyro.poutine.runtime import _PYRO_STACK

    return _PYRO_STACK
