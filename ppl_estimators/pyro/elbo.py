"""`EstimatorELBO`: the drop-in loss for `pyro.infer.SVI`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled, torch_backward
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match, check_site_shape
from torch.utils._pytree import tree_map

from ..core import averaging, families, relaxation
from ..core.assembly import Evaluated, assemble
from ..core.averaging import Average
from ..core.credit import Graph, downstream_costs
from ..core.errors import EstimatorError, EstimatorWarning, site_error
from ..core.estimator import Estimator, Noise
from ..core.keep import Kept
from ..core.objectives import EvidenceLowerBound, Objective
from ..core.plan import Group, Plan, check_keys, check_mapping, make_plan, match, requested
from ..core.site import Costs, Draw, Plate, Site, Term
from ..estimators.baselines.learned import Given, Learned
from ..estimators.baselines.leave_one_out import LeaveOneOut
from ..estimators.baselines.moving_average import MovingAverage
from ..estimators.baselines.optimal_constant import OptimalConstant
from ..estimators.control_variate import ControlVariate
from ..estimators.pathwise import Pathwise
from ..estimators.reinforce import Reinforce
from .dependencies import Provenance, StopParameters
from .distributions import Law, log_q, named, natural_parameters, reparameterised, score_norm
from .keep import Keeper, read_state, update_state
from .ops import OPS
from .run import Message, Traces, dependencies, enumerated, execute, plates_of, terms_of, view

Array = torch.Tensor
_PARTICLES = "num_particles_vectorized"
_ALTERNATIVES = "_counterfactual_values"


class EstimatorELBO(ELBO):
    """An ELBO that chooses a gradient estimator per sample site. Swap it for `Trace_ELBO`, nothing else changes.

    ``estimators``: ``{site name or glob pattern: estimator}``, or one estimator for every site. It overrides the
    guide hook `with_estimators`, which overrides ``infer={"estimator": ...}`` at the site (and Pyro's
    ``infer={"baseline": {...}}``), which overrides ``default``.

    ``num_particles``, ``vectorize_particles``, ``max_plate_nesting``, ``retain_graph`` and the rest: as in
    `pyro.infer.ELBO`. All particles see one minibatch.

    ``default``: "auto", or the estimator of every site that nothing else names. "auto" is: reparameterisable sites
    Pathwise(); with several particles Reinforce(LeaveOneOut()); with one, DisARM() for Bernoulli sites and
    Enumerate() for small supports while two extra evaluations per step suffice; else Reinforce().

    ``objective``: None for the ELBO, or ImportanceWeighted(), Renyi(alpha).

    ``max_parallel``: how many counterfactual evaluations run side by side where ``vectorize_particles=True`` says
    that model and guide can be vectorised; otherwise they run one after another.

    ``average_model``: also average the gradient of the model's own parameters, and of pathwise sites, over the values
    that the estimators evaluate (pairs of DisARM, sets of UnorderedSet, ...), each by its weight. It costs a backward
    pass through every evaluation, and holds their activations.

    Raises `EstimatorError` (site, fact, reason, fix) for a choice that cannot work.

    >>> from ppl_estimators import DisARM
    >>> EstimatorELBO({"z": DisARM()}, num_particles=4).num_particles
    4
    """

    def __init__(
        self,
        estimators: Mapping[str, Estimator] | Estimator | None = None,
        *,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        default: str | Estimator = "auto",
        objective: Objective | None = None,
        max_parallel: int = 16,
        average_model: bool = False,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles, **kwargs)
        self.estimators = check_mapping(estimators, "EstimatorELBO")
        if default != "auto" and not isinstance(default, Estimator):
            raise TypeError(f'EstimatorELBO(default=...) takes "auto" or an estimator, got {default!r}.')
        if max_parallel < 1:
            raise ValueError(f"EstimatorELBO(max_parallel=...) needs 1 or more, got {max_parallel!r}.")
        self.default = default
        self.objective = EvidenceLowerBound() if objective is None else objective
        self.max_parallel = max_parallel
        self.average_model = average_model
        self.keeper = Keeper()
        self._plans: dict[Any, _TorchPlan] = {}
        self._chosen: dict[Any, Estimator] = {}
        self._plan: _TorchPlan | None = None
        self._validated: set[int] = set()
        self._seen: set[str] = set()

    def __repr__(self) -> str:
        return f"EstimatorELBO({self.estimators!r}, num_particles={self.num_particles})"

    # ---- Pyro's interface ---------------------------------------------------------------------------------------

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO of fresh particles, as a float. Changes no state."""
        with torch.no_grad():
            step = _Step(self, model, guide, args, kwargs)
            return float(step.value())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Array:
        """−ELBO as a tensor whose gradient is the estimate."""
        return self._differentiable(model, guide, args, kwargs, standalone=True)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a float; adds the gradient estimate to the parameters' ``.grad``."""
        loss = self._differentiable(model, guide, args, kwargs, standalone=False)
        torch_backward(loss, retain_graph=self.retain_graph)
        return loss.item()

    def _differentiable(self, model: Any, guide: Any, args: Any, kwargs: Any, *, standalone: bool) -> Array:
        with torch.enable_grad():
            return _Step(self, model, guide, args, kwargs, standalone).loss()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """One trace of the model and one of the guide, values drawn by the chosen estimators."""
        (run,) = _Step(self, model, guide, args, kwargs).run(1)
        return _trace(run.traces.model), _trace(run.traces.guide)

    # ---- where randomness enters; tests override these two -------------------------------------------------------

    def _sample(self, name: str, fn: Any, *args: Any, **kwargs: Any) -> Array:
        """A draw from a site's own distribution: `rsample` where there is one."""
        return fn(*args, **kwargs)

    def _noise(self, name: str, label: str, noise: Noise, like: Array) -> Array:
        """Noise that an estimator asked for; uniform noise lies strictly inside (0, 1)."""
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        if noise.law == "normal":
            return torch.randn(noise.shape, dtype=dtype, device=like.device)
        if noise.law == "poisson":
            return torch.poisson(noise.concentration.detach())
        info = torch.finfo(dtype)
        u = torch.rand(noise.shape, dtype=dtype, device=like.device).clamp(info.tiny, 1 - info.eps / 2)
        if noise.law == "log gamma":  # g u^(1/a) has shape a if g has shape a + 1; in logarithms nothing underflows
            a = noise.concentration.detach()
            return torch._standard_gamma(a + 1).log() + u.log() / a
        return u


