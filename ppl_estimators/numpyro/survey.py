"""The structure of a program, as one tracing shows it: latent sites and cost terms, and who depends on whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.distribution import Delta

from ..core.credit import Steps
from ..core.enumeration import warn_of_minibatches
from ..core.errors import site_error, warn
from ..core.site import NO_STEP, Plate, Site, Term, Window
from ..core.structure import Structure
from ..core.verify import Moved
from .dependencies import COUNTED, HANDED_OVER, codes, dependencies, mark, same
from .distributions import SCANS, ends, sampled_dtype, still, unwrapped
from .enumeration import Layout, is_enumerated
from .run import Keys, Message, Program, Scan, Traces, execute, interpreted, is_latent, terms_of, view


@dataclass(frozen=True)
class Survey:
    """The structure of a program: which latent sites and cost terms there are, and who depends on whom. It holds shapes
    and no arrays, so that nothing of a trace outlives it.

    ``dtypes``: what the sites' samplers return. ``stuck``: see `dependencies.Found`. ``followed``: false where values
    are concrete and cannot be followed (`jax.disable_jit`); then everything depends on all that was drawn before it,
    and any value may have decided something. ``again``: whether the program is the same when it is traced again.
    ``cuts``: of each cost term, the sites whose value it depends on and has no derivative in, though parameters move
    it, if the sites that are named take relaxed values. ``coupled``: see `core.verify`.
    """

    structure: Structure
    dtypes: dict[str, Any]
    stuck: dict[str, str]
    followed: bool
    again: Callable[[], bool]
    cuts: Callable[[frozenset[str]], dict[tuple[str, str], frozenset[str]]]
    coupled: Moved

    @property
    def depends_on(self) -> dict[tuple[str, str], frozenset[str]]:
        """Of each cost term, by side and site."""
        return {(t.side, t.site): t.depends_on for t in self.structure.terms}


def plain_shapes(program: Program, keys: Keys) -> dict[tuple[str, str], tuple[int, ...]]:
    """The batch shapes of the sites of a program, none of them enumerated."""
    found: dict[tuple[str, str], tuple[int, ...]] = {}

    def draw(msg: Message) -> Any:
        return msg["fn"].sample(msg["kwargs"]["rng_key"])

    def look() -> None:
        look_only = Layout(None, lambda *_: False)
        traces = execute(program, keys, draw=draw, layout=look_only)
        for side, record in (("guide", traces.guide), ("model", traces.model)):
            sites = {n: m for n, m in record.items() if m["type"] == "sample"}
            found.update({(side, n): m["fn"].batch_shape[m["infer"].get(SCANS, 0) :] for n, m in sites.items()})

    if interpreted():
        look()
    else:
        jax.eval_shape(look)
    return found


_PARAMETERS = ""  # the mark of every parameter


def survey(program: Program, keys: Keys, layout: Callable[[], Layout | None]) -> Survey:
    """Run guide and model once, and see which latent values reach which cost terms."""
    followed = not interpreted()
    seen: dict[str, Any] = {}
    unclear: set[str] = set()

    def draw(soft: frozenset[str], msg: Message) -> Any:
        value, msg["intermediates"] = msg["fn"].sample_with_intermediates(msg["kwargs"]["rng_key"])
        return mark(value.astype(float) if msg["name"] in soft else value, msg["name"])

    def handed_over(msg: Message) -> Any:
        """A value of the guide's, as a step of a scan of the model takes it."""
        value = msg["value"]
        if value is None or not is_latent(msg) or is_enumerated(msg):
            return None
        fn = msg["fn"]
        if jnp.ndim(value) != len(fn.batch_shape) + fn.event_dim:  # NumPyro would take it for that of all steps
            unclear.add(msg["name"])
            return None
        return mark(value, HANDED_OVER + msg["name"])

    def run(soft: frozenset[str] = frozenset()) -> Any:
        ran = program
        if followed:
            ran = ran._replace(params=jax.tree.map(lambda x: mark(x, _PARAMETERS), dict(ran.params)))
        over = handed_over if followed else None
        traces = execute(ran, keys, draw=partial(draw, soft), layout=layout(), handed_over=over)
        latents = traces.latents()
        both = [n for n in latents if n in traces.model and is_latent(traces.model[n])]
        for n in both:
            _same_plates(n, latents[n], traces.model[n], traces)
        terms = terms_of(traces, relaxed=soft)
        seen["sites"] = {n: still(view(m, traces), m["fn"]) for n, m in latents.items()}
        seen["dtypes"] = {n: sampled_dtype(m["fn"]) for n, m in latents.items()}
        seen["terms"] = [replace(t, value=None, cost=None, weight=None) for t in terms]
        for which in ("scan", "inner"):
            orders = {i: o for i, t in enumerate(terms) if (o := _order(t, traces, which)) is not None}
            seen[which] = orders
        if traces.values is not None:
            warn_of_minibatches(traces.values)
        seen["model"] = [n for n, m in traces.model.items() if m["type"] == "sample"]
        seen["order"] = [n for n, m in traces.guide.items() if m["type"] == "sample"]
        auxiliary = {n for n, m in latents.items() if m["infer"].get("is_auxiliary")}
        seen["odd"] = [n for n in latents if (n in both) == (n in auxiliary)], auxiliary
        values = {n: m["value"] for n, m in latents.items()}
        return [t.value for t in terms], values, {n: ends(m["fn"]) for n, m in latents.items()}

    def again() -> bool:
        return not followed or same(traced, jax.make_jaxpr(lambda: run())())  # a new function: not from a cache

    def cuts(soft: frozenset[str]) -> dict[tuple[str, str], frozenset[str]]:
        if not followed:
            return {}
        moved = {n for n, deps in of_values.items() if _PARAMETERS in deps}
        points = frozenset(n for n, s in seen["sites"].items() if s.distribution == "Delta")
        made = {n for n in points if of_values[n] & drawn - points}  # of what was drawn, as by autoguides
        missing = (dependencies(lambda: run(soft)).cuts if soft else found_cuts)(points - made | {_PARAMETERS})[0]
        return {
            (t.side, t.site): deps & moved - (made & {t.site} if t.side == "guide" else set())
            for t, deps in zip(seen["terms"], missing, strict=True)
        }

    def coupled(plate: Plate, sites: Sequence[str], terms: Sequence[Term]) -> tuple[tuple[str, str], str] | None:
        if not followed:
            return None
        own = codes(plate.size).reshape(-1, *(1,) * (-plate.dim - 1))
        moved = {n: own.reshape(*own.shape, *(1,) * len(seen["sites"][n].event_shape)) for n in sites}
        (of_terms, *_), where = elements(moved, drawn)
        made = dict(zip(((t.side, t.site) for t in seen["terms"]), of_terms, strict=True))
        return next(((k, where(made[k])) for t in terms if (made[k := (t.side, t.site)] & ~own).any()), None)

    if followed:
        (of_terms, of_values, of_ends), stuck, traced, reads, found_cuts, elements = dependencies(run)
        of = seen["scan"], seen["inner"]
        steps = _steps(seen["terms"], *of, reads()[0], frozenset(unclear)) if seen["scan"] else {}
    else:
        run()
        of_terms, of_values, of_ends = _in_order(seen["order"], seen["sites"], seen["terms"])
        stuck, steps = {}, {}
    odd, auxiliary = seen["odd"]
    for name in odd:
        if name in auxiliary:
            fact = 'marked infer={"is_auxiliary": True}, but in the model too. Remove the mark.'
        else:
            fact = 'in the guide but not in the model. Mark it infer={"is_auxiliary": True} if that is meant.'
        warn(f"site '{name}': {fact}")
    leading = {_PARAMETERS, *(n for n, s in seen["sites"].items() if s.reparameterised)}
    drawn = frozenset(seen["sites"])
    structure = Structure(
        [replace(s, support_moves=any(d & leading for d in of_ends[n])) for n, s in seen["sites"].items()],
        [replace(t, depends_on=deps & drawn) for t, deps in zip(seen["terms"], of_terms, strict=True)],
        {n: deps & drawn - {n} for n, deps in of_values.items()},
        seen["model"],
        frozenset() if followed else drawn,
        steps,
    )
    stuck = {n: operation for n, operation in stuck.items() if n in drawn}
    return Survey(structure, seen["dtypes"], stuck, followed, again, cuts, coupled)


