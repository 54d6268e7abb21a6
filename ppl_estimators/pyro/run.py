"""Running guide and model once: which value every latent site takes, and the cost terms that result."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from ..core import families, objectives
from ..core.enumeration import Enumeration, Unplaced, marked, missing
from ..core.errors import EstimatorError, site_error
from ..core.plan import words
from ..core.posterior import Tables
from ..core.site import Plate, Site, Term
from ..core.terms import LogProbs
from .dependencies import Provenance, Sites
from .distributions import constant, describe, family, is_masked, log_q, relaxed_log_prob, unmasked, unwrapped
from .enumeration import Layout, cell, countable, declared, is_enumerated, is_summed, support
from .ops import OPS
from .particles import PARTICLES
from .randomness import Stream

Array = torch.Tensor
Message = dict[str, Any]

#: value of a latent site, from its message
Draw = Callable[[Message], Array]


@dataclass
class Traces:
    """Messages of one run, by site name in order of appearance; ``values`` if some take all their values."""

    guide: dict[str, Message] = field(default_factory=dict)
    model: dict[str, Message] = field(default_factory=dict)
    subsamples: dict[str, Array] = field(default_factory=dict)
    values: Enumeration | None = None
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def latents(self) -> dict[str, Message]:
        """Sites whose value was drawn."""
        return {n: m for n, m in self.guide.items() if not m["is_observed"] and not is_enumerated(m)}

    def own_terms(self) -> list[tuple[str, str]]:
        """Side and name of every cost term."""
        model = self.model if self.values is None else dict.fromkeys(self.values.term("model", n) for n in self.model)
        return [*(("model", n) for n in model), *(("guide", n) for n in self.guide)]

    def plates(self, side: str, term: str) -> frozenset[Plate]:
        """Of a cost term."""
        if self.values is not None:
            return self.values.plates(side, term)
        return plates_of((self.model if side == "model" else self.guide)[term])


def plates_of(msg: Message) -> frozenset[Plate]:
    """The axes along which elements are apart: plates, and values that the guide enumerates."""
    if "scope" in msg:
        return declared(msg) | cell(msg).values
    if "plates" not in msg:
        msg["plates"] = declared(msg)
    plates: frozenset[Plate] = msg["plates"]
    return plates


class ProgramError(EstimatorError, RuntimeError):
    """Something in guide or model that the stock ELBOs meet with a ValueError or a RuntimeError."""


def _is_severed(msg: Message, guide: Mapping[str, Message] | None) -> bool:
    """Is it a latent site of the model whose value goes nowhere, since `do` has put another in its place?"""
    return guide is not None and "_intervener_id" in msg and msg["name"] not in guide


class _Conduct(Messenger):
    """Asks ``draw`` for the values of latent sites, records every site, shares the minibatch between runs."""

    def __init__(
        self,
        side: str,
        draw: Draw,
        record: dict[str, Message],
        subsamples: dict[str, Array],
        provenance: Provenance | None,
        stream: Stream | None,
        layout: Layout | None,
        guide: Mapping[str, Message] | None = None,
    ):
        super().__init__()
        self.guide = guide  # what it drew, for a run of the model
        self.side, self.draw, self.record = side, draw, record
        self.subsamples, self.provenance, self.stream, self.layout = subsamples, provenance, stream, layout
        self.parameters: dict[str, Message] = {}
        self.indexed: set[str] = set()  # plates whose elements the program chose itself
        self.asked: dict[str, dict[str, Any]] = {}  # by latent sites of the model

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, Exception) and not isinstance(error, EstimatorError):
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        """Where the program was when it raised, and why it may see other shapes than it was written for."""
        after = f"after site '{next(reversed(self.record))}'" if self.record else "before its first site"
        where = f"Raised in the {self.side}, {after}.\n{shapes(self.record, self.parameters)}"
        if any(f.name == PARTICLES for msg in self.record.values() for f in msg["cond_indep_stack"]):
            where += (
                "\nAll particles run at once (vectorize_particles=True): values have an axis more, in front. Leave it "
                "out, or write z[..., 0] for z[0], torch.where(z > 0, ...) for `if z:`, z @ w for torch.mv(w.T, z)."
            )
        if type(error) in (ValueError, RuntimeError):
            error.args = (f"{error}\n{where}",)  # as the stock ELBOs do
        else:
            error.add_note(where)

    def _pyro_sample(self, msg: Message) -> None:
        if self.stream is not None:
            self.stream.before((self.side, msg["name"]))
        if site_is_subsample(msg):
            if msg["value"] is None and msg["name"] in self.subsamples:
                msg["value"], msg["done"] = self.subsamples[msg["name"]], True
            elif msg["value"] is not None:
                self.indexed.add(msg["name"])
            return
        if msg["infer"] and self.side == "model" and not msg["is_observed"] and (said := words(msg["infer"])):
            self.asked[msg["name"]] = said
        latent = not (msg["is_observed"] or msg["done"])
        if latent and _is_severed(msg, self.guide):
            msg["value"], msg["done"], msg["severed"] = msg["fn"].sample(), True, True
            return
        if latent and self.layout is None and self.side == "guide" and marked(msg["infer"], "guide"):
            raise Unplaced(msg["name"])
        if self.provenance is not None and not latent and is_enumerated(msg):
            self.provenance.adopt(msg["value"])  # all there are, whatever was drawn
        if self.provenance is not None:
            self._followed(msg, self.provenance, latent)
        elif latent:
            msg["value"], msg["done"] = self.draw(msg), True

    def _followed(self, msg: Message, follow: Provenance, latent: bool) -> None:
        follow.leave()
        try:
            deps, clear = follow.distribution(msg["fn"])  # before the draw, which caches tensors inside of it
            if latent:
                follow.before_draw()
                before = follow.drawn
                with nullcontext() if clear else follow.again():
                    msg["value"], msg["done"] = self.draw(msg), True
                deps |= follow.drawn & ~before  # a distribution may itself draw: a network with random weights
                if msg["name"] not in follow.order and not is_enumerated(msg):  # the model only replays
                    if not clear:
                        deps |= follow.behind((msg["value"],))
                    follow.drawn_at(msg["name"], msg["fn"], msg["value"], deps)
            if not clear:
                deps |= self._observed_log_prob(msg, follow)
            msg["behind"] = deps | follow.behind((msg["value"], msg["scale"], msg["mask"]))
        finally:
            follow.resume()

    @staticmethod
    def _observed_log_prob(msg: Message, follow: Provenance) -> Sites:
        """What a term depends on whose distribution, the user's own, may compute it from anything: watch it do so."""
        try:
            with follow.again():
                msg["log_p"] = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        except Exception:  # it will be raised where the term is wanted
            return follow.drawn
        return follow.behind((msg["log_p"],))

    def _pyro_post_param(self, msg: Message) -> None:
        if msg["name"] in self.record:
            raise _clash(msg["name"], self.side)
        self.parameters[msg["name"]] = msg
        follow = self.provenance
        if follow is not None and follow.order and msg["name"] not in follow.stored:
            follow.leave()
            follow.parameter(msg["name"], msg["value"])
            follow.resume()

    def _pyro_post_sample(self, msg: Message) -> None:
        name, draws = msg["name"], self.side == "guide" and not msg["is_observed"]
        if "severed" in msg:
            return
        if site_is_subsample(msg):
            draws = True
            self.subsamples.setdefault(name, msg["value"])
            if self.provenance is not None:
                self.provenance.adopt(msg["value"])
        elif name in self.record:
            raise ProgramError(f"site '{name}': the name is used twice. Give every sample site a name of its own.")
        elif name in self.parameters:
            raise _clash(name, self.side)
        else:
            if self.side == "guide":
                _check_factor(msg)
            self.record[name] = msg.copy()
        if self.stream is not None and draws:
            self.stream.after((self.side, name))