@dataclass
class _Run:
    """One run of guide and model: a particle, or all of them as a plate."""

    traces: Traces
    draws: dict[str, Draw]
    noise: dict[str, dict[str, Array]]
    rng: dict[str, int]  # seeds of the sites that counterfactual evaluations draw again
    soft: set[str] = field(default_factory=set)  # discrete sites whose value carries a gradient
    hard: set[str] = field(default_factory=set)  # sites whose -log q is differentiated in the value only
    terms: list[Term] = field(default_factory=list)
    depends_on: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    plan: _TorchPlan | None = None
    costs: dict[str, Array] = field(default_factory=dict)
    given: dict[str, dict[str, Array]] = field(default_factory=dict)
    alternatives: dict[str, Array] = field(default_factory=dict)
    averages: list[Average] = field(default_factory=list)
    relaxed: dict[str, Array] = field(default_factory=dict)
    slope: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class _TorchPlan:
    """The shared plan, and what only this adapter needs."""

    shared: Plan
    depends_on: Mapping[tuple[str, str], frozenset[str]]
    static: Mapping[str, tuple[Any, ...]]  # what `sites` were described from

    estimators = property(lambda self: self.shared.estimators)
    sites = property(lambda self: self.shared.sites)
    graph = property(lambda self: self.shared.graph)
    groups = property(lambda self: self.shared.groups)
    local = property(lambda self: self.shared.local)
    relaxable = property(lambda self: self.shared.relaxable)

    def view(self, msg: Message, static: tuple[Any, ...] | None = None) -> Site:
        """The site of a message in this plan's plates, with the arrays of this run."""
        fn = msg["fn"]
        if (static or _static(msg)) != self.static.get(msg["name"]):  # a plan for another structure
            return view(msg)
        facts = self.sites[msg["name"]]
        logits = natural_parameters(fn, facts.family)
        named = {} if logits is None else {"logits": logits}
        return facts.filled(scale=msg["scale"], logits=logits, named=named, law=Law(fn), value=msg["value"])

    @cached_property
    def redrawn(self) -> frozenset[str]:
        """Sites that some counterfactual evaluation draws again."""
        return self.graph.descendants(frozenset(n for g in self.groups for n in g.sites))


