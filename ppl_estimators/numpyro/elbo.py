"""`EstimatorELBO`: the drop-in loss for `numpyro.infer.SVI`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import substitute
from numpyro.infer.elbo import ELBO

from ..core import averaging, families, relaxation
from ..core.assembly import Evaluated, assemble
from ..core.averaging import Average
from ..core.credit import Graph, downstream_costs
from ..core.errors import EstimatorWarning, site_error
from ..core.estimator import Estimator, Noise
from ..core.keep import Kept
from ..core.objectives import EvidenceLowerBound, Objective
from ..core.plan import Group, Plan, check_keys, check_mapping, make_plan, match
from ..core.site import Costs, Draw, Site, Term
from ..estimators.baselines.optimal_constant import OptimalConstant
from ..estimators.control_variate import ControlVariate
from ..estimators.reinforce import Reinforce
from .dependencies import without_derivative
from .distributions import log_q, score_norm
from .keep import declare, state_name
from .ops import OPS
from .run import Keys, Message, Traces, execute, survey, terms_of, view

Array = Any


class EstimatorELBO(ELBO):
    """An ELBO that chooses a gradient estimator per sample site. Swap it for `Trace_ELBO`, nothing else changes.

    ``estimators``: ``{site name or glob pattern: estimator}``, or one estimator for every site. It overrides the
    guide hook `with_estimators`, which overrides ``infer={"estimator": ...}`` at the site, which overrides
    ``default``.

    ``num_particles``, ``vectorize_particles``: as in `numpyro.infer.ELBO`. All particles see one minibatch.

    ``default``: "auto", or the estimator of every site that nothing else names. "auto" is: reparameterisable sites
    Pathwise(); with several particles Reinforce(LeaveOneOut()); with one, DisARM() for Bernoulli sites and
    Enumerate() for small supports while two extra evaluations per step suffice; else Reinforce().

    ``objective``: None for the ELBO, or ImportanceWeighted(), Renyi(alpha).

    ``max_parallel``: how many counterfactual evaluations run side by side; the rest wait their turn. Memory grows
    with it, not with the number of evaluations.

    ``average_model``: also average the gradient of the model's own parameters, and of pathwise sites, over the values
    that the estimators evaluate (pairs of DisARM, sets of UnorderedSet, ...), each by its weight. It costs a backward
    pass through every evaluation.

    Raises `EstimatorError` (site, fact, reason, fix) for a choice that cannot work.

    >>> from ppl_estimators import DisARM
    >>> EstimatorELBO({"z": DisARM()}, num_particles=4).num_particles
    4
    """

    can_infer_discrete = True

    def __init__(
        self,
        estimators: Mapping[str, Estimator] | Estimator | None = None,
        *,
        num_particles: int = 1,
        vectorize_particles: bool | Callable[..., Any] = True,
        default: str | Estimator = "auto",
        objective: Objective | None = None,
        max_parallel: int = 16,
        average_model: bool = False,
    ):
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.estimators = check_mapping(estimators, "EstimatorELBO")
        if default != "auto" and not isinstance(default, Estimator):
            raise TypeError(f'EstimatorELBO(default=...) takes "auto" or an estimator, got {default!r}.')
        if max_parallel < 1:
            raise ValueError(f"EstimatorELBO(max_parallel=...) needs 1 or more, got {max_parallel!r}.")
        self.default = default
        self.objective = EvidenceLowerBound() if objective is None else objective
        self.max_parallel = max_parallel
        self.average_model = average_model

    def __repr__(self) -> str:
        return f"EstimatorELBO({self.estimators!r}, num_particles={self.num_particles})"

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Mapping[str, Array],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``{"loss": −ELBO (scalar), "mutable_state": new state or None}``; the loss's gradient is the estimate."""
        plate_key, *keys = jax.random.split(rng_key, 1 + self.num_particles)
        step = _Step(self, plate_key, dict(param_map), model, guide, args, kwargs)
        plan = step.plan(keys[0])
        kept = step.kept(plan)
        particle = partial(step.particle, plan, kept)
        if self.num_particles == 1:
            out = jax.tree.map(lambda x: x[None], particle(keys[0]))
        else:
            out = self.vectorize_particles_fn(particle, jnp.stack(keys))
        loss, states = step.assemble(plan, kept, out)
        mutable = jax.tree.map(_over_particles, out["mutable"])
        for name, k in kept.items():
            if k.state:
                mutable[state_name(name)] = states.get(name, dict(k.state))
        return {"loss": loss, "mutable_state": mutable or None}

    # ---- where randomness enters; tests override these two -------------------------------------------------------

    def _sample(self, name: str, fn: Any, key: Array) -> tuple[Array, list[Any]]:
        """A draw from a site's own distribution, and its intermediates."""
        return fn.sample_with_intermediates(key)

    def _noise(self, names: Sequence[str], label: str, noise: Noise, keys: Array) -> Array:
        """Noise that estimators asked for, ``[len(names), *shape]`` for as many keys."""
        return jax.vmap(partial(_noise, noise))(keys)


