"""What NumPyro does for one evaluation of the loss (`core.library.Library`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import substitute

from ..core import averaging
from ..core.enumeration import Unplaced
from ..core.errors import EstimatorError, site_error
from ..core.estimator import Estimator, Noise
from ..core.families import RELAXABLE
from ..core.keep import Keeps, Kept
from ..core.library import CompiledLibrary, Joined, Run, Values
from ..core.objectives import NAME, check_dreams
from ..core.plan import Group, Plan, Settings
from ..core.posterior import Tables, Uniform
from ..core.site import Site, Term
from ..core.verify import Along, Height, Key, coupled, not_the_same, run_again, warn_of_coupling, warn_of_cuts
from .dependencies import LOOP, forward, without_derivative
from .distributions import another, divergence, line, log_q, score_norm, unlike
from .enumeration import Layout
from .keep import declare, state_name
from .memory import Memory, kinds_of
from .ops import OPS
from .randomness import Randomness
from .run import (
    Keys,
    Message,
    Program,
    Traces,
    execute,
    interpreted,
    key_of,
    keys_of,
    tables_of,
    terms_of,
    turned,
    view,
)
from .survey import plain_shapes, survey

Array = Any


class _Unplanned(Exception):
    """A run is not of the structure that is remembered. It is made again, from the same random numbers."""


@dataclass(eq=False)
class NumPyroLibrary(CompiledLibrary):
    """A NumPyro program at one key: model, guide, their parameters and arguments."""

    settings: Settings
    randomness: Randomness
    memory: Memory
    program: Program
    map_particles: Callable[..., Any]
    debug: bool = False

    ops = OPS
    passing = "svi.update(state, batch)"
    choosing = "guide = with_estimators(guide, {})"

    def __post_init__(self) -> None:
        program, self.key = self.program, self.program.key
        self.dtypes: Mapping[str, Any] = {}
        self.shapes: Mapping[tuple[str, str], tuple[int, ...]] | None = None  # if values are laid out side by side
        self._remembered = self.memory.recall(self.settings, program.model, program.guide)
        self._plan = self._survey() if self._remembered is None else self._remembered.plan
        self._alike = _alike(self._plan)

    @property
    def compiled(self) -> NumPyroLibrary:
        return self

    # ---- structure: which sites there are, who depends on whom (costs compile time only) ---------------------------

    def plan(self, traces: Traces | None = None) -> Plan:
        return self._plan

    def _survey(self) -> Plan:
        """Trace guide and model once, and see which latent values reach which cost terms."""
        try:
            found = survey(self.program, Keys(self.key), self._layout)
        except Unplaced:
            self.shapes = plain_shapes(self.program, Keys(self.key))
            found = survey(self.program, Keys(self.key), self._layout)
        self.dtypes = found.dtypes
        if self.settings.average_model and not found.followed:
            raise EstimatorError(
                "EstimatorELBO(average_model=True) under jax.disable_jit(): values are plain numbers there, on which a "
                "program may decide what it does, so that other values may have other costs. Leave average_model=False "
                "there, or jax.disable_jit() out."
            )
        plan = found.structure.plan(self.settings, self.settings.mapping)
        going_forward = forward(self.program.params)
        for name, operation in found.stuck.items():
            estimator = plan.estimators[name]
            moves = estimator.value.moves and not (going_forward and operation == LOOP)
            if moves or estimator.relaxations(plan.sites[name]).count:
                raise without_derivative(name, type(estimator).__name__, operation)
        if needing := plan.differentiated if self.settings.objective.moves else []:
            cuts = found.cuts(frozenset(n for n in needing if plan.sites[n].family in RELAXABLE))
            warn_of_cuts(self.settings, plan, {n: t for n in needing for t, there in cuts.items() if n in there})
        warn_of_coupling(coupled(plan, found.coupled))
        if plan.reruns and not found.again():  # particles share one tracing
            names = run_again(self, plan)
            raise not_the_same(self, plan, names, names)
        return plan

    # ---- one run ------------------------------------------------------------------------------------------------

    def run(
        self, draw: Callable[[Message], Array], source: Keys, *, first: bool = False, constants: bool = False,
        wide: Any = None, above: Traces | None = None,
    ) -> Traces:  # fmt: skip
        return self._execute(source, draw, constants=constants)

    def guide_again(self, traces: Traces, source: Keys) -> Traces:
        values = {n: m["value"] for n, m in traces.latents().items()}
        return self._execute(source, lambda msg: self.part(msg, values[msg["name"]]), constants=True, model=False)

    def _execute(self, source: Keys, draw: Any, *, constants: bool, model: bool = True) -> Traces:
        program = self.program if model else self.program._replace(model=None)
        if constants:
            params, args, kwargs = jax.tree.map(_constant, (program.params, program.args, program.kwargs))
            program = program._replace(params=params, args=args, kwargs=kwargs)

        def drawn(msg: Message) -> Array:
            value = draw(msg)
            if "step" in msg and isinstance(asked := self.requested(msg), Estimator):
                msg["given"] = asked.given(program.args, program.kwargs)
            return value

        return execute(program, source, draw=drawn, layout=self._layout())

    def _layout(self) -> Layout | None:
        """Where the values of enumerated sites go in a run, if the program has some."""
        if self.shapes is None:
            return None
        return Layout(self.shapes, self.settings.sums)

    def dream(self, source: Keys) -> Traces:
        program = self.program
        check_dreams(program.guide)

        def draw(msg: Message) -> Array:
            name, key = f"dreamt {msg['name']}", msg["kwargs"]["rng_key"]
            return jax.lax.stop_gradient(self.randomness.value(name, msg["fn"], key, msg.get("step"))[0])

        model, guide = turned(program.model, program.guide)
        return execute(program._replace(model=model, guide=guide), Keys(key_of(source.key, "turned")), draw=draw)

    def given(self, msg: Message, asked: Estimator) -> Values:
        inside = "given" in msg and asked is self.requested(msg)  # in each step of a scan
        return msg["given"] if inside else asked.given(self.program.args, self.program.kwargs)

    def terms(
        self, traces: Traces, plan: Plan, relaxed: frozenset[str], *, only: frozenset[str] | None = None,
        first: bool = False,
    ) -> list[Term]:  # fmt: skip
        return terms_of(traces, plan.depends_on, relaxed, plan.hard, only)

    def tables(self, traces: Traces) -> Tables:
        return tables_of(traces)

    def uniform(self, source: Keys) -> Uniform:
        numbers = count()
        return lambda *like: self.randomness.uniform(key_of(source.key, f"uniform {next(numbers)}"), *like)

    def check(self, run: Run) -> None:
        """A program that was just traced is the same."""
        plan = run.plan
        if plan.local or not plan.saturated or self.shapes is not None:
            return
        kinds = kinds_of(run.traces, run.terms)
        if self._remembered is None:
            if kinds is not None:
                self.memory.store(self.settings, plan, kinds, self.program.model, self.program.guide)
        elif kinds != self._remembered.kinds:
            raise _Unplanned

    def moved(self, run: Run, sites: Sequence[str], pattern: int | Along) -> dict[tuple[str, str], Array]:
        latents = run.traces.latents()
        others = {
            n: another(latents[n]["fn"], latents[n]["value"], key_of(self.key, f"another {n}"), pattern) for n in sites
        }
        return {(t.side, t.site): t.value for t in self._with(run, others, run.plan.soft)}

    def _with(self, run: Run, values: Mapping[str, Array], relaxed: frozenset[str]) -> list[Term]:
        """The cost terms where some sites have other values."""
        latents = run.traces.latents()

        def draw(msg: Message) -> Array:
            name = msg["name"]
            if name not in values:
                return self.again(msg, latents[name], constants=True)
            msg["intermediates"] = []
            return self.part(msg, values[name])

        return self.terms(self._execute(run.source, draw, constants=True), run.plan, relaxed)

    def leading(self, run: Run) -> list[str]:
        plan, latents = run.plan, run.traces.latents()
        floats = {n for n, m in latents.items() if jnp.issubdtype(m["value"].dtype, jnp.floating)}
        return [n for n in plan.differentiated if n in floats or plan.relaxable(n)]

    def tilted(self, run: Run, sites: Sequence[str], step: float, number: int) -> dict[tuple[str, str], Height]:
        plan, latents = run.plan, run.traces.latents()
        there = {**latents, **run.traces.model}  # of a point mass the guide knows no support
        lines = {n: line(there[n]["fn"], jax.lax.stop_gradient(latents[n]["value"]), number) for n in sites}
        soft = plan.soft | frozenset(n for n in sites if plan.relaxable(n))

        def totals(step: Array) -> tuple[dict[tuple[str, str], Array], list[Array]]:
            terms = self._with(run, {n: to(step) for n, to in lines.items()}, soft)
            return {(t.side, t.site): jnp.sum(t.value) for t in terms}, [jnp.sum(jnp.abs(t.value)) for t in terms]

        heights, sizes = totals(step)
        slopes = dict.fromkeys(heights, math.nan) if step else jax.jacrev(lambda x: totals(x)[0])(step)
        return {
            k: Height(float(x), float(slopes[k]), float(size), float(jnp.finfo(x.dtype).eps))
            for (k, x), size in zip(heights.items(), sizes, strict=True)
        }

    def cut(self, run: Run) -> Mapping[str, Key]:
        return {}  # said by the survey

    # ---- one site -----------------------------------------------------------------------------------------------

    def estimator(self, plan: Plan, msg: Message) -> Estimator:
        if self._remembered is not None and msg["name"] not in plan.estimators:
            raise _Unplanned
        return plan.estimators[msg["name"]]

    def requested(self, msg: Message) -> Estimator | None:
        return msg["infer"].get("estimator")

    def view(self, plan: Plan, msg: Message, wide: Any = None) -> Site:
        facts = plan.sites[msg["name"]]
        site = view(msg).filled(plates=facts.plates, coupled=facts.coupled, turns=facts.turns)
        return site.filled(time=0, declared=facts.declared) if "step" in msg else site

    def own(self, msg: Message) -> Array:
        key, step = msg["kwargs"]["rng_key"], msg.get("step")
        value, msg["intermediates"] = self.randomness.value(msg["name"], msg["fn"], key, step)
        return value

    def value(self, source: Keys, msg: Message, number: int) -> Array:
        key = self._key(source, msg, number) if number else msg["kwargs"]["rng_key"]
        return self.randomness.value(msg["name"], msg["fn"], key, msg.get("step"))[0]

    @staticmethod
    def _key(source: Keys, msg: Message, number: int) -> Array:
        """That of noise number ``number``, in each step of a scan another."""
        return Keys(msg["kwargs"]["rng_key"] if "step" in msg else source.key).of(msg["name"], number)

    def again(self, msg: Message, first: Message, *, constants: bool) -> Array:
        kept = (first["value"], first["intermediates"])
        kept = jax.tree.map(partial(self.part, msg), jax.lax.stop_gradient(kept) if constants else kept)
        value, msg["intermediates"] = kept
        return value

    def part(self, msg: Message, x: Array) -> Array:
        return x[msg["step"]] if "step" in msg else x

    def step(self, msg: Message, noise: Values) -> bool:
        if not _inside(msg):
            return False
        msg["noise"] = noise
        return True

    def either(self, condition: Array, new: Array, old: Array, msg: Message, first: Message) -> Array:
        before = jax.lax.stop_gradient(jax.tree.map(partial(self.part, msg), first["intermediates"]))
        msg["intermediates"] = jax.tree.map(partial(jnp.where, condition), msg["intermediates"], before)
        return jnp.where(condition, new, old)

    def sampled(self, msg: Message, value: Array) -> Array:
        return value.astype(self.dtypes[msg["name"]])

    def noise(self, source: Keys, msg: Message, site: Site, label: str, noise: Noise, number: int) -> Array:
        """Noise of which only the shape matters is drawn once for all sites that ask for the same (see `Keys`)."""
        name = site.name
        if noise.concentration is not None or _inside(msg):
            return self.randomness.noise([name], label, noise, self._key(source, msg, number), msg.get("step"))[0]
        if (name, label) not in source.noise:
            names = self._alike[name]
            rows = self.randomness.noise(names, label, noise, source.of(names[0], number))
            source.noise.update(zip(((n, label) for n in names), rows, strict=True))
        return source.noise[name, label]

    def state(self, site: Site, estimator: Estimator, label: str) -> Array:
        return self.keep(site, estimator, {}, None).state[label]

    def keep(self, site: Site, estimator: Estimator, given: Values, like: Array) -> Kept:
        """The guide hook declared it; here the present values are only looked up."""
        declared = estimator.keeps(site, given)
        if not declared:
            return Kept(given=given)
        asked = None if site.declared is None else site.declared.requested
        if asked is None or asked.structure() != estimator.structure():  # the arrays are this run's own
            raise site_error(
                site.name,
                f"{estimator!r} keeps parameters or state between steps, which the guide does not declare",
                f'Wrap the guide: guide = with_estimators(guide, {{"{site.name}": {estimator!r}}}).',
            )
        with substitute(data=self.program.params):
            return declare(site, declared, given)

    def unlike(self, ours: Message, theirs: Message) -> bool | Array:
        found = unlike(*((m["fn"], m["scale"], None) for m in (ours, theirs)))
        return found if isinstance(found, jax.core.Tracer) else bool(found)

    def divergence(self, ours: Message, theirs: Message) -> Array:
        return scale_and_mask(divergence(ours["fn"], theirs["fn"]), ours["scale"])

    def past(self, declared: Keeps) -> Values:
        name = state_name(NAME)
        if name not in self.program.params:
            raise EstimatorError(
                f"{self.settings.objective!r} counts the steps, and the guide does not declare what counts them. Wrap "
                "the guide: guide = with_estimators(guide, objective=elbo.objective)."
            )
        found: Values = self.program.params[name]
        return found

    def log_q(self, msg: Message, value: Array) -> Array:
        return log_q(msg["fn"], value)

    def score_norm(self, site: Site, msg: Message, value: Array) -> Array:
        return score_norm(site, msg["fn"], value)

    def arrays(self, site: Site) -> dict[str, Any]:
        return site.arrays(OPS, jnp.asarray(site.scale, dtype=float))

    def zero(self, site: Site | None = None) -> Array:
        return jnp.zeros(site.plate_shape if site is not None else ())

    def differentiating(self, yes: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    # ---- many evaluations ---------------------------------------------------------------------------------------

    def each(
        self, evaluate: Callable[..., Any], values: Callable[[Any], Values], group: Group, run: Run,
        differentiable: bool,
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:  # fmt: skip
        def one(index: Array) -> Any:
            return evaluate(values(index))

        if group.alternatives == 1:
            return jax.tree.map(lambda x: x[None], one(jnp.asarray(0)))
        if interpreted():
            return _one_by_one(one, jnp.arange(group.alternatives))
        # held back in the backward pass, not held: the activations of one chunk at a time
        mapped = jax.checkpoint(one) if differentiable else one
        return _side_by_side(mapped, jnp.arange(group.alternatives), self.settings.max_parallel)

    def mapped(self, one: Callable[[Any], dict[str, Array]], jobs: Any) -> dict[str, Array]:
        jobs = jax.tree.map(jnp.asarray, jobs, is_leaf=lambda x: isinstance(x, list))
        count = len(jax.tree.leaves(jobs)[0])
        if interpreted():
            return _one_by_one(one, [jax.tree.map(lambda x: x[i], jobs) for i in range(count)])  # noqa: B023
        return _side_by_side(one, jobs, self.settings.max_parallel)

    def rows(self, x: Array, rows: Sequence[int]) -> Array:
        return x[np.array(rows)]

    def slopes(
        self, total: Callable[[Values], tuple[Array, Values]], values: Values
    ) -> tuple[Mapping[str, Array], Values]:
        return jax.grad(total, has_aux=True)(values)

    def particles(self, one: Callable[[Any], tuple[dict[str, Any], Run]], count: int | None = None) -> Joined:
        try:
            return self._particles(one, count)
        except (_Unplanned, Unplaced):
            if self._remembered is None:
                raise
        self._remembered = self.memory.last = None
        self._plan = self._survey()
        self._alike = _alike(self._plan)
        return self._particles(one, count)

    def _particles(self, one: Callable[[Any], tuple[dict[str, Any], Run]], count: int | None) -> Joined:
        plan, kept = self._plan, {}
        count = plan.particles if count is None else count
        keys = keys_of(self.key, [f"particle {i}" for i in range(count)])

        def arrays(key: Array) -> dict[str, Any]:
            found, run = one(Keys(key))
            kept.update({n: replace(k, given={}) for n, k in run.kept.items()})
            own = {state_name(n) for n, k in run.kept.items() if k.state}
            found["mutable"] = {n: v for n, v in run.traces.mutable().items() if n not in own}
            if run.terms and self.debug:
                finite = jnp.isfinite(jnp.stack([jnp.sum(t.value) for t in run.terms]))
                found["finite"] = jax.lax.stop_gradient(finite)
            return found

        if count == 1:
            out = jax.tree.map(lambda x: x[None], arrays(keys[0]))
        elif interpreted():
            out = _one_by_one(arrays, keys)
        else:
            out = self.map_particles(arrays, keys)
        # as documented: the alternatives first, then the particles
        for found in [*out["sites"].values(), *([out["averages"]] if "averages" in out else [])]:
            found["elsewhere"] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found["elsewhere"])
        return Joined(out, {n: plan.sites[n] for n in out["sites"]}, plan.estimators, kept, count)


def _side_by_side(one: Callable[[Any], Any], over: Any, most: int) -> Any:
    """A map, at most so many at a time, in chunks of one size: a last one that is smaller would be compiled for itself.
    So the last job is done again where they do not come out even."""
    count = len(jax.tree.leaves(over)[0])
    chunk = -(-count // -(-count // most))
    if count % chunk:
        whole = np.minimum(np.arange(count + -count % chunk), count - 1)
        over = jax.tree.map(lambda x: x[whole], over)
    return jax.tree.map(lambda x: x[:count], jax.lax.map(one, over, batch_size=chunk))


def _one_by_one(one: Callable[[Any], Any], over: Iterable[Any]) -> Any:
    """As a map would do it, in plain Python: under `jax.disable_jit` a program may ask for the numbers."""
    return jax.tree.map(lambda *rows: jnp.stack(rows), *map(one, over))


def _alike(plan: Plan) -> dict[str, tuple[str, ...]]:
    """For each site those, itself included, whose estimator draws the same noise: of one estimator, family, shape and
    plates."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, site in plan.sites.items():
        shape = None if site.logits is None else site.logits.shape
        facts = (site.family, site.batch_shape, site.event_shape, shape, site.plates, site.time)
        found.setdefault((plan.estimators[name], *facts), []).append(name)
    return {name: tuple(names) for names in found.values() for name in names}


def _constant(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def _inside(msg: Message) -> bool:
    """Is the site met in a step of a scan, or in a branch of a cond?"""
    return "step" in msg or "branch" in msg