class _Step:
    """One evaluation of the loss."""

    def __init__(self, elbo: EstimatorELBO, model: Any, guide: Any, args: Any, kwargs: Any, standalone: bool = False):
        self.elbo, self.model, self.guide, self.args, self.kwargs = elbo, model, guide, args, kwargs
        self.standalone = standalone
        messenger = isinstance(getattr(guide, "guide", guide), GuideMessenger)
        self.execute = partial(execute, observes=messenger)
        self.subsamples: dict[str, Array] = {}
        self.vectorized = elbo.vectorize_particles and elbo.num_particles > 1
        if elbo.vectorize_particles and elbo.max_plate_nesting == math.inf:
            elbo._guess_max_plate_nesting(model, guide, args, kwargs)
        if self.vectorized:
            self.model = elbo._vectorized_num_particles(model)
            self.guide = elbo._vectorized_num_particles(guide)

    # ---- value only -----------------------------------------------------------------------------------------------

    def value(self) -> Array:
        collected = []
        for run in self.run(0):
            collected.append(self._collect(run.terms))
        objective = self.elbo.objective
        value, _ = objective.combine(OPS, self._stack(collected), objective.scale(run.terms))
        return -value

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def loss(self) -> Array:
        runs = self.run(2)
        kept = self._kept(runs)
        for run in runs:
            for group in run.plan.groups:
                if group.alternatives:
                    run.alternatives |= self._alternatives(run, group)
                else:
                    self._relaxations(run, group, kept)
        return self._assemble(runs, kept)

    def run(self, detail: int) -> list[_Run]:
        """All particles. ``detail`` 0: values only; 1: with a plan; 2: with downstream costs."""
        elbo = self.elbo
        count = 1 if self.vectorized else elbo.num_particles
        if elbo._plan is None:
            self._survey()
        return [self._particle(detail) for _ in range(count)]

    def _survey(self) -> None:
        """Look at the structure of the program before drawing with the right estimators; leaves the random state."""

        def draw(msg: Message) -> Array:
            return msg["fn"](*msg["args"], **msg["kwargs"])

        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # what is differentiable is part of the structure
            provenance = Provenance()
            with provenance:
                traces = self.execute(
                    self.model, self.guide, self.args, self.kwargs,
                    draw=draw, subsamples=dict(self.subsamples), provenance=provenance,
                )  # fmt: skip
            self.elbo._plan = self._planned(traces, provenance)

    def _plain(self, msg: Message) -> Array:
        return self.elbo._sample(msg["name"], msg["fn"], *msg["args"], **msg["kwargs"])

    def _planned(self, traces: Traces, provenance: Provenance) -> _TorchPlan:
        """The plan for this structure, made once."""
        elbo = self.elbo
        latents = traces.latents()
        behind = dependencies(traces)
        static = {n: _static(m) for n, m in latents.items()}
        signature = (
            tuple(static.items()),
            tuple((k, d, plates_of(getattr(traces, k[0])[k[1]])) for k, d in behind.items()),
            bool(provenance.control),
        )
        plan = elbo._plans.get(signature)
        if plan is None:
            depends_on = {k: provenance.names(d) for k, d in behind.items()}
            for n, m in latents.items():
                if m["infer"].get("enumerate"):
                    raise enumerated(n)
            sites = [replace(view(m), requested=_requested(m["infer"])) for m in latents.values()]
            elbo._seen |= latents.keys()
            check_keys(elbo.estimators, [*latents, *(elbo._seen - latents.keys())], "EstimatorELBO")
            terms = [Term(side, n, None, plates_of(getattr(traces, side)[n]), d) for (side, n), d in depends_on.items()]
            graph = Graph({n: depends_on["guide", n] - {n} for n in latents}, {s.name: s.plates for s in sites})
            chosen = {n: elbo._chosen[n, static[n]] for n in latents if (n, static[n]) in elbo._chosen}
            shared = make_plan(
                sites,
                terms,
                graph,
                mapping={**elbo.estimators, **chosen},
                default=elbo.default,
                particles=elbo.num_particles,
                objective=elbo.objective,
                branches=bool(provenance.control),
            )
            if elbo.average_model:
                averaging.check(shared, bool(provenance.control))
            for n, estimator in shared.estimators.items():
                elbo._chosen.setdefault((n, static[n]), estimator)
            self._check_program(traces)
            # arrays of this run are not wanted: only facts
            none = {"value": None, "scale": 1.0, "logits": None, "named": {}, "law": None}
            facts = {n: replace(s, **none) for n, s in shared.sites.items()}
            plan = elbo._plans[signature] = _TorchPlan(replace(shared, sites=facts), depends_on, static)
        elbo._plan = plan
        return plan

    def _check_program(self, traces: Traces) -> None:
        if is_validation_enabled():
            check_model_guide_match(_trace(traces.model), _trace(traces.guide), self.elbo.max_plate_nesting)

    # ---- one particle -------------------------------------------------------------------------------------------

    def _particle(self, detail: int) -> _Run:
        elbo, plan = self.elbo, self.elbo._plan
        run = _Run(Traces(), {}, {}, {})
        provenance = Provenance() if detail else None
        draw = partial(self._draw, plan, run)
        with provenance or nullcontext():
            run.traces = self.execute(
                self.model, self.guide, self.args, self.kwargs,
                draw=draw, subsamples=self.subsamples, provenance=provenance,
            )  # fmt: skip
        latents = run.traces.latents()
        if not detail:
            keys = [("model", n) for n in run.traces.model] + [("guide", n) for n in run.traces.guide]
            run.terms = terms_of(run.traces, dict.fromkeys(keys, frozenset()), frozenset(run.soft))
            return run
        run.plan = self._planned(run.traces, provenance)
        run.depends_on = run.plan.depends_on
        if run.plan is not plan:  # another structure; no run is ever thrown away, that would select what is drawn
            run.sites = {n: run.plan.view(latents[n]) for n in run.plan.local}
        plan = run.plan
        local = frozenset(n for n in plan.local if not plan.estimators[n].pathwise)
        score_only = frozenset() if elbo.objective.keeps_score else local
        run.terms = terms_of(
            run.traces, run.depends_on, frozenset(run.soft), score_only, local=local, hard=frozenset(run.hard)
        )
        if is_validation_enabled() and id(plan) not in elbo._validated:
            elbo._validated.add(id(plan))  # a plan fixes every shape
            for record in (run.traces.model, run.traces.guide):
                for msg in record.values():
                    check_site_shape(msg, elbo.max_plate_nesting)
        if detail < 2:
            return run
        for n in plan.local:
            site, msg = run.sites[n], latents[n]
            site.value = msg["value"]
            self._measure(plan.estimators[n], site, msg, run)
        with torch.no_grad():
            costs = downstream_costs(OPS, plan.graph, run.terms, list(run.sites.values()))
        run.costs = {n: _or_zero(c, run.sites[n], run.terms) for n, c in costs.items()}
        return run

    def _draw(self, plan: _TorchPlan, run: _Run, msg: Message) -> Array:
        if msg["name"] not in plan.redrawn:
            return self._draw_now(plan, run, msg)
        run.rng[msg["name"]] = seed = int(torch.randint(2**62, ()))
        return _seeded(seed, partial(self._draw_now, plan, run, msg))

    def _draw_now(self, plan: _TorchPlan, run: _Run, msg: Message) -> Array:
        name, static = msg["name"], _static(msg)
        estimator = self._choose(msg, static)
        if estimator.library_draw:
            return self._plain(msg)
        site = plan.view(msg, static)
        draw, run.noise[name] = self._drawn(msg, site, estimator, {})
        if estimator.local_part:
            run.sites[name] = site
            run.draws[name] = _held(draw) if estimator.pathwise else draw
        if estimator.pathwise and site.family in families.RELAXABLE:
            run.soft.add(name)
        if estimator.hard:
            run.hard.add(name)
        return draw.value

    def _drawn(
        self, msg: Message, site: Site, estimator: Estimator, before: Mapping[str, Array]
    ) -> tuple[Draw, dict[str, Array]]:
        """What an estimator draws at a site, and from which noise: that of ``before``, but for what the site's own
        parameters shape."""
        if estimator.families is not None and not site.named:
            site.named = named(msg["fn"])
        like = site.logits if site.logits is not None else next(iter(site.named.values()), torch.empty(()))
        declared = estimator.noise(site)
        with torch.no_grad():  # values first, so that a seeded stream gives the same when only they are drawn again
            noise = {label: self._plain(msg) for label, n in declared.items() if n.law == "value"}
        for label, n in declared.items():
            if n.law == "value":
                continue
            if n.law == "state":
                present = read_state(site.name, label, estimator.state(site)[label], like)
                noise[label] = present.detach().clone()  # the step ends by writing the new one in its place
            elif label in before and n.concentration is None:
                noise[label] = before[label]
            else:
                noise[label] = self.elbo._noise(site.name, label, n, like)
        with nullcontext() if estimator.pathwise else torch.no_grad():
            return estimator.draw(OPS, site, noise), noise

    def _choose(self, msg: Message, static: tuple[Any, ...]) -> Estimator:
        """The estimator of a site; once chosen it stays, whatever the structure around the site. A site that the plan
        does not know (a branch not taken before) gets what needs no plan."""
        elbo, name = self.elbo, msg["name"]
        chosen = elbo._chosen.get((name, static))
        if chosen is None:
            key = match(elbo.estimators, name)
            chosen = elbo.estimators[key] if key is not None else _requested(msg["infer"])
            if chosen is None and isinstance(elbo.default, Estimator):
                chosen = elbo.default
            if chosen is None:
                several = elbo.num_particles > 1
                chosen = Pathwise() if reparameterised(msg["fn"]) else Reinforce(LeaveOneOut() if several else None)
            elbo._chosen[name, static] = chosen
        return chosen

    def _measure(self, estimator: Estimator, site: Site, msg: Message, run: _Run) -> None:
        """Arrays that need the library's distribution object."""
        fn, value = msg["fn"], msg["value"]
        if estimator.score:
            site.log_q = msg["log_q"] if "log_q" in msg else log_q(fn, value)
            scores = {label: log_q(fn, v) for label, v in estimator.scored(run.draws[site.name]).items()}
            if scores:
                run.draws[site.name] = Draw(value, {**run.draws[site.name].extra, **scores})
        if _uses(estimator, OptimalConstant):
            site.score_norm = score_norm(site, fn, value)
        if not site.named and (estimator.keeps or estimator.families is not None):
            site.named = named(fn)
        if isinstance(estimator, ControlVariate):
            draw = run.draws[site.name]
            run.draws[site.name] = Draw(draw.value, {**draw.extra, **estimator.measured(value, fn)})
        overridden = match(self.elbo.estimators, site.name) is not None
        spec = estimator if overridden else _requested(msg["infer"]) or estimator
        run.given[site.name] = spec.given(self.args, self.kwargs)

    # ---- counterfactual and relaxed evaluations -------------------------------------------------------------------

    def _rerun(
        self,
        run: _Run,
        group: Group,
        values: Mapping[str, Array],
        temperature: Array | None = None,
        vectorized: Any = None,
    ) -> list[Term]:
        """Cost terms downstream of the group when its sites take other values. What is not downstream keeps its
        value; what is, is drawn again from the same noise; where the values are relaxed, discrete sites downstream do
        what the group says."""
        plan, members = run.plan, frozenset(group.sites)
        down = plan.graph.descendants(members)
        moves = group.relaxations and group.downstream in ("relaxed", "mean")
        soft = frozenset(n for n in down if moves and plan.relaxable(n)) - members
        first = run.traces.guide

        def draw(msg: Message) -> Array:
            name = msg["name"]
            if name in values:
                return values[name]
            if name not in first:  # a branch that the drawn values did not take
                if group.relaxations:
                    raise site_error(
                        name,
                        "drawn only in a branch that relaxed values take, and a branch has no derivative",
                        "Use Reinforce(LeaveOneOut()) or DisARM() at the site that decides the branch.",
                    )
                with torch.no_grad():
                    return self._plain(msg)
            if name not in down:
                value = first[name]["value"]
                return value.detach() if group.relaxations else value
            return _seeded(run.rng[name], partial(again, msg)) if name in run.rng else again(msg)

        def again(msg: Message) -> Array:
            name = msg["name"]
            estimator = plan.estimators[name]
            if name in soft:
                site, noise, u = view(msg), run.noise[name], None
                if temperature is not None:
                    u = noise["u"] if "u" in noise else self._fresh_uniform(run, name, site)
                return relaxation.downstream(OPS, site.family, site.logits, u, temperature)
            if estimator.library_draw:
                return self._plain(msg)
            return self._drawn(msg, view(msg), estimator, run.noise[name])[0].value

        model, guide = self.model, self.guide
        if vectorized is not None:
            model, guide = vectorized(model), vectorized(guide)
        args, kwargs = self.args, self.kwargs
        if group.relaxations:  # the slope leads to what the estimators keep and to nothing else
            args, kwargs = tree_map(_detached, (args, kwargs))
        traces = self.execute(model, guide, args, kwargs, draw=draw, subsamples=self.subsamples)
        relaxed = run.soft | frozenset(n for n in members | soft if group.relaxations and plan.relaxable(n))
        return terms_of(traces, run.depends_on, relaxed, only=members, hard=frozenset(run.hard))

    def _fresh_uniform(self, run: _Run, name: str, site: Site) -> Array:
        """Noise of a relaxed site whose own estimator draws without declared noise; the same in all relaxed runs."""
        cached = run.noise[name].get("relaxed u")
        if cached is None:
            cached = self.elbo._noise(name, "u", Noise("uniform", tuple(site.logits.shape)), site.logits)
            run.noise[name]["relaxed u"] = cached
        return cached

    def _alternatives(self, run: _Run, group: Group) -> dict[str, Array]:
        """Downstream costs at each counterfactual value, ``[A, *plates]`` per site."""
        members = [run.sites[n] for n in group.sites]
        chunk = self.elbo.max_parallel if self.elbo.vectorize_particles else 1
        found: dict[str, list[Array]] = {n: [] for n in group.sites}
        average = self.elbo.average_model and averaging.averages(run.plan.shared, group)
        weights, rows = None, []
        if average:
            weights = averaging.weights(OPS, run.plan, group, run.sites, run.draws, members[0].logits)
        for start in range(0, group.alternatives, chunk):
            indices = range(start, min(start + chunk, group.alternatives))
            with torch.no_grad():
                values = [{s.name: self._value(run, s, i, weights) for s in members} for i in indices]
            evaluate = self._one if len(values) == 1 else self._many
            with nullcontext() if average else torch.no_grad():
                costs, terms = evaluate(run, group, members, values)
            for n in group.sites:
                found[n].append(costs[n].detach())
            if average:
                rows.append({(t.side, t.site): t.value for t in self._counted(run, group, terms)})
        if average:
            run.averages.append(Average(weights, {k: torch.cat([row[k] for row in rows]) for k in rows[0]}))
        return {n: torch.cat(x) for n, x in found.items()}

    def _counted(self, run: _Run, group: Group, terms: Sequence[Term]) -> list[Term]:
        """Terms with a gradient of their own to average, ``[values, *batch]``."""
        shapes = {(t.side, t.site): t.value.shape for t in run.terms}
        kept = averaging.counted(run.plan.shared, group, terms)
        return [replace(t, value=t.value.reshape(-1, *shapes[t.side, t.site])) for t in kept]

    def _value(self, run: _Run, site: Site, index: int, weights: Array | None) -> Array:
        estimator, draw = run.plan.estimators[site.name], run.draws[site.name]
        if index >= estimator.alternatives(site):
            return draw.value
        value = estimator.alternative(OPS, site, draw, index)
        return value if weights is None else averaging.possible(OPS, site, weights[1 + index], value, draw.value)

    def _one(
        self, run: _Run, group: Group, members: Sequence[Site], values: Sequence[Mapping[str, Array]]
    ) -> tuple[dict[str, Array], list[Term]]:
        terms = self._rerun(run, group, values[0])
        costs = downstream_costs(OPS, run.plan.graph, terms, members)
        return {s.name: _or_zero(costs[s.name], s, run.terms)[None] for s in members}, terms

    def _many(
        self, run: _Run, group: Group, members: Sequence[Site], values: Sequence[Mapping[str, Array]]
    ) -> tuple[dict[str, Array], list[Term]]:
        """Several counterfactual values in one run, as a plate to the left of all others."""
        widest = max(len(m["fn"].batch_shape) for r in (run.traces.guide, run.traces.model) for m in r.values())
        count, depth = len(values), 1 + max(int(self.elbo.max_plate_nesting), widest)
        plate = Plate(_ALTERNATIVES, -depth, count)

        def vectorized(fn: Any) -> Any:
            return pyro.plate(_ALTERNATIVES, count, dim=-depth)(fn)

        stacked, wide = {}, []
        for s in members:
            pad = (1,) * (depth - 1 - len(s.batch_shape))
            x = torch.stack([v[s.name] for v in values])
            stacked[s.name] = x.reshape(count, *pad, *x.shape[1:])
            wide.append(replace(s, plates=s.plates | {plate}, batch_shape=(count, *pad, *s.batch_shape)))
        graph = run.plan.graph
        graph = Graph(graph.ancestors, {n: p | {plate} for n, p in graph.plates.items()})
        terms = self._rerun(run, group, stacked, vectorized=vectorized)
        costs = downstream_costs(OPS, graph, terms, wide)
        return {
            s.name: _or_zero(costs[s.name], w, run.terms)
            .expand(count, *w.plate_shape[1:])
            .reshape(count, *s.plate_shape)
            for s, w in zip(members, wide, strict=True)
        }, terms

    def _relaxations(self, run: _Run, group: Group, kept: dict[str, Kept]) -> None:
        """Costs ``[M, *plates]`` at relaxed values and their slopes ``[M, *batch, *event]``, differentiable in what
        the estimators keep and in nothing else."""
        members = [run.sites[n] for n in group.sites]
        relaxed: dict[str, list[Array]] = {n: [] for n in group.sites}
        slope: dict[str, list[Array]] = {n: [] for n in group.sites}
        for index in range(group.relaxations):
            values = {
                s.name: run.plan.estimators[s.name].relaxed(OPS, s, run.draws[s.name], index, kept.get(s.name, Kept()))
                for s in members
            }
            values = {n: v if v.requires_grad else v.clone().requires_grad_() for n, v in values.items()}
            first, estimator = members[0], run.plan.estimators[members[0].name]
            temperature = estimator.downstream_temperature(OPS, first, index, kept.get(first.name, Kept()))
            with StopParameters():
                terms = self._rerun(run, group, values, temperature)
                costs = downstream_costs(OPS, run.plan.graph, terms, members)
                total = sum(t.value.sum() for t in terms)
            slopes = _slopes(total, values)
            for n in group.sites:
                relaxed[n].append(_or_zero(costs[n], run.sites[n], run.terms))
                slope[n].append(slopes[n])
        run.relaxed |= {n: torch.stack(x) for n, x in relaxed.items()}
        run.slope |= {n: torch.stack(x) for n, x in slope.items()}

    # ---- all particles ----------------------------------------------------------------------------------------------

    def _kept(self, runs: Sequence[_Run]) -> dict[str, Kept]:
        """Declare what estimators keep, in the hook's keeper where there is one."""
        kept = {}
        for run in runs:
            for n, site in run.sites.items():
                estimator = run.plan.estimators[n]
                if n in kept or not (estimator.keeps or run.given[n]):
                    continue
                if not estimator.keeps:
                    kept[n] = Kept()
                    continue
                keeper = site.declared
                if self.vectorized:
                    site = replace(site, lead=1, **self._without_particles(site))
                if keeper is None:
                    keeper = self.elbo.keeper
                    self._check_trained(n, estimator, site, run)
                like = site.logits if site.logits is not None else run.costs[n]
                kept[n] = keeper.declare(site, estimator, run.given[n], like.detach())
        return kept

    def _check_trained(self, name: str, estimator: Estimator, site: Site, run: _Run) -> None:
        trains = estimator.parameters(site) or estimator.networks(site, run.given[name])
        if trains and self.standalone and not any(isinstance(m, TraceMessenger) for m in _stack()):
            raise site_error(
                name,
                f"{estimator!r} has parameters to train, and outside SVI only the guide can hand them to an optimiser",
                f'Wrap the guide: guide = with_estimators(guide, {{"{name}": {estimator!r}}}).',
            )

    def _assemble(self, runs: Sequence[_Run], kept: dict[str, Kept]) -> Array:
        elbo, objective = self.elbo, self.elbo.objective
        collected = self._stack([self._collect(self._explicit(run)) for run in runs])
        if not collected.isfinite().all():
            _report(runs)
        value, signal = objective.combine(OPS, collected, objective.scale(runs[0].terms))
        evaluated: dict[str, Evaluated] = {}
        estimators: dict[str, Estimator] = {}
        for n in dict.fromkeys(n for run in runs for n in run.sites):
            here = [run for run in runs if n in run.sites]
            e = estimators[n] = here[0].plan.estimators[n]
            item = self._canonical(n, here)
            if signal is not None:
                cost = item.costs.value
                s = signal.reshape(signal.shape[0], *(1,) * (cost.ndim - signal.ndim), *signal.shape[1:])
                item = replace(item, costs=Costs(s))
                estimators[n] = Reinforce()  # the signal holds its own control: the bound of the other particles
            evaluated[n] = item
            if n in kept:
                given = {k: self._lead([r.given[n][k] for r in here], item.site) for k in here[0].given[n]}
                kept[n] = replace(kept[n], given=given)
            del e
        loss, states = assemble(OPS, value, estimators, evaluated, kept, elbo.num_particles)
        for n, state in states.items():
            update_state(n, state)
        return loss

    def _collect(self, terms: Sequence[Term]) -> Array:
        collected = self.elbo.objective.collect(OPS, terms)
        if self.vectorized and collected.ndim == 0:
            return collected / self.elbo.num_particles
        return collected

    def _stack(self, per_run: Sequence[Array]) -> Array:
        if self.vectorized and per_run[0].ndim:
            return per_run[0]
        return torch.stack(list(per_run)) if len(per_run) > 1 else per_run[0][None]

    def _explicit(self, run: _Run) -> list[Term]:
        """The terms whose own gradient counts: -log q of a score site has mean zero and is held fixed."""
        plan = run.plan
        sticking = plan.shared.sticking
        fixed: dict[str, Array] = {}
        if sticking:
            guide = run.traces.guide

            def replay(msg: Message) -> Array:
                return guide[msg["name"]]["value"].clone()  # no transform may answer from its cache

            with StopParameters():
                again = self.execute(None, self.guide, self.args, self.kwargs, draw=replay, subsamples=self.subsamples)
                again.model = {}
                terms = terms_of(again, run.depends_on, frozenset(run.soft), only=sticking)
                fixed = {t.site: t.value for t in terms if t.site in sticking}
        explicit = []
        for t in run.terms:
            if t.side == "guide" and t.site in fixed:
                t = replace(t, value=fixed[t.site])
            elif t.side == "guide" and t.site in run.sites and not self.elbo.objective.keeps_score:
                if t.value.requires_grad and not plan.estimators[t.site].pathwise:
                    t = replace(t, value=t.value.detach())
            explicit.append(t)
        return averaging.averaged(OPS, explicit, run.averages)

    def _canonical(self, name: str, runs: Sequence[_Run]) -> Evaluated:
        """One site of all particles, the particle axis first."""
        sites = [run.sites[name] for run in runs]
        first = sites[0]
        lead = partial(self._lead, site=first)
        facts = {"plates": first.plates, "batch_shape": first.batch_shape}
        if self.vectorized:
            facts = self._without_particles(first)
            if len(first.batch_shape) != self.elbo.max_plate_nesting:
                raise EstimatorError(
                    f"site '{name}': batch shape {first.batch_shape} with max_plate_nesting="
                    f"{self.elbo.max_plate_nesting}, the particles included: the particle axis must be the leftmost. "
                    "Pass a max_plate_nesting that covers every batch dimension, or vectorize_particles=False."
                )
        site = first.filled(
            lead=1,
            **facts,
            logits=lead([s.logits for s in sites]),
            named={k: lead([s.named[k] for s in sites]) for k in first.named},
            law=None,
            log_q=lead([s.log_q for s in sites]),
            score_norm=lead([s.score_norm for s in sites]),
            value=None,
            scale=_scale(first),
        )
        draws = [run.draws[name] for run in runs]
        draw = Draw(lead([d.value for d in draws]), {k: lead([d.extra[k] for d in draws]) for k in draws[0].extra})
        stack = partial(self._lead, site=first, axis=1)
        costs = Costs(
            lead([run.costs[name] for run in runs]),
            *(stack([getattr(run, part).get(name) for run in runs]) for part in ("alternatives", "relaxed", "slope")),
        )
        return Evaluated(site, draw, costs)

    @staticmethod
    def _without_particles(site: Site) -> dict[str, Any]:
        """Plates and batch shape of a vectorised site, the particle axis being its leading one."""
        return {
            "plates": frozenset(p for p in site.plates if p.name != _PARTICLES),
            "batch_shape": site.batch_shape[1:],
        }

    def _lead_given(self, arrays: Sequence[Any], site: Site) -> Any:
        """What a user gave: with a particle axis only if it was computed from draws."""
        if not self.vectorized:
            return self._lead(arrays, site)
        x, count = arrays[0], self.elbo.num_particles
        has_particles = x.ndim >= self.elbo.max_plate_nesting and x.shape[0] == count
        return x if has_particles else x.expand(count, *x.shape)

    def _lead(self, arrays: Sequence[Any], site: Site, axis: int = 0) -> Any:
        """Arrays of one particle each, joined along a new particle axis (or as they are, if vectorised)."""
        if arrays[0] is None or self.vectorized:
            return arrays[0]
        if len(arrays) == 1:
            return arrays[0].unsqueeze(axis)
        return torch.stack(list(arrays), axis)