def _in_order(order: Sequence[str], sites: Mapping[str, Site], terms: Sequence[Term]) -> tuple[Any, Any, Any]:
    """Dependencies as far as the order of the guide tells them: on all that was drawn before. Steps of scans depend on
    each other."""
    steps = frozenset(n for n, s in sites.items() if s.time)
    before: dict[str, frozenset[str]] = {}
    for i, name in enumerate(order):
        drawn = frozenset(n for n in order[: i + 1] if n in sites)
        before[name] = drawn | steps if name in steps else drawn
    of_terms = [before[t.site] if t.side == "guide" else frozenset(sites) for t in terms]
    return of_terms, {n: before[n] for n in sites}, {n: [] for n in sites}


def _order(term: Term, traces: Traces, which: str = "scan") -> tuple[str, Scan] | None:
    """The scan of the guide whose steps those of a term follow, and the scan that the term is in: that one, or one of
    the model that takes just its values, step number i that of step i. NumPyro counts the steps as they are run, and
    where a scan runs from the end, the arrays that come out of it from the other end. ``which``: the "inner" one is
    inside of a step."""
    values, record = traces.values, traces.guide if term.side == "guide" else traces.model
    msg = record[term.site]
    scan = msg.get(which)
    if scan is None or not scan.latent:
        return None
    if values is not None and term.side == "model" and term.site in values.blocks and values.steps(term.site) is None:
        return None
    of_guide = scan if term.side == "guide" else _common(traces.guide[n].get(which) for n in scan.latent)
    if of_guide is None or of_guide.latent != scan.latent or of_guide.length != scan.length:
        return None
    return f"scan {of_guide.number}", scan