def _noise(noise: Noise, key: Array) -> Array:
    """Uniform noise lies strictly inside (0, 1)."""
    if noise.law == "normal":
        return jax.random.normal(key, noise.shape, dtype=float)
    if noise.law == "log gamma":
        return jax.random.loggamma(key, jax.lax.stop_gradient(noise.concentration))
    if noise.law == "poisson":
        return jax.random.poisson(key, jax.lax.stop_gradient(noise.concentration)).astype(float)
    tiny = jnp.finfo(jnp.result_type(float)).tiny
    u = jax.random.uniform(key, noise.shape, dtype=float, minval=tiny)
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


@dataclass(frozen=True)
class _Step:
    """One evaluation of the loss."""

    elbo: EstimatorELBO
    plate_key: Array
    params: dict[str, Array]
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def execute(self, keys: Keys, draw: Any, in_scan: Any, *, stopped: bool = False, model: bool = True) -> Traces:
        params, args, kwargs = self.params, self.args, self.kwargs
        if stopped:
            params, args, kwargs = jax.tree.map(_constant, (params, args, kwargs))
        return execute(
            keys,
            self.plate_key,
            params,
            self.model if model else None,
            self.guide,
            args,
            kwargs,
            draw=draw,
            in_scan=in_scan,
        )

    # ---- structure: which sites there are, who depends on whom (costs compile time only) ---------------------------

    def plan(self, key: Array) -> _JaxPlan:
        found = survey(Keys(key), self.plate_key, self.params, self.model, self.guide, self.args, self.kwargs)
        sites, terms = list(found.sites.values()), found.terms
        check_keys(self.elbo.estimators, list(found.sites), "EstimatorELBO")
        graph = Graph(found.ancestors, {s.name: s.plates for s in sites})
        plan = make_plan(
            sites,
            terms,
            graph,
            mapping=self.elbo.estimators,
            default=self.elbo.default,
            particles=self.elbo.num_particles,
            objective=self.elbo.objective,
            branches=not found.followed,
        )
        for name, operation in found.stuck.items():
            estimator = plan.estimators[name]
            if estimator.pathwise or estimator.relaxations(plan.sites[name]):
                raise without_derivative(name, type(estimator).__name__, operation)
        if self.elbo.average_model:
            averaging.check(plan, branches=not found.followed)
        return _JaxPlan(plan, found.depends_on, terms, found.dtypes, _alike(plan))

    def kept(self, plan: _JaxPlan) -> dict[str, Kept]:
        """Present values of what estimators keep. The guide hook declared them; here they are only looked up."""
        kept = {}
        for name, estimator in plan.estimators.items():
            if not estimator.keeps:
                continue
            site = plan.sites[name]
            if site.declared != estimator:
                raise site_error(
                    name,
                    f"{estimator!r} keeps parameters or state between steps, which the guide does not declare",
                    f'Wrap the guide: guide = with_estimators(guide, {{"{name}": {estimator!r}}}).',
                )
            with substitute(data=self.params):
                kept[name] = declare(site, estimator, estimator.given(self.args, self.kwargs))
        return kept

    # ---- one particle -------------------------------------------------------------------------------------------

    def particle(self, plan: _JaxPlan, kept: dict[str, Kept], key: Array) -> dict[str, Any]:
        """Everything the assembly needs, as arrays."""
        draws: dict[str, Draw] = {}
        keys = Keys(key, list(plan.sites))
        traces = self.execute(keys, partial(self._draw, plan, kept, draws, keys), partial(self._in_scan, plan))
        terms = terms_of(traces, plan.depends_on, plan.soft, plan.shared.hard)
        sites = {n: self._view(plan, m, traces) for n, m in traces.latents().items() if plan.estimators[n].local_part}
        for n, m in traces.latents().items():
            if n in sites and n not in draws:  # drawn inside a scan
                draws[n] = Draw(jax.lax.stop_gradient(m["value"]))
        for n, site in sites.items():
            self._measure(plan.estimators[n], site, traces.guide[n]["fn"], draws)
        costs = downstream_costs(OPS, plan.graph, terms, list(sites.values()))
        out: dict[str, Any] = {
            "cost": {n: jnp.zeros(s.plate_shape) if costs[n] is None else costs[n] for n, s in sites.items()},
            "site": {n: _arrays(s) for n, s in sites.items()},
            "draw": {n: {"value": draws[n].value, "extra": dict(draws[n].extra)} for n in sites},
            "given": {n: self._given(plan, traces.guide[n]) for n in sites},
            "alternatives": {},
            "relaxed": {},
            "slope": {},
            "mutable": {n: v for n, v in traces.mutable().items() if n not in {state_name(s) for s in kept}},
            "finite": jax.lax.stop_gradient(jnp.isfinite(jnp.stack([jnp.sum(t.value) for t in terms]))),
        }
        averages: list[Average] = []
        for group in plan.groups:
            if group.alternatives:
                out["alternatives"] |= self._alternatives(plan, group, keys, sites, draws, kept, averages)
            else:
                relaxed, slope = self._relaxations(plan, group, keys, sites, draws, kept)
                out["relaxed"] |= relaxed
                out["slope"] |= slope
        explicit = averaging.averaged(OPS, self._explicit(plan, keys, traces, terms), averages)
        return {**out, "objective": self.elbo.objective.collect(OPS, explicit)}

    def _draw(
        self, plan: _JaxPlan, kept: dict[str, Kept], draws: dict[str, Draw], keys: Keys, msg: Message, key: Array
    ) -> tuple[Array, list[Any]]:
        name = msg["name"]
        estimator = plan.estimators[name]
        if estimator.library_draw:
            return self.elbo._sample(name, msg["fn"], key)
        site = self._view(plan, msg)
        noise = {}
        for i, (label, n) in enumerate(estimator.noise(site).items()):
            if n.law == "value":
                own = key if i == 0 else jax.random.fold_in(key, i)
                noise[label] = jax.lax.stop_gradient(self.elbo._sample(name, msg["fn"], own)[0])
            elif n.law == "state":
                noise[label] = kept[name].state[label]
            elif n.concentration is not None:
                noise[label] = self.elbo._noise([name], label, n, jax.random.fold_in(key, i)[None])[0]
            else:
                noise[label] = self._alike(plan, keys, name, label, n, i)
        draw = estimator.draw(OPS, site, noise)
        draws[name] = _stopped(draw)
        if estimator.pathwise:
            return draw.value, []
        return draws[name].value.astype(plan.dtypes[name]), []

    def _alike(self, plan: _JaxPlan, keys: Keys, name: str, label: str, noise: Noise, number: int) -> Array:
        """Noise of which only the shape matters: drawn once for all sites that ask for the same (see `Keys`)."""
        if (name, label) not in keys.noise:
            names = plan.alike[name]
            rows = self.elbo._noise(names, label, noise, keys.folded(names, number))
            keys.noise.update(zip(((n, label) for n in names), rows, strict=True))
        return keys.noise[name, label]

    def _in_scan(self, plan: _JaxPlan, msg: Message) -> Array | None:
        """Values of latent sites inside a scan, where no handler of ours can reach."""
        if msg["type"] != "sample" or msg["is_observed"] or plan.estimators[msg["name"]].pathwise:
            return None
        return jax.lax.stop_gradient(msg["fn"].sample(msg["kwargs"]["rng_key"]))

    @staticmethod
    def _view(plan: _JaxPlan, msg: Message, traces: Traces | None = None) -> Site:
        return replace(view(msg, traces), plates=plan.sites[msg["name"]].plates)

    @staticmethod
    def _measure(estimator: Estimator, site: Site, fn: Any, draws: dict[str, Draw]) -> None:
        """Arrays that need the library's distribution object."""
        value = draws[site.name].value if site.family in families.DISCRETE else site.value
        if estimator.score:
            site.log_q = log_q(fn, value)
            scores = {label: log_q(fn, v) for label, v in estimator.scored(draws[site.name]).items()}
            if scores:
                draws[site.name] = Draw(draws[site.name].value, {**draws[site.name].extra, **scores})
        if _uses(estimator, OptimalConstant):
            site.score_norm = score_norm(site, fn, value)
        if isinstance(estimator, ControlVariate):
            extra = {**draws[site.name].extra, **estimator.measured(value, fn)}
            draws[site.name] = Draw(draws[site.name].value, extra)

    def _given(self, plan: _JaxPlan, msg: Message) -> dict[str, Array]:
        """Arrays that the spec brings along, from the spec as this run of the guide made it."""
        key = match(self.elbo.estimators, msg["name"])
        spec = msg["infer"].get("estimator") if key is None else self.elbo.estimators[key]
        spec = plan.estimators[msg["name"]] if spec is None else spec
        return spec.given(self.args, self.kwargs)

    def _explicit(self, plan: _JaxPlan, keys: Keys, traces: Traces, terms: list[Term]) -> list[Term]:
        """The terms whose own gradient counts: -log q of a score site has mean zero and is held fixed."""
        sticking = plan.shared.sticking
        fixed: dict[str, Array] = {}
        if sticking:
            values = {n: m["value"] for n, m in traces.latents().items()}

            def in_scan(msg: Message) -> Array | None:
                return values.get(msg["name"]) if msg["type"] == "sample" and not msg["is_observed"] else None

            again = self.execute(keys, lambda msg, _: (values[msg["name"]], []), in_scan, stopped=True, model=False)
            fixed = {t.site: t.value for t in terms_of(again, relaxed=plan.soft)}
        explicit = []
        for t in terms:
            if t.side == "guide" and t.site in sticking:
                t = replace(t, value=fixed[t.site])
            elif t.side == "guide" and t.site in plan.estimators and not self.elbo.objective.keeps_score:
                if not plan.estimators[t.site].pathwise:
                    t = replace(t, value=jax.lax.stop_gradient(t.value))
            explicit.append(t)
        return explicit

    # ---- counterfactual and relaxed evaluations -------------------------------------------------------------------

    def _rerun(
        self,
        plan: _JaxPlan,
        group: Group,
        keys: Keys,
        values: dict[str, Array],
        draws: dict[str, Draw],
        kept: dict[str, Kept],
        temperature: Array | None = None,
        stopped: bool = True,
    ) -> list[Term]:
        """Cost terms downstream of the group when its sites take other values: the guide runs again from the same
        keys, so what is not downstream comes out as before (score sites keep their value) and what is shares its
        noise; where the values are relaxed, discrete sites downstream do what the group says."""
        members = frozenset(group.sites)
        down = plan.graph.descendants(members)
        moves = group.relaxations and group.downstream in ("relaxed", "mean")
        soft = frozenset(n for n in down if moves and plan.relaxable(n)) - members

        def draw(msg: Message, key: Array) -> tuple[Array, list[Any]]:
            name = msg["name"]
            if name in values:
                return values[name], []
            if name in draws and name not in down and not plan.estimators[name].pathwise:
                return draws[name].value.astype(plan.dtypes[name]), []
            if name in soft:
                site, u = self._view(plan, msg), None
                if temperature is not None:
                    noise = Noise("uniform", tuple(site.logits.shape))
                    u = self.elbo._noise([name], "u", noise, jax.random.fold_in(key, 0)[None])[0]
                return relaxation.downstream(OPS, site.family, site.logits, u, temperature), []
            return self._draw(plan, kept, {}, keys, msg, key)

        traces = self.execute(keys, draw, partial(self._in_scan, plan), stopped=stopped)
        relaxed = plan.soft | frozenset(n for n in members | soft if group.relaxations and plan.relaxable(n))
        terms = terms_of(traces, plan.depends_on, relaxed, plan.shared.hard)
        return [t for t in terms if t.depends_on & members]

    def _alternatives(
        self,
        plan: _JaxPlan,
        group: Group,
        keys: Keys,
        sites: dict[str, Site],
        draws: dict[str, Draw],
        kept: dict[str, Kept],
        averages: list[Average],
    ) -> dict[str, Array]:
        """Downstream costs at each counterfactual value, ``[A, *plates]`` per site; where the model's own gradient is
        averaged over these values, what it needs is added to ``averages``."""
        members = [sites[n] for n in group.sites]
        average = self.elbo.average_model and averaging.averages(plan.shared, group)
        weights = averaging.weights(OPS, plan, group, sites, draws, members[0].logits) if average else None

        def costs(index: Array) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:
            values = {}
            for site in members:
                estimator, draw = plan.estimators[site.name], draws[site.name]
                n = estimator.alternatives(site)
                value = estimator.alternative(OPS, site, draw, jnp.minimum(index, n - 1))
                if n < group.alternatives:
                    value = jnp.where(index < n, value, draw.value)
                if average:
                    value = averaging.possible(OPS, site, weights[1 + index], value, draw.value)
                values[site.name] = value.astype(plan.dtypes[site.name])
            terms = self._rerun(plan, group, keys, values, draws, kept, stopped=not average)
            found = downstream_costs(OPS, plan.graph, terms, members)
            found = {s.name: jnp.zeros(s.plate_shape) if found[s.name] is None else found[s.name] for s in members}
            counted = averaging.counted(plan.shared, group, terms) if average else []
            return found, {(t.side, t.site): t.value for t in counted}

        if group.alternatives == 1:
            stacked, terms = jax.tree.map(lambda x: x[None], costs(jnp.asarray(0)))
        else:
            chunk = min(self.elbo.max_parallel, group.alternatives)
            # held back in the backward pass, not held: the activations of one chunk at a time
            mapped = jax.checkpoint(costs) if average else costs
            stacked, terms = jax.lax.map(mapped, jnp.arange(group.alternatives), batch_size=chunk)
        if average:
            averages.append(Average(weights, terms))
        return jax.lax.stop_gradient(stacked)

    def _relaxations(
        self,
        plan: _JaxPlan,
        group: Group,
        keys: Keys,
        sites: dict[str, Site],
        draws: dict[str, Draw],
        kept: dict[str, Kept],
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Costs ``[M, *plates]`` at relaxed values and their slopes ``[M, *batch, *event]``, differentiable in what
        the estimators keep and in nothing else."""
        members = [sites[n] for n in group.sites]

        def total(values: dict[str, Array], temperature: Array | None) -> tuple[Array, dict[str, Array]]:
            terms = self._rerun(plan, group, keys, values, draws, kept, temperature)
            found = downstream_costs(OPS, plan.graph, terms, members)
            return sum(jnp.sum(t.value) for t in terms), found

        relaxed: dict[str, list[Array]] = {n: [] for n in group.sites}
        slope: dict[str, list[Array]] = {n: [] for n in group.sites}
        for index in range(group.relaxations):
            values = {
                s.name: plan.estimators[s.name].relaxed(OPS, s, draws[s.name], index, kept.get(s.name, Kept()))
                for s in members
            }
            first = members[0]
            temperature = plan.estimators[first.name].downstream_temperature(
                OPS, first, index, kept.get(first.name, Kept())
            )
            slopes, costs = jax.grad(total, has_aux=True)(values, temperature)
            for n in group.sites:
                relaxed[n].append(costs[n])
                slope[n].append(slopes[n])
        return {n: jnp.stack(x) for n, x in relaxed.items()}, {n: jnp.stack(x) for n, x in slope.items()}

    # ---- all particles ----------------------------------------------------------------------------------------------

    def assemble(
        self, plan: _JaxPlan, kept: dict[str, Kept], out: dict[str, Any]
    ) -> tuple[Array, dict[str, dict[str, Array]]]:
        objective = self.elbo.objective
        value, signal = objective.combine(OPS, out["objective"], objective.scale(plan.terms))
        evaluated, estimators = {}, dict(plan.estimators)
        for name in out["cost"]:
            site = replace(plan.sites[name], lead=1, value=None, **out["site"][name])
            cost = out["cost"][name]
            if signal is not None:
                cost = jnp.reshape(signal, (signal.shape[0], *(1,) * (cost.ndim - signal.ndim), *signal.shape[1:]))
                estimators[name] = Reinforce()  # the signal holds its own control: the bound of the other particles
            evaluated[name] = Evaluated(
                site,
                Draw(out["draw"][name]["value"], out["draw"][name]["extra"]),
                Costs(cost, *(_swapped(out[part].get(name)) for part in ("alternatives", "relaxed", "slope"))),
            )
        kept = {n: replace(kept.get(n, Kept()), given=given) for n, given in out["given"].items()}
        loss, states = assemble(OPS, value, estimators, evaluated, kept, self.elbo.num_particles)
        return _report(plan.terms, out["finite"], loss), states


@dataclass(frozen=True)
class _JaxPlan:
    """The shared plan, and what only this adapter needs."""

    shared: Plan
    depends_on: Mapping[tuple[str, str], frozenset[str]]
    terms: tuple[Term, ...]
    dtypes: Mapping[str, Any]
    alike: Mapping[str, tuple[str, ...]]  # for each site those, itself included, whose estimator draws the same noise

    estimators = property(lambda self: self.shared.estimators)
    sites = property(lambda self: self.shared.sites)
    graph = property(lambda self: self.shared.graph)
    groups = property(lambda self: self.shared.groups)
    relaxable = property(lambda self: self.shared.relaxable)
    soft = property(lambda self: self.shared.soft)


def _alike(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Sites with one estimator, family, shape and plates."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, site in plan.sites.items():
        shape = None if site.logits is None else site.logits.shape
        facts = (site.family, site.batch_shape, site.event_shape, shape, site.plates, site.time)
        found.setdefault((plan.estimators[name], *facts), []).append(name)
    return {name: tuple(names) for names in found.values() for name in names}


def _constant(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def _stopped(draw: Draw) -> Draw:
    return Draw(jax.lax.stop_gradient(draw.value), jax.lax.stop_gradient(dict(draw.extra)))


def _arrays(site: Site) -> dict[str, Any]:
    """What differs between particles."""
    scale = jnp.asarray(site.scale, dtype=float)
    return {
        "logits": site.logits,
        "named": site.named,
        "log_q": site.log_q,
        "score_norm": site.score_norm,
        "scale": jnp.reshape(scale, (*(1,) * (len(site.batch_shape) - scale.ndim), *scale.shape)),  # [*batch or 1s]
    }


def _uses(estimator: Estimator, kind: type) -> bool:
    baseline = getattr(estimator, "baseline", None)
    return baseline is not None and any(isinstance(p, kind) for p in baseline.parts)


def _swapped(x: Array | None) -> Array | None:
    """Particles first, as vectorised, to alternatives first, as documented."""
    return None if x is None else jnp.moveaxis(x, 0, 1)


def _over_particles(x: Array) -> Array:
    """The user's own mutable state: averaged where that makes sense, else the first particle's."""
    return jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]


def _report(terms: tuple[Term, ...], finite: Array, loss: Array) -> Array:
    """``loss``, after a warning that names the costs that are not finite.

    A pure callback, whose zero is added to the loss: unlike one with effects it leaves jit's fast path open, and it
    runs on a bad step only.
    """
    dtype = loss.dtype  # the callback outlives the trace, and must not hold the loss
    names = [f"'{t.site}' ({'log p' if t.side == 'model' else '-log q'})" for t in terms]

    def say(finite: Any) -> Any:
        bad = [n for n, ok in zip(names, finite, strict=True) if not ok]
        if bad:
            warnings.warn(
                f"site {', '.join(bad)}: the cost is not finite at this step. Running averages of the estimators are "
                "left as they were; look for a support mismatch, or use stable_update.",
                EstimatorWarning,
                stacklevel=2,
            )
        return np.zeros((), dtype)

    nothing = jax.ShapeDtypeStruct((), dtype)

    @jax.custom_batching.custom_vmap
    def check(finite: Array) -> Array:
        return jax.lax.cond(
            jnp.all(finite), lambda f: jnp.zeros((), dtype), lambda f: jax.pure_callback(say, nothing, f), finite
        )

    @check.def_vmap
    def once(size: int, batched: Any, finite: Array) -> tuple[Array, bool]:  # many losses at once: one report
        return check(jnp.all(finite, axis=0)), False

    return loss + jax.lax.stop_gradient(check(jnp.all(finite.reshape(-1, len(names)), axis=0)))
