"""Running guide and model once: which value every latent site takes, and the cost terms that result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.distributions.distribution import Unit
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, substitute
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger
from numpyro.util import format_shapes

from ..core import objectives
from ..core.enumeration import Enumeration, Unplaced, marked, missing
from ..core.errors import EstimatorError, site_error
from ..core.plan import words
from ..core.posterior import Tables
from ..core.site import Plate, Site, Term
from ..core.terms import LogProbs
from .distributions import (
    SCANS,
    cost_log_prob,
    describe,
    log_p_of_all,
    relaxed_log_prob,
    unwrapped,
)
from .enumeration import Layout, cell, countable, in_turn, is_enumerated, is_stepwise, is_summed, steps_of, support
from .ops import OPS

Array = Any
Message = dict[str, Any]

#: value of a latent site, from its message, which holds its key. That of a step of a scan has its number as "step": the
#: place among the values of all steps.
Draw = Callable[[Message], Array]
#: what a message of such a step may hold beside, and what is stacked to that of all steps
_ALONG = ("noise", "given")


@dataclass
class Traces:
    """Messages of one run, by site name in order of appearance; ``values`` if some take all their values. ``sizes`` of
    the plates of either side, those inside scans and conds too: how many elements there are in all, and in this run.
    ``asked``: by latent sites of the model, see `plan.words`."""

    guide: dict[str, Message] = field(default_factory=dict)
    model: dict[str, Message] = field(default_factory=dict)
    values: Enumeration | None = None
    sizes: dict[str, dict[str, tuple[int, int]]] = field(default_factory=lambda: {"guide": {}, "model": {}})
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def latents(self) -> dict[str, Message]:
        """Sites whose value was drawn."""
        return {n: m for n, m in self.guide.items() if is_latent(m) and not is_enumerated(m)}

    def plates(self, side: str, term: str) -> frozenset[Plate]:
        """Of a cost term."""
        if self.values is not None:
            return self.values.plates(side, term)
        return _scaled_plates((self.model if side == "model" else self.guide)[term], self)

    def mutable(self) -> dict[str, Array]:
        both = {**self.guide, **self.model}
        return {n: m["value"] for n, m in both.items() if m["type"] == "mutable"}


class Keys:
    """The random keys of one particle: one per site name, so every run of it draws a site from the same noise."""

    def __init__(self, key: Array):
        self.key = key
        self.noise: dict[tuple[str, str], Array] = {}  # what was drawn already, by site and label

    def of(self, name: str, number: int) -> Array:
        """The key of noise number ``number`` of a site of the guide."""
        return key_of(self.key, f"noise {number} {name}")


def keys_of(key: Array, purposes: Sequence[str]) -> Array:
    """A key for each purpose, ``[len(purposes)]``: ``key`` with the bits flipped that the purpose's hash says.

    To split or to fold would be one more evaluation of the generator each: a kernel on a GPU, on a processor a loop,
    and a loop for each site would be most of what XLA has to compile. This costs nothing, and related keys are as good
    as any: JAX's own of the seeds 0, 1, 2, ... differ by as many bits as the numbers do. Flipping twice is flipping
    back, so no purpose occurs twice on the way to a key.
    """
    return _flipped(key, purposes, (len(purposes),))


def key_of(key: Array, purpose: str) -> Array:
    """The key for one purpose, see `keys_of`."""
    return _flipped(key, [purpose], ())


def _flipped(key: Array, purposes: Sequence[str], shape: tuple[int, ...]) -> Array:
    typed = jnp.issubdtype(key.dtype, dtypes.prng_key)
    data = jax.random.key_data(key) if typed else key
    hashes = b"".join(hashlib.blake2b(p.encode(), digest_size=4 * data.size).digest() for p in purposes)
    flipped = data ^ np.frombuffer(hashes, "<u4").reshape(*shape, *data.shape)
    return jax.random.wrap_key_data(flipped, impl=jax.random.key_impl(key)) if typed else flipped


def plates_of(msg: Message) -> frozenset[Plate]:
    return frozenset(Plate(f.name, f.dim, f.size) for f in msg["cond_indep_stack"])


class Program(NamedTuple):
    """Model and guide, what they are called with, their parameters, and the key of what all particles share."""

    model: Any  # None: the guide only
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    params: Mapping[str, Any]
    key: Array
    ranks: str = "allow"  # see `ranks`


def ranks() -> str:
    """May arrays of different ranks meet?"""
    return str(jax.config.jax_numpy_rank_promotion)  # type: ignore[attr-defined]  # set when jax is imported


@contextmanager
def promoting(allowed: str = "allow") -> Iterator[None]:
    """The engine's own arrays may, whatever the user says of guide and model."""
    with nullcontext() if ranks() == allowed else jax.numpy_rank_promotion(allowed):
        yield


