"""Running guide and model once: which value every latent site takes, and the cost terms that result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, substitute
from numpyro.primitives import Messenger

from ..core.errors import EstimatorError, site_error
from ..core.site import Plate, Site, Term
from .distributions import cost_log_prob, describe, relaxed_log_prob

Array = Any
Message = dict[str, Any]

#: value and intermediates of a latent site, from its message and its key
Draw = Callable[[Message, Array], tuple[Array, list[Any]]]


@dataclass
class Traces:
    """Messages of one run, by site name in order of appearance."""

    guide: dict[str, Message] = field(default_factory=dict)
    model: dict[str, Message] = field(default_factory=dict)

    def latents(self) -> dict[str, Message]:
        return {n: m for n, m in self.guide.items() if m["type"] == "sample" and not m["is_observed"]}

    def mutable(self) -> dict[str, Array]:
        both = {**self.guide, **self.model}
        return {n: m["value"] for n, m in both.items() if m["type"] == "mutable"}


class Keys:
    """The random keys of one particle: one per site name, so every run of it draws a site from the same noise.

    Those of ``names``, the latent sites of the guide as far as they are known, come out of one operation: XLA makes a
    loop of each fold, and a loop for each site would be most of what it has to compile.
    """

    def __init__(self, key: Array, names: Sequence[str] = ()):
        self.guide, self.model = jax.random.split(key)
        self._names = {name: i for i, name in enumerate(names)}
        self._of_sites = _site_keys(self.guide, names) if names else None
        self.known = dict(zip(names, self._of_sites, strict=True)) if names else {}
        self.noise: dict[tuple[str, str], Array] = {}  # what was drawn already, by site and label

    def folded(self, names: Sequence[str], number: int) -> Array:
        """The keys of ``names`` for their noise number ``number``, ``[len(names)]``."""
        keys = self._of_sites[np.array([self._names[n] for n in names])]
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)


def _words(name: str) -> list[int]:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return [int.from_bytes(word, "big") for word in (digest[:4], digest[4:])]


def site_key(key: Array, name: str) -> Array:
    for word in _words(name):
        key = jax.random.fold_in(key, word)
    return key


def _site_keys(key: Array, names: Sequence[str]) -> Array:
    """`site_key` of every name."""
    words = np.array([_words(name) for name in names], np.uint32)
    return jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(key, w[0]), w[1]))(words)


def plates_of(msg: Message) -> frozenset[Plate]:
    return frozenset(Plate(f.name, f.dim, f.size) for f in msg["cond_indep_stack"])


class _Conduct(Messenger):
    """Gives out keys by name, asks ``draw`` for the values of latent sites, records every site."""

    def __init__(
        self,
        key: Array,
        plate_key: Array,
        draw: Draw,
        record: dict[str, Message],
        known: Mapping[str, Array] | None = None,
        in_scan: Any = None,
    ):
        self.key, self.plate_key, self.draw, self.record, self.in_scan = key, plate_key, draw, record, in_scan
        self.known = known or {}
        self.anonymous = 0
        super().__init__()

    def process_message(self, msg: Message) -> None:
        kind = msg["type"]
        if kind == "sample" and msg["value"] is None:
            sample_shape = msg["kwargs"].pop("sample_shape", ())
            if sample_shape:
                msg["fn"] = msg["fn"].expand((*sample_shape, *msg["fn"].batch_shape))
            if msg["kwargs"]["rng_key"] is None:
                name = msg["name"]
                msg["kwargs"]["rng_key"] = self.known[name] if name in self.known else site_key(self.key, name)
            msg["value"], msg["intermediates"] = self.draw(msg, msg["kwargs"]["rng_key"])
        elif kind == "plate" and msg["value"] is None:
            msg["kwargs"]["rng_key"] = site_key(self.plate_key, msg["name"])
        elif kind in ("prng_key", "control_flow") and msg["kwargs"]["rng_key"] is None:
            self.anonymous += 1
            msg["kwargs"]["rng_key"] = site_key(self.key, f"{kind} {self.anonymous}")
            if kind == "control_flow" and self.in_scan is not None:
                msg["kwargs"]["substitute_stack"].append(("substitute", self.in_scan))

    def postprocess_message(self, msg: Message) -> None:
        if "name" not in msg or msg["type"] not in ("sample", "plate", "mutable"):
            return
        name = msg["name"]
        if name in self.record and msg["type"] == "sample":
            raise EstimatorError(f"site '{name}': the name is used twice. Give every sample site a name of its own.")
        self.record[name] = msg.copy()


def execute(
    keys: Keys,
    plate_key: Array,
    params: Mapping[str, Array],
    model: Callable[..., Any] | None,
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    draw: Draw,
    in_scan: Callable[[Message], Any] | None = None,
) -> Traces:
    """Run the guide, then the model on the guide's values (unless ``model`` is None)."""
    traces = Traces()
    with _Conduct(keys.guide, plate_key, draw, traces.guide, keys.known, in_scan):
        substitute(guide, data=dict(params))(*args, **kwargs)
    if model is not None:
        own = {**params, **{n: m["value"] for n, m in traces.guide.items() if m["type"] == "mutable"}}
        with _Conduct(keys.model, plate_key, _refuse, traces.model):
            replay(substitute(model, data=own), trace=traces.guide)(*args, **kwargs)
    _subsampling(traces)
    return traces