def _steps(
    terms: Sequence[Term],
    orders: Mapping[int, tuple[str, Scan]],
    inner: Mapping[int, tuple[str, Scan]],
    reads: Sequence[Any],
    unclear: frozenset[str],
) -> dict[tuple[str, str], Steps]:
    """Of the terms whose number is in ``orders``, and in ``inner`` if they are in a scan inside another; ``reads`` as
    in `dependencies.Found`, ``unclear`` names sites of which it does not show what a scan of the model reads."""
    of_guide = {t.site: i for i, t in enumerate(terms) if t.side == "guide" and i in orders}
    of_sites = {n: orders[i][0] for n, i in of_guide.items()}
    found = {}
    for i, (order, scan) in orders.items():
        side, own, readers = terms[i].side, terms[i].site, dict[str, Window]()
        values = [of_guide[p.name] for p in terms[i].plates if p.of_step and p.name in of_guide]
        decide = {name for number in values for name, *_ in reads[number]}  # how probable these are, from then on
        deep = inner.get(i)
        for name, ago, ago_inside in reads[i]:
            site = name.removeprefix(HANDED_OVER)
            if of_sites.get(site) != order:
                continue
            window, guides = _ago(ago, side == "guide" and scan.reverse), inner.get(of_guide[site])
            whole = side == "model" and name == site  # NumPyro hands out a latent site's own value as the guide's array
            if (side == "model" and site in unclear) or (whole and (site != own or scan.reverse)):
                window = Window(-math.inf, math.inf)
            elif ago > 0:
                window = window._replace(inner=NO_STEP)
            elif deep and guides and deep[0] == guides[0] and not (whole and deep[1].reverse):
                window = window._replace(inner=_ago(ago_inside, side == "guide" and deep[1].reverse))
            if name in decide:
                back = orders[values[0]][1].reverse
                window = window.joined(Window(-math.inf, 0) if back else Window(0, math.inf))
            readers[site] = readers[site].joined(window) if site in readers else window
        of_model = side == "model"
        steps_inside = deep and (deep[0], of_model and deep[1].reverse)
        found[side, own] = Steps(order, readers, of_model and scan.reverse, steps_inside)
    return found


def _ago(steps: float, back: bool) -> Window:
    return Window(-steps, -min(steps, COUNTED)) if back else Window(min(steps, COUNTED), steps)


def _common(scans: Iterable[Scan | None]) -> Scan | None:
    first, *others = set(scans)
    return None if others else first


def _same_plates(name: str, guide: Message, model: Message, traces: Traces) -> None:
    """The plates of a latent site, those that subsample above all, are the same in guide and model."""
    plates = [{f.name: f for f in m["cond_indep_stack"]} for m in (guide, model)]
    for plate in plates[0].keys() & plates[1].keys():
        dims = [p[plate].dim for p in plates]
        if dims[0] != dims[1]:
            raise site_error(
                name,
                f"plate '{plate}' is dimension {dims[0]} in the guide, {dims[1]} in the model",
                "Give the plate the same dim on both sides.",
            )
    only = [
        [p for p in here if p not in there and _subsamples(p, side)]
        for here, there, side in zip(plates, reversed(plates), traces.sizes.values(), strict=True)
    ]
    if only[0] and only[1]:
        raise site_error(
            name,
            f"plate '{only[0][0]}' of the guide and plate '{only[1][0]}' of the model subsample different elements",
            "Give the plate one name on both sides: the model then takes the guide's subsample.",
        )
    for here, there, found in (("guide", "model", only[0]), ("model", "guide", only[1])):
        given = isinstance(unwrapped(guide["fn"]), Delta)  # AutoSemiDAIS scales its density by hand
        if found and not given and not _same_scale(guide["scale"], model["scale"]):
            warn(
                f"site '{name}': plate '{found[0]}' subsamples it in the {here} but not in the {there}, and scales one "
                "log probability only. Open the same plate on both sides.",
            )


def _subsamples(plate: str, sizes: Mapping[str, tuple[int, int]]) -> bool:
    size, elements = sizes.get(plate, (1, 1))
    return elements < size


def _same_scale(a: Any, b: Any) -> bool:
    """Unknown where they are traced arrays."""
    a, b = (1.0 if x is None else x for x in (a, b))
    traced = isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
    return not traced and np.shape(a) == np.shape(b) and bool(np.allclose(a, b))