#: what JAX raises where Python or numpy asks for a number
_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class DuplicateName(EstimatorError, AssertionError):
    """Two sites of one name: an `AssertionError` too, as NumPyro's own."""


class _Replay(replay):
    """NumPyro's own, which puts the guide's infer in place of the model's: notes what that asks for."""

    def __init__(self, fn: Callable[..., Any], trace: Mapping[str, Message], asked: dict[str, dict[str, Any]]):
        self.asked = asked
        super().__init__(fn, trace)

    def process_message(self, msg: Message) -> None:
        _note_words(msg, self.asked)
        super().process_message(msg)


def _note_words(msg: Message, asked: dict[str, dict[str, Any]]) -> None:
    if is_latent(msg) and (said := words(msg["infer"])):
        asked[msg["name"]] = said


class Scan(NamedTuple):
    """One of NumPyro's scans: the how manieth of its side, how many steps it has, whether it runs from the last to the
    first, and the names of the sites inside that are not observed."""

    number: int
    length: int
    reverse: bool
    latent: frozenset[str]


def _is_severed(msg: Message, guide: Mapping[str, Message] | None) -> bool:
    """Is it a latent site of the model whose value goes nowhere, since `do` has put another in its place?"""
    latent = msg["type"] == "sample" and msg["value"] is None
    return latent and guide is not None and "_intervener_id" in msg and msg["name"] not in guide