def _requested(infer: Mapping[str, Any]) -> Estimator | None:
    """The site's own request: ``infer={"estimator": ...}``, or Pyro's ``infer={"baseline": {...}}``."""
    if infer.get("estimator") is not None or not infer.get("baseline"):
        return infer.get("estimator")
    options = dict(infer["baseline"])
    parts: list[Any] = []
    decay = options.pop("baseline_beta", 0.9)
    if options.pop("use_decaying_avg_baseline", False):
        parts.append(MovingAverage(decay))
    network, inputs = options.pop("nn_baseline", None), options.pop("nn_baseline_input", None)
    value = options.pop("baseline_value", None)
    if network is not None and value is not None:
        raise EstimatorError('infer={"baseline": ...}: give nn_baseline or baseline_value, not both.')
    if network is not None:
        parts.append(Learned(network, inputs))
    if value is not None:
        parts.append(Given(value))
    if options:
        raise EstimatorError(
            f'infer={{"baseline": ...}}: unknown options {sorted(options)}. Known: use_decaying_avg_baseline, '
            "baseline_beta, nn_baseline, nn_baseline_input, baseline_value."
        )
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Reinforce(total)


def _static(msg: Message) -> tuple[Any, ...]:
    """What a plan depends on, of one latent site."""
    fn, infer = msg["fn"], msg["infer"]
    asked = requested(msg["name"], infer)
    baseline = infer.get("baseline")
    return (
        type(fn),
        type(getattr(fn, "base_dist", None)),
        fn.batch_shape,
        fn.event_shape,
        plates_of(msg),
        None if asked is None else asked.structure(),
        tuple((k, baseline[k] if isinstance(baseline[k], (bool, float)) else None) for k in sorted(baseline))
        if baseline
        else None,
        id(infer.get("_with_estimators")),
        infer.get("enumerate"),
    )