def _clash(name: str, side: str) -> ProgramError:
    return ProgramError(
        f"site '{name}': the {side} has a parameter of the same name. Rename one of them, the parameter for example: "
        f'pyro.param("{name}_param", ...).'
    )


def _check_factor(msg: Message) -> None:
    fn = unwrapped(msg["fn"])
    if isinstance(fn, Unit) and fn.__dict__.get("has_rsample") is False:
        raise site_error(
            msg["name"],
            "a factor of the guide with has_rsample=False asks for the score of values that were drawn by hand, and "
            "what they move is not known",
            "Draw them by pyro.sample (auxiliary ones with infer={'is_auxiliary': True}) and leave the factor out; or "
            "pass has_rsample=True if it was computed from reparameterised draws or from sample sites.",
        )


def traced(record: Mapping[str, Message], parameters: Mapping[str, Message] | None = None) -> Trace:
    """The messages of a run, as Pyro's own tools take them."""
    trace = Trace()
    for name, msg in {**(parameters or {}), **record}.items():
        trace.add_node(name, **msg)
    return trace


def shapes(record: Mapping[str, Message], parameters: Mapping[str, Message] | None = None) -> str:
    """The table of shapes that the stock ELBOs print."""
    table: str = traced(record, parameters).format_shapes()
    return table