class _Conduct(Messenger):
    """Gives out keys by name, asks ``draw`` for the values of latent sites, records sites and ``sizes`` of plates.

    ``guide``: the guide's record, for a run of the model.
    """

    def __init__(
        self,
        key: Array,
        plate_key: Array,
        draw: Draw,
        record: dict[str, Message],
        sizes: dict[str, tuple[int, int]],
        params: Mapping[str, Array],
        guide: Mapping[str, Message] | None = None,
        layout: Layout | None = None,
        handed_over: Draw | None = None,
    ):
        self.layout, self.handed_over = layout, handed_over
        self.key, self.plate_key, self.draw, self.record = key, plate_key, draw, record
        self.sizes, self.params, self.guide = sizes, params, guide
        self.side = "guide" if guide is None else "model"
        self.kinds: dict[str, str] = {}  # of what has a name
        self.anonymous = self.scans = 0
        self.at: tuple[Array, ...] = ()  # inside scans: the numbers of their steps
        self.inner: dict[str, Scan | None] = {}  # the scan inside a step of another that a site is in
        self.asked: dict[str, dict[str, Any]] = {}  # by latent sites of the model
        super().__init__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, Exception) and not isinstance(error, EstimatorError):
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        """Where the program was when it raised."""
        side = self.side
        sites = {n: m for n, m in self.record.items() if m["type"] != "mutable"}
        after = f"after '{next(reversed(sites))}'" if sites else "before its first site"
        table = format_shapes(sites, title=f"Shapes of the {side}:")
        error.add_note(f"Raised in the {side}, {after}.\n{table}")
        if isinstance(error, TypeError) and "branch outputs must have the same pytree structure" in str(error):
            error.add_note(
                "The branches of a cond return what a site has beside its value, its infer too, which must be the same "
                "in all. Name a site's estimator once, in EstimatorELBO({...}) or by with_estimators(guide, {...})."
            )
        if isinstance(error, _TRACED):
            error.add_note(
                "EstimatorELBO traces guide and model, also outside jax.jit, to see what depends on what. Decide by "
                "jnp.where or jax.lax.cond; or run under `with jax.disable_jit():`, where values are plain numbers."
            )

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if kind == "sample" and msg["name"] in self.params:  # whose value the site has taken
            raise DuplicateName(
                f"site '{msg['name']}': a parameter has the same name. Give the site or the parameter another one."
            )
        if kind == "sample" and self.guide is not None and msg["name"] in self.guide:
            if is_stepwise(self.guide[msg["name"]]) and msg["value"] is None:
                raise _not_stepwise(msg["name"])
            nesting = None if self.layout is None else self.layout.nesting
            _same_shape(msg["name"], self.guide[msg["name"]], msg, nesting)  # before the model works with it
        if _is_severed(msg, self.guide):
            key = key_of(self.key, f"{self.side} {msg['name']}")
            msg["value"], msg["severed"] = msg["fn"].sample(key, msg["kwargs"].get("sample_shape", ())), True
            return
        if kind == "sample" and msg["value"] is None:
            if self.layout is not None:
                msg["value"] = self.layout.around(msg, self.guide)
            elif self.guide is None and marked(msg["infer"], "guide"):
                raise Unplaced(msg["name"])
        if kind == "sample" and msg["value"] is None:
            sample_shape = msg["kwargs"].pop("sample_shape", ())
            if sample_shape:
                msg["fn"] = msg["fn"].expand((*sample_shape, *msg["fn"].batch_shape))
            if msg["kwargs"]["rng_key"] is None:
                msg["kwargs"]["rng_key"] = key_of(self.key, f"{self.side} {msg['name']}")
            msg["value"] = self.draw(msg)
        elif kind == "plate" and msg["value"] is None:
            msg["kwargs"]["rng_key"] = key_of(self.plate_key, f"plate {msg['name']}")
        if kind == "control_flow":
            within(msg, partial(_Within, msg, conduct=self))
            _count_steps(msg)
        if kind in ("prng_key", "control_flow") and msg["kwargs"]["rng_key"] is None:
            self.anonymous += 1
            msg["kwargs"]["rng_key"] = key_of(self.key, f"{self.side} {kind} {self.anonymous}")
            inside: Any = self.handed_over if self.guide is not None else self._inside
            if msg.get("fn") is cond_wrapper and self.guide is not None:  # which replays nothing by itself
                inside = {n: m["value"] for n, m in self.guide.items() if is_latent(m)}
            if kind == "control_flow" and inside is not None:
                msg["kwargs"]["substitute_stack"].append(("substitute", inside))
            if msg.get("fn") is scan_wrapper:
                msg["fn"] = _plain_scan if self.layout is None else partial(self.layout.scan, self.guide, scan_wrapper)

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "control_flow":
            if interpreted():  # a branch that was just called leaves sites that no handler hears of
                msg["value"] = jax.tree.map(lambda x: x, msg["value"])
            self.look_inside(msg)
        if "name" not in msg or "severed" in msg:
            return
        name, kind = msg["name"], msg["type"]
        if {self.kinds.get(name, kind), kind} & {"sample", "deterministic"} and name in self.kinds:
            raise DuplicateName(f"site '{name}': the name is used twice. Give every sample site a name of its own.")
        self.kinds[name] = kind
        _note_size(msg, self.sizes)
        if kind in ("sample", "plate", "mutable"):
            self.record[name] = msg.copy()
            if "time" in msg and kind == "sample":  # a value of the guide's, which was handed over once more
                self.record[name]["value"] = _promoted(msg)

    def _inside(self, msg: Message) -> Array | None:
        """The value of a latent site of the guide inside a scan or a cond, whose handlers are all that hears of it.
        What leaves a step beside its value goes the way of the intermediates, which are stacked."""
        if not is_latent(msg) or msg["value"] is not None:
            return None
        if msg["kwargs"].get("sample_shape"):
            msg["fn"] = msg["fn"].expand((*msg["kwargs"]["sample_shape"], *msg["fn"].batch_shape))
            msg["kwargs"]["sample_shape"] = ()
        inner = msg.copy()
        if self.at:
            inner["step"] = self.at if len(self.at) > 1 else self.at[0]
        else:
            inner["branch"] = True
        value = self.draw(inner)
        along = {k: inner[k] for k in _ALONG if k in inner}
        msg["intermediates"] = {"": inner["intermediates"], **along} if along else inner["intermediates"]
        return value

    def look_inside(self, msg: Message) -> None:
        """The latent sites of NumPyro's scan and cond."""
        traces = jax.tree.leaves(msg["value"], is_leaf=lambda x: isinstance(x, PytreeTrace))
        inside = {n: m for t in traces if isinstance(t, PytreeTrace) for n, m in t.trace.items()}
        if (flow := _flow(msg)) is not None:
            self.scans += 1
            latent = frozenset(n for n, m in inside.items() if is_latent(m) and not is_summed(m))
            scan = Scan(self.scans, *flow, latent)
            for name, inner in inside.items():
                inner["scan"] = scan
                if (within_it := self.inner.get(name)) is not None:
                    its = frozenset(n for n in latent if self.inner.get(n) == within_it)
                    inner["inner"] = within_it._replace(latent=its)
        for inner in inside.values():
            if isinstance(inner.get("intermediates"), dict):
                along = inner["intermediates"]
                inner["intermediates"] = along.pop("")
                inner.update(along)
        for name, inner in inside.items():
            if not is_latent(inner) or is_enumerated(inner):
                continue
            alone = flow is not None and _scans(inner) == 1
            if self.guide is None:
                if marked(inner["infer"], "guide"):
                    if alone and self.layout is None:
                        raise Unplaced(name)
                    if not alone:
                        where = "a cond" if flow is None else "a scan that is inside another one,"
                        raise site_error(
                            name,
                            f'marked infer={{"enumerate": ...}} inside {where} of the guide',
                            "Remove the mark, its estimator then draws it.",
                        )
            elif name not in self.guide:
                _refuse(inner, self.layout, alone)
            elif is_stepwise(self.guide[name]):
                raise _not_stepwise(name)