def _refuse(msg: Message, key: Array) -> Any:
    if msg["infer"].get("enumerate"):
        raise enumerated(msg["name"])
    raise site_error(
        msg["name"],
        "a latent site of the model that the guide does not draw",
        "Add a site of this name to the guide (with Enumerate(), a discrete one is summed out exactly given its "
        "parents), observe it with obs=..., or marginalise it in the model.",
    )


def enumerated(name: str) -> EstimatorError:
    return site_error(
        name,
        'marked infer={"enumerate": ...}, which EstimatorELBO does not sum out',
        'Remove the mark and choose the estimator Enumerate() for this site: EstimatorELBO({"' + name + '": '
        "Enumerate()}), or use TraceEnum_ELBO.",
    )


def _subsampling(traces: Traces) -> None:
    """Plates of guide and model agree on their size; each learns its N/B."""
    for name, msg in traces.model.items():
        twin = traces.guide.get(name)
        if msg["type"] == "plate" and twin is not None and jnp.shape(twin["value"]) != jnp.shape(msg["value"]):
            raise EstimatorError(
                f"plate '{name}': {jnp.shape(twin['value'])[0]} elements in the guide, "
                f"{jnp.shape(msg['value'])[0]} in the model. Give both the same size and subsample_size."
            )


def terms_of(
    traces: Traces,
    depends_on: Mapping[tuple[str, str], frozenset[str]] | None = None,
    relaxed: frozenset[str] = frozenset(),
    hard: frozenset[str] = frozenset(),
) -> list[Term]:
    """Every cost term, scaled and masked: log p of the model's sites, then -log q of the guide's.

    ``relaxed`` names the latent sites whose values are relaxed, or carry a gradient that a discrete log probability
    would drop; ``hard`` those whose -log q is differentiated in the value only.
    """
    terms = []
    for side, sign, record in (("model", 1, traces.model), ("guide", -1, traces.guide)):
        for name, msg in record.items():
            if msg["type"] == "sample":
                fn = jax.lax.stop_gradient(msg["fn"]) if side == "guide" and name in hard else msg["fn"]
                log_p = (
                    _relaxed_log_prob(name, fn, msg["value"], side)
                    if name in relaxed
                    else cost_log_prob(fn, msg["value"], msg["intermediates"])
                )
                log_p = scale_and_mask(log_p, msg["scale"])
                deps = frozenset() if depends_on is None else depends_on[side, name]
                terms.append(Term(side, name, log_p if sign > 0 else -log_p, _scaled_plates(msg, traces), deps))
    return terms


def _relaxed_log_prob(name: str, fn: Any, value: Array, side: str) -> Array:
    log_p = relaxed_log_prob(fn, value)
    if log_p is None:
        raise site_error(
            name,
            f"its {side} distribution {type(fn).__name__} has no log probability at relaxed values",
            "Use a Bernoulli or one-hot categorical there, RELAX() without the model term, or "
            "Reinforce(LeaveOneOut()).",
        )
    return log_p


def _scaled_plates(msg: Message, traces: Traces) -> frozenset[Plate]:
    plates = set()
    for f in msg["cond_indep_stack"]:
        plate = traces.model.get(f.name) or traces.guide.get(f.name)
        full = plate["args"][0] if plate is not None and plate["type"] == "plate" else f.size
        plates.add(Plate(f.name, f.dim, f.size, full / f.size))
    return frozenset(plates)


def view(msg: Message, traces: Traces | None = None) -> Site:
    """The site's facts and arrays, from its message."""
    plates = plates_of(msg) if traces is None else _scaled_plates(msg, traces)
    return describe(msg["name"], msg["fn"], plates, msg["scale"], msg["infer"], msg["value"])