class _Dreaming(Messenger):
    """Has observed sites drawn, and takes note of their values."""

    def __init__(self, observations: dict[str, Array]):
        super().__init__()
        self.observations = observations

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        msg["infer"] = {**msg["infer"], "enumerate": None}
        if msg["is_observed"] and not isinstance(unwrapped(msg["fn"]), Unit):
            msg["infer"]["was_observed"] = True
            msg["is_observed"], msg["done"], msg["value"] = False, False, None

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["infer"].get("was_observed"):
            self.observations[msg["name"]] = msg["value"]


def turned(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """See `objectives.turned`."""
    return objectives.turned(model, guide, lambda model, observations: _Dreaming(observations)(model))


def execute(
    model: Callable[..., Any] | None,
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    draw: Draw,
    subsamples: dict[str, Array],
    provenance: Provenance | None = None,
    stream: Stream | None = None,
    observes: bool = False,
    layout: Layout | None = None,
    above: Traces | None = None,
) -> Traces:
    """Run the guide, then the model on the guide's values (unless ``model`` is None).

    ``stream``: keeps the generators, at every site, where they were in the particle's first run. ``observes``: the
    guide is a `GuideMessenger`, which runs the model; its observed sites are the model's. ``layout``: where values of
    enumerated sites go; a run that finds it needs one raises `Unplaced`. ``above``: a run whose guide does the same but
    for the values of ``draw``, and is not run again.
    """
    traces = Traces(subsamples=subsamples)
    if provenance is not None:
        provenance.begin((guide, model), (args, kwargs))
    if layout is not None:
        guide, model = layout.around(guide, model, traces.guide)
    if above is not None:
        latents = above.latents()
        traces.guide |= {n: {**m, "value": draw(m)} if n in latents else dict(m) for n, m in above.guide.items()}
    else:
        with _Conduct("guide", draw, traces.guide, subsamples, provenance, stream, layout):
            guide(*args, **kwargs)
    if observes:
        for name in [n for n, m in traces.guide.items() if m["is_observed"]]:
            del traces.guide[name]

    def replay(msg: Message) -> Array:
        drawn = traces.guide.get(msg["name"])
        if drawn is None or drawn["is_observed"]:
            raise Unplaced(msg["name"]) if layout is None else missing(msg["name"], countable(msg["fn"]))
        msg["infer"] = drawn["infer"]
        if layout is not None:
            layout.handed(msg, drawn)
        value: Array = drawn["value"]
        return value if provenance is None or layout is not None else provenance.handed(value)

    if model is not None:
        if provenance is not None:
            provenance.hand_over()
        if stream is not None:
            stream.before(("model", ""))  # all of it
        with _Conduct("model", replay, traces.model, subsamples, provenance, stream, layout, traces.guide) as conduct:
            model(*args, **kwargs)
        traces.asked = conduct.asked
        if provenance is not None and subsamples:
            _check_minibatches(traces, conduct.indexed)
    if layout is not None:
        traces.values = Enumeration(*({n: cell(m) for n, m in r.items()} for r in (traces.guide, traces.model)))
    return traces


def _check_minibatches(traces: Traces, indexed: Container[str]) -> None:
    """Elements of a plate that guide or model subsamples must be those of the other; ``indexed``: plates whose elements
    the model names."""
    sizes = {f.name: f.full_size for msg in traces.model.values() for f in msg["cond_indep_stack"]}
    for name, msg in traces.latents().items():
        for frame in msg["cond_indep_stack"]:
            random = frame.name in traces.subsamples and frame.size != frame.full_size
            taken = frame.name in traces.subsamples and frame.name not in indexed  # by the model, from the guide
            if (random or taken) and sizes.get(frame.name, frame.full_size) != frame.full_size:
                raise site_error(
                    name,
                    f"plate '{frame.name}' has {frame.full_size} elements in the guide and {sizes[frame.name]} in the "
                    "model",
                    "Give both the same size and subsample_size.",
                )
            if random and frame.name not in sizes and name in traces.model:
                inside = [f.name for f in traces.model[name]["cond_indep_stack"]]
                there = f"in plate {', '.join(map(repr, inside))}" if inside else "in no plate"
                raise site_error(
                    name,
                    f"the guide draws it in plate '{frame.name}', a random {frame.size} of {frame.full_size} elements, "
                    f"and the model has it {there}: the two would speak of different elements",
                    "Give the plate the same name in guide and model, or pass both the same subsample=indices.",
                )


def terms_of(
    traces: Traces,
    depends_on: Mapping[tuple[str, str], frozenset[str]],
    relaxed: frozenset[str] = frozenset(),
    score_only: frozenset[str] = frozenset(),
    only: frozenset[str] | None = None,
    local: frozenset[str] = frozenset(),
    hard: frozenset[str] = frozenset(),
) -> list[Term]:
    """Every cost term, scaled and masked: log p of the model's sites, then -log q of the guide's.

    ``relaxed`` names the latent sites whose values are relaxed, or carry a gradient that a discrete log probability
    would drop; ``score_only`` those whose -log q needs no gradient
    (its log_q is computed once, for the score too, and left in the message); ``only`` restricts to terms that depend
    on one of these sites, terms of a branch not taken before included; ``local`` names the score sites, whose values
    no transform may invert from its cache; ``hard`` those whose -log q is differentiated in the value only.
    """
    found = _LogProbs(traces, relaxed, score_only, local, hard)
    return found.terms(depends_on, only or frozenset(), only)


def tables_of(traces: Traces) -> Tables:
    """What the posterior of enumerated values is made of."""
    return _LogProbs(traces).tables()


@dataclass(frozen=True)
class _LogProbs(LogProbs):
    """See `terms_of`."""

    traces: Traces
    relaxed: frozenset[str] = frozenset()
    score_only: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()

    ops = OPS

    def log_prob(self, side: str, name: str, msg: Message) -> Array:
        fn, value = msg["fn"], msg["value"]
        followed = msg.pop("log_p", None)
        log_p: Array
        if is_summed(msg):
            fn, followed = unmasked(fn), None
        if side == "guide" and name in self.hard:
            fn, followed = constant(fn), None
        if name in self.relaxed:
            return relaxed_log_prob(name, side, fn, value)
        if side == "guide" and name in self.score_only and family(fn) in families.DISCRETE and not is_masked(fn):
            log_p = msg["log_q"] = log_q(fn, value)
            return log_p.detach()
        if side == "guide" and name in self.local:
            value, followed = value.clone(), None
        log_p = fn.log_prob(value, *msg["args"], **msg["kwargs"]) if followed is None else followed
        return log_p

    def factor(self, msg: Message, log_p: Array) -> Array:
        msg["log_prob"] = scale_and_mask(log_p, mask=None if is_summed(msg) else msg["mask"])
        return msg["log_prob"]

    def scaled(self, msg: Message, log_p: Array) -> Array:
        msg["log_prob"] = scale_and_mask(log_p, msg["scale"], msg["mask"])
        return msg["log_prob"]

    def failed(self, side: str, name: str, record: Mapping[str, Message], error: Exception) -> None:
        what = f"site '{name}': an error while the {side} computed its log_prob"
        if type(error) in (ValueError, RuntimeError):
            raise ProgramError(f"{what}:\n{error}\n{shapes(record)}") from error
        error.add_note(f"{what}.\n{shapes(record)}")

    def log_q(self, name: str) -> Array:
        msg = self.traces.guide[name]
        return log_q(msg["fn"], msg["value"])

    def one_by_one(self, msg: Message) -> str | None:
        frames = (f for f in msg["cond_indep_stack"] if f.dim is None)
        return next((f.name for f in frames if f.full_size not in (None, f.size)), None)

    def support(self, msg: Message) -> Array | None:
        return support(msg["fn"]) if is_enumerated(msg) else None


def view(msg: Message) -> Site:
    """The site's facts and arrays, from its message."""
    return describe(msg["name"], msg["fn"], plates_of(msg), msg["scale"], msg["infer"], msg["value"])