def in_scans(msg: Message, scans: int) -> int:
    """A site's infer says in how many scans it is, one inside the other, of which no handler outside hears; ``scans``:
    how many there are around the message. Returns their number around what is inside of it."""
    if msg["type"] == "sample":
        scans = max(scans, msg["infer"].get(SCANS, 0))  # one that is deeper inside has said it already
        msg["infer"] = {**msg["infer"], SCANS: scans}
    return scans + (msg["type"] == "control_flow" and msg["fn"] is not cond_wrapper)


class _Within(Messenger):
    """Inside a scan or a cond, whose message is ``flow``, in a run: plates see the elements that their name says, in
    guide and model and at every step; a site says in how many scans it is, and has the guide's value."""

    def __init__(self, flow: Message, fn: Callable[..., Any], *, conduct: _Conduct, above: _Within | None = None):
        self.conduct, self.nested, self.flow = conduct, above is not None, _flow(flow)
        self.scans: int = in_scans(flow, 0 if above is None else above.scans)
        self.at: tuple[Array, ...] = () if above is None else above.at  # the numbers of the steps
        self.inner: Scan | None = None if above is None else above.inner
        if above is not None and self.flow is not None and above.flow is not None and above.scans == 1:
            conduct.scans += 1
            self.inner = Scan(conduct.scans, *self.flow, frozenset())
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.flow is None:
            return super().__call__(*args, **kwargs)
        carry, (number, x) = args
        if self.flow[1] and self.conduct.guide is not None:  # a scan of the model takes values in the order it is run
            number = self.flow[0] - 1 - number
        above = self.at
        self.at = (*above, number)
        try:
            return super().__call__(carry, x, **kwargs)
        finally:
            self.at = above

    def process_message(self, msg: Message) -> None:
        if self.conduct.guide is not None:
            _note_words(msg, self.conduct.asked)
        in_scans(msg, self.scans)
        self.conduct.at = self.at
        if msg["type"] == "control_flow":
            within(msg, partial(_Within, msg, conduct=self.conduct, above=self))
            _count_steps(msg)
        elif msg["type"] == "plate" and msg["value"] is None:
            msg["kwargs"]["rng_key"] = key_of(self.conduct.plate_key, f"plate {msg['name']}")
        drawn = (self.conduct.guide or {}).get(msg.get("name", "")) if self.nested else None
        if drawn is None or is_enumerated(drawn) or _scans(drawn) != len(self.at):
            return
        if is_latent(msg) and msg["value"] is None:  # NumPyro hands it over too, but first looks at a step without
            msg["value"] = drawn["value"][self.at]

    def postprocess_message(self, msg: Message) -> None:
        _note_size(msg, self.conduct.sizes)
        if msg["type"] == "sample":
            self.conduct.inner.setdefault(msg["name"], self.inner)