def _uses(estimator: Estimator, kind: type) -> bool:
    baseline = getattr(estimator, "baseline", None)
    return baseline is not None and any(isinstance(p, kind) for p in baseline.parts)


def _or_zero(cost: Array | None, site: Site, terms: Sequence[Term]) -> Array:
    """A site that moves no cost has cost zero."""
    return cost if cost is not None else terms[0].value.new_zeros(site.plate_shape)


def _slopes(total: Any, values: Mapping[str, Array]) -> dict[str, Array]:
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return {n: torch.zeros_like(v) for n, v in values.items()}
    found = torch.autograd.grad(total, list(values.values()), create_graph=True, allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(values.items(), found, strict=True)}


def _seeded(seed: int, draw: Any) -> Array:
    """``draw()`` from a stream of its own: drawn again, it is the same, and no other site's noise is touched."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return draw()
    finally:
        generator.set_state(state)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def _held(draw: Draw) -> Draw:
    return Draw(draw.value.detach(), {k: x.detach() for k, x in draw.extra.items()})


def _scale(site: Site) -> Any:
    scale = site.scale
    return scale if not isinstance(scale, torch.Tensor) or scale.ndim == 0 else scale[None]


def _trace(record: Mapping[str, Message]) -> Trace:
    trace = Trace()
    for name, msg in record.items():
        trace.add_node(name, **msg)
    return trace


def _stack() -> list[Any]:
    from pyro.poutine.runtime import _PYRO_STACK

    return _PYRO_STACK


def _report(runs: Sequence[_Run]) -> None:
    """Warn, by name, of costs that are not finite."""
    bad = [
        f"'{t.site}' ({'log p' if t.side == 'model' else '-log q'})"
        for run in runs
        for t in run.terms
        if not torch.isfinite(t.value.detach()).all()
    ] or ["(their sum)"]
    warnings.warn(
        f"site {', '.join(dict.fromkeys(bad))}: the cost is not finite at this step. Running averages of the "
        "estimators are left as they were; look for a support mismatch, or lower the learning rate.",
        EstimatorWarning,
        stacklevel=2,
    )