def _count_steps(msg: Message) -> None:
    """Each step of a scan is told its number."""
    if (flow := _flow(msg)) is not None:
        f, carry, xs, _, reverse = msg["args"]
        msg["args"] = (f, carry, (jnp.arange(flow[0]), xs), flow[0], reverse)


def _scans(msg: Message) -> int:
    """In how many scans a latent site is."""
    return msg["infer"].get(SCANS, 0) if is_latent(msg) else -1


def _promoted(msg: Message) -> Array:
    """The value of all steps, with as many dimensions after these as its distribution has."""
    value, fn, scans = msg["value"], msg["fn"], msg["infer"][SCANS]
    missing = len(fn.batch_shape) + fn.event_dim - jnp.ndim(value)
    return jnp.reshape(value, (*value.shape[:scans], *(1,) * missing, *value.shape[scans:])) if missing > 0 else value


def _note_size(msg: Message, sizes: dict[str, tuple[int, int]]) -> None:
    if msg["type"] == "plate":
        sizes[msg["name"]] = msg["args"][0], jnp.shape(msg["value"])[0]


def within(msg: Message, wrapped: Callable[[Any], Any]) -> None:
    """Wraps the functions that a scan or a cond calls."""
    first, *rest = msg["args"]
    if msg["fn"] is cond_wrapper:
        msg["args"] = (first, *map(wrapped, rest[:2]), *rest[2:])
    else:
        msg["args"] = (wrapped(first), *rest)


class _Dreaming(Messenger):
    """Has observed sites drawn, and takes note of their values."""

    def __init__(self, fn: Callable[..., Any], observations: dict[str, Array]):
        self.observations = observations
        super().__init__(fn)

    def process_message(self, msg: Message) -> None:
        if msg["type"] == "control_flow":  # no handler reaches inside
            within(msg, lambda fn: _Dreaming(fn, {}))
        if msg["type"] != "sample":
            return
        msg["infer"] = {**msg["infer"], "enumerate": None}
        if msg["is_observed"] and not isinstance(unwrapped(msg["fn"]), Unit):
            msg["infer"]["was_observed"], msg["is_observed"], msg["value"] = True, False, None

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["infer"].get("was_observed"):
            self.observations[msg["name"]] = msg["value"]


def turned(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """See `objectives.turned`."""
    return objectives.turned(model, guide, _Dreaming)


def _flow(msg: Message) -> tuple[int, bool] | None:
    """Of a scan: how many steps it has, and whether it runs from the last to the first."""
    if msg["type"] != "control_flow" or msg["fn"] is cond_wrapper:
        return None
    _, _, xs, length, reverse = msg["args"]
    return jnp.shape(jax.tree.leaves(xs)[0])[0] if length is None else length, bool(reverse)


def execute(
    program: Program, keys: Keys, *, draw: Draw, layout: Layout | None = None, handed_over: Draw | None = None
) -> Traces:
    """Run the guide, then the model (unless it is None) on the guide's values. ``layout``: where values of enumerated
    sites go; a run that finds it needs one raises `Unplaced`. ``handed_over``: what takes the place of the guide's
    values inside scans of the model."""
    traces, (model, guide, args, kwargs, params, key, allowed) = Traces(), program
    draw = promoting()(draw)
    with promoting(allowed), _Conduct(keys.key, key, draw, traces.guide, traces.sizes["guide"], params, layout=layout):
        substitute(guide, data=dict(params))(*args, **kwargs)
    if model is not None:
        own = {**params, **{n: m["value"] for n, m in traces.guide.items() if m["type"] == "mutable"}}
        refuse = partial(_refuse, layout=layout)
        conduct = _Conduct(
            keys.key, key, refuse, traces.model, traces.sizes["model"], params,
            guide=traces.guide, layout=layout, handed_over=handed_over,
        )  # fmt: skip
        with promoting(allowed), conduct:
            kinds = ("sample", "plate")
            drawn = {n: m for n, m in traces.guide.items() if m["type"] in kinds and not is_stepwise(m)}
            _Replay(substitute(model, data=own), drawn, conduct.asked)(*args, **kwargs)
        traces.asked = conduct.asked
        _same_sizes(traces)
    if layout is not None and layout.nesting is not None:
        cells = [
            {n: cell(side, m, _scaled_plates(m, traces), layout) for n, m in record.items() if m["type"] == "sample"}
            for side, record in (("guide", traces.guide), ("model", traces.model))
        ]
        traces.values = Enumeration(*cells)
    return traces


def _plain_scan(*args: Any, **kwargs: Any) -> Any:
    """NumPyro's own. Where it sums over values, what is carried may be less at first than at the end of a step; so it
    may here, where nobody knows yet that there is a sum."""
    try:
        return scan_wrapper(*args, **kwargs)
    except TypeError as error:
        if "carry" in str(error):
            raise Unplaced("(in a scan)") from error
        raise


def _not_stepwise(name: str) -> EstimatorError:
    return site_error(
        name,
        "enumerated in a scan of the guide, and the model draws it outside of one, or in a scan inside another",
        "Draw it in a scan of the model too, or remove the mark.",
    )


def _refuse(msg: Message, layout: Layout | None, summable: bool = True) -> Any:
    """A latent site of the model that the guide lacks."""
    if layout is not None and layout.nesting is None:  # only to look
        return msg["fn"].sample(msg["kwargs"]["rng_key"]) if msg["value"] is None else msg["value"]
    raise Unplaced(msg["name"]) if layout is None else missing(msg["name"], summable and countable(msg["fn"]))


def _same_sizes(traces: Traces) -> None:
    """Plates of guide and model agree on their size, and on that of the subsample."""
    guide, model = traces.sizes["guide"], traces.sizes["model"]
    for name in guide.keys() & model.keys():
        if guide[name] != model[name]:
            sizes = [f"{elements} of {size} elements" for size, elements in (guide[name], model[name])]
            raise EstimatorError(
                f"plate '{name}': {sizes[0]} in the guide, {sizes[1]} in the model. Give both the same size and "
                "subsample_size."
            )


def is_latent(msg: Message) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"]


def _same_shape(name: str, guide: Message, model: Message, nesting: int | None) -> None:
    """``nesting``: how many batch dimensions there are that hold no enumerated values."""
    if not is_latent(guide) or not is_latent(model):
        return
    events = [m["fn"].event_dim for m in (guide, model)]
    if events[0] != events[1]:
        raise site_error(
            name,
            f"{events[0]} event dimensions in the guide, {events[1]} in the model",
            "Use .to_event(n) on both sides alike, and plates for dimensions that are independent.",
        )
    shapes = [tuple(m["fn"].shape(m["kwargs"].get("sample_shape") or ())) for m in (guide, model)]
    if nesting is not None:
        shapes = [s[max(0, len(s) - events[0] - nesting) :] for s in shapes]
    if any(a != b for a, b in zip_longest(*map(reversed, shapes), fillvalue=1)):
        fact = f"shape {shapes[0]} in the guide, {shapes[1]} in the model"
        raise site_error(name, fact, "Draw it in the same shape on both sides.")


def terms_of(
    traces: Traces,
    depends_on: Mapping[tuple[str, str], frozenset[str]] | None = None,
    relaxed: frozenset[str] = frozenset(),
    hard: frozenset[str] = frozenset(),
    only: frozenset[str] | None = None,
) -> list[Term]:
    """Every cost term, scaled and masked: log p of the model's sites, then -log q of the guide's.

    ``relaxed`` names the latent sites whose values are relaxed, or carry a gradient that a discrete log probability
    would drop; ``hard`` those whose -log q is differentiated in the value only; ``only`` restricts to terms that
    depend on one of these sites.
    """
    otherwise = frozenset() if depends_on is None else frozenset(traces.latents())
    return _LogProbs(traces, relaxed, hard).terms(depends_on or {}, otherwise, only)


def tables_of(traces: Traces) -> Tables:
    """What the posterior of enumerated values is made of."""
    return _LogProbs(traces).tables()


@dataclass(frozen=True)
class _LogProbs(LogProbs):
    """See `terms_of`."""

    traces: Traces
    relaxed: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()

    ops = OPS

    def log_prob(self, side: str, name: str, msg: Message) -> Array:
        fn = jax.lax.stop_gradient(msg["fn"]) if side == "guide" and name in self.hard else msg["fn"]
        if name in self.relaxed:
            return relaxed_log_prob(name, side, fn, msg["value"])
        parts = [
            log_p_of_all(m["fn"], m["value"], m["enumerated"], masked=not is_summed(m))
            if is_enumerated(m)
            else cost_log_prob(m["fn"], m["value"], m["intermediates"])
            for m in steps_of({**msg, "fn": fn})
        ]
        return in_turn(parts, "time" in msg and msg["time"].reverse)

    def factor(self, msg: Message, log_p: Array) -> Array:
        return log_p  # masked already

    def scaled(self, msg: Message, log_p: Array) -> Array:
        return scale_and_mask(log_p, msg["scale"])

    def failed(self, side: str, name: str, record: Mapping[str, Message], error: Exception) -> None:
        if not isinstance(error, (ValueError, TypeError, ArithmeticError)):
            return
        said = str(error).strip().split("\n")[0].rstrip(".")
        raise EstimatorError(
            f"site '{name}': its log probability in the {side} fails ({type(error).__name__}: {said}). Compare the "
            f"shapes of its distribution and its value:\n{format_shapes(record, title=f'Shapes of the {side}:')}"
        ) from error

    def log_q(self, name: str) -> Array:
        msg = self.traces.guide[name]
        parts = [log_p_of_all(m["fn"], m["value"], m["enumerated"]) for m in steps_of(msg)]
        return in_turn(parts, "time" in msg and msg["time"].reverse)

    def support(self, msg: Message) -> Array | None:
        return support(msg["fn"]) if is_enumerated(msg) else None


def _scaled_plates(msg: Message, traces: Traces) -> frozenset[Plate]:
    plates = set()
    for f in msg["cond_indep_stack"]:
        full, _ = traces.sizes["model"].get(f.name) or traces.sizes["guide"].get(f.name) or (f.size, f.size)
        plates.add(Plate(f.name, f.dim, f.size, full / f.size))
    return frozenset(plates)


def view(msg: Message, traces: Traces | None = None) -> Site:
    """The site's facts and arrays, from its message."""
    plates = plates_of(msg) if traces is None else _scaled_plates(msg, traces)
    if traces is not None and traces.values is not None:
        plates |= traces.values.guide[msg["name"]].values
    return describe(msg["name"], msg["fn"], plates, msg["scale"], msg["infer"], msg["value"])


def interpreted() -> bool:
    """Is the program run by Python, step by step, under ``jax.disable_jit``?"""
    return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]  # set when jax is imported
