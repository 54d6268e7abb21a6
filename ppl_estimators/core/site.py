"""Sites, cost terms and plates, as the core sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

from . import families
from .ops import Array, Ops


class Plate(NamedTuple):
    """An axis whose elements are apart: ``dim`` counts batch dimensions from the right (-1 is the last).

    A vectorised plate; or the ``values`` of a site of the guide that is enumerated, whose elements are alternatives to
    each other. Costs along these are weighted by their probabilities, and then summed like all others. Of a site in a
    scan they are those ``ago`` steps before: a step's own are 0 steps ago, and after the scan those of its ``last``.
    """

    name: str
    dim: int
    size: int
    scale: float = 1.0  # full size / size, the N/B of subsampling
    values: bool = False
    ago: int | None = None
    last: bool = False

    @property
    def of_step(self) -> bool:
        """Are they those of one step, and others in the next?"""
        return self.ago is not None and not self.last


class Window(NamedTuple):
    """The steps of a term that a step of a site moves: from that which is ``first`` steps later (earlier, if negative)
    to that which is ``last`` steps later. ``flipped``: the steps of the term are counted from the other end.
    ``inner``: the same of a scan inside of each step, for what is in the same one; None if it may be any of its steps.
    """

    first: float
    last: float
    flipped: bool = False
    inner: Window | None = None

    def then(self, other: Window) -> Window:
        """What moves, if what this one holds moves what the other does."""
        if self.first > self.last or other.first > other.last:
            return NO_STEP
        first, last = max(self.first, -other.last), min(self.last, -other.first)  # by these and back
        inner = NO_STEP if first > last else None
        if first == last == 0:
            inner = self.inner and other.inner and self.inner.then(other.inner)
        return Window(self.first + other.first, self.last + other.last, inner=inner)

    def joined(self, other: Window) -> Window:
        """Both, and what is between."""
        inner = self.inner and other.inner and self.inner.joined(other.inner)
        return Window(min(self.first, other.first), max(self.last, other.last), inner=inner)

    def endless(self, before: Window) -> Window:
        """Where it is more than ``before`` there is no end of it."""
        return Window(
            self.first if self.first >= before.first else -math.inf,
            self.last if self.last <= before.last else math.inf,
            inner=self.inner and before.inner and self.inner.endless(before.inner),
        )


NO_STEP = Window(math.inf, -math.inf)


@dataclass
class Term:
    """One cost term of the ELBO: log p or -log q of one site, scaled and masked.

    ``value`` has shape ``[*batch]``; ``depends_on`` names every latent site of the guide that can move it;
    ``side`` is "model" or "guide".
    """

    side: str
    site: str
    value: Array
    plates: frozenset[Plate]
    depends_on: frozenset[str]
    #: along values that the guide enumerates: the cost itself, and their probability, whose product is ``value``
    cost: Array = None
    weight: Array = None
    #: a plate of which a step sees a part, one element after another
    one_by_one: str | None = None

    def fixed(self, ops: Ops) -> Term:
        """Its own gradient dropped; that of the probabilities of enumerated values stays."""
        if self.weight is None:
            value = ops.stop_gradient(self.value)
            return self if value is self.value else replace(self, value=value)
        return weighed(ops, replace(self, value=ops.stop_gradient(self.cost)), self.weight)


def weighed(ops: Ops, term: Term, weight: Array) -> Term:
    """A term whose value is a cost for each enumerated value, times their probability; what is impossible costs 0."""
    cost = ops.where(weight > 0, term.value, ops.zeros_like(weight))
    return replace(term, value=weight * cost, cost=cost, weight=weight)


@dataclass
class Site:
    """A latent site of the guide: facts, and the arrays of its distribution.

    Arrays carry ``lead`` axes in front of the batch shape: none while a particle is drawn, one (the particles,
    ``K``) when local gradients are assembled.
    """

    name: str
    distribution: str
    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: frozenset[Plate]
    reparameterised: bool = False
    support_moves: bool = False  # where the support ends depends on parameters, or on pathwise draws
    #: plates of the guide that a cost couples, for an estimator of single elements: not in ``plates``, so that their
    #: elements count as dependent
    coupled: frozenset[Plate] = frozenset()
    time: int = 0  # drawn inside so many scans: leading batch axes of steps, each with its own parents and its own cost
    turns: int = 1  # in so many evaluations do the steps of a scan take another value, some at a time
    scale: Any = 1.0
    logits: Array = None
    named: Mapping[str, Array] = field(default_factory=dict)  # distribution parameters by name, [*lead, *batch, ...]
    law: Any = None  # the library's distribution of one element: `cdf(z)`, `log_prob(z)`, `slope(z)`, `event_shape`
    log_q: Array = None  # log q(stop(value)), unscaled and unmasked, [*lead, *batch]
    score_norm: Array = None  # squared norm of its derivative in the parameters, [*lead, *plates]
    value: Array = None
    lead: int = 0
    analytic: bool = False  # does its infer ask for the divergence from the model's law in closed form?
    requested: Any = None  # the estimator that the hook or the site's infer asks for
    declared: Any = None  # what the hook says of it (`core.keep.Hooked`)
    kind: Any = None  # what the adapter knows a site by, whatever the sizes of its plates

    def filled(self, **arrays: Any) -> Site:
        """The same site with other arrays."""
        site = object.__new__(Site)
        site.__dict__.update(self.__dict__, **arrays)
        return site

    @property
    def subsampling(self) -> float:
        """N/B: how much more than its own cost an element of the site's minibatch counts for."""
        return math.prod(p.scale for p in self.plates)

    def arrays(self, ops: Ops, scale: Any) -> dict[str, Any]:
        """What differs between particles; ``scale`` with an axis for each of the batch's, if it is no number."""
        rank = len(self.batch_shape)
        if not isinstance(scale, Real) and scale.ndim < rank:
            scale = ops.reshape(scale, (*(1,) * (rank - scale.ndim), *scale.shape))
        names = ("logits", "named", "log_q", "score_norm")
        return {"scale": scale, **{name: getattr(self, name) for name in names}}

    # ---- shapes -------------------------------------------------------------------------------------------------

    @property
    def plate_shape(self) -> tuple[int, ...]:
        """The batch shape with 1 in every dimension of dependent elements."""
        return tuple(size if i in self._own_axes else 1 for i, size in enumerate(self.batch_shape))

    @property
    def _own_axes(self) -> frozenset[int]:
        """Batch axes, from the left, whose elements have costs of their own: plates, and the steps of a scan."""
        n = len(self.batch_shape)
        return frozenset(n + p.dim for p in self.plates) | frozenset(range(self.time))

    @property
    def steps(self) -> int:
        """Of the scans that it is drawn in."""
        return math.prod(self.batch_shape[: self.time])

    @property
    def lane_axes(self) -> tuple[int, ...]:
        """Axes of a value, from the left and without lead axes, along which elements are *dependent*:
        event dimensions, and batch dimensions that no plate declares. A one-hot's category axis is not one."""
        n = len(self.batch_shape)
        return (*(i for i in range(n) if i not in self._own_axes), *range(n, n + self.event_axes))

    @property
    def event_axes(self) -> int:
        """How many event dimensions there are, without the category axis of a one-hot."""
        return len(self.event_shape) - (self.family == families.ONEHOT)

    @property
    def _undeclared(self) -> tuple[int, ...]:
        """Batch axes of dependent elements, behind the lead axes."""
        return tuple(i + self.lead for i in self.lane_axes if i < len(self.batch_shape))

    @property
    def lane_shape(self) -> tuple[int, ...]:
        shape = (*self.batch_shape, *self.event_shape)
        return tuple(shape[i] for i in self.lane_axes)

    @property
    def lanes(self) -> int:
        """Dependent elements per plate element."""
        return math.prod(self.lane_shape)

    @property
    def categories(self) -> int:
        """Size of the support of one element (Bernoulli and categorical families)."""
        return 2 if self.family == families.BERNOULLI else int(self.logits.shape[-1])

    @property
    def parameters(self) -> tuple[Array, ...]:
        """Every distribution parameter, in the order of their names."""
        return tuple(self.named[k] for k in sorted(self.named))

    @property
    def opened(self) -> Site:
        """The site in all plates that the guide declares. What an estimator keeps, and what a user gives, is shaped by
        these: a guide does not know what the model couples."""
        return self.filled(plates=self.plates | self.coupled, coupled=frozenset()) if self.coupled else self

    def spread(self, ops: Ops, cost: Array, trailing: int = 0) -> Array:
        """A cost ``[..., *plates]`` broadcastable against values ``[..., *batch, *event]`` (and the category axis)."""
        extra = self.event_axes + trailing
        return ops.reshape(cost, (*cost.shape, *(1,) * extra)) if extra else cost

    def sum_lanes(self, ops: Ops, x: Array) -> Array:
        """Elementwise ``[*lead, *batch, *event]`` (one axis per element) to the cost's ``[*lead, *plates]``."""
        return self.to_plates(ops, self.sum_event(ops, x))

    def to_plates(self, ops: Ops, x: Array) -> Array:
        """``[*lead, *batch]`` to the cost's ``[*lead, *plates]``."""
        return ops.sum(x, axis=self._undeclared, keepdims=True) if self._undeclared else x

    def sum_event(self, ops: Ops, x: Array) -> Array:
        """Elementwise ``[*lead, *batch, *event]`` (one axis per element) to ``[*lead, *batch]``."""
        return ops.sum(x, axis=tuple(range(-self.event_axes, 0))) if self.event_axes else x

    def sum_elements(self, ops: Ops, x: Array) -> Array:
        """``[*lead, *batch, *event]`` in the shape of a value (the category axis of a one-hot too) to
        ``[*lead, *plates]``."""
        return self.sum_lanes(ops, ops.sum(x, axis=-1) if self.family == families.ONEHOT else x)

    def unit(self, ops: Ops, like: Array) -> Array:
        """The site's scale as one number per plate element, ``[*lead or 1s, *plates or 1s]``, in the dtype of
        ``like``: what an estimator trains should not see the N/B of subsampling.

        ``scale`` is a number, or an array whose axes count from the right, after the lead axes. It may vary along
        dependent elements, or along axes that the site doesn't have: the unit is its mean there, and 1 where that is 0.
        """
        scale, rank = ops.like(self.scale, like), len(self.batch_shape)
        lead = tuple(scale.shape[: self.lead]) or (1,) * self.lead
        own = tuple(scale.shape[self.lead :])
        scale = ops.reshape(scale, (*lead, *(1,) * (rank - len(own)), *own))
        excess = scale.ndim - self.lead - rank
        if excess > 0:
            scale = ops.mean(scale, axis=tuple(range(self.lead, self.lead + excess)))
        scale = ops.mean(scale, axis=self._undeclared, keepdims=True) if self._undeclared else scale
        return ops.where(scale > 0, scale, ops.ones_like(scale))

    def features(self, ops: Ops, x: Array) -> Array:
        """``[*lead, *batch, *rest]`` as one feature vector per plate element: ``[*lead, *plates, F]``."""
        n = self.lead + len(self.batch_shape)
        kept = [i for i in range(n) if i not in self._undeclared]
        moved = ops.permute_dims(x, (*kept, *self._undeclared, *range(n, x.ndim)))
        flat = math.prod(moved.shape[len(kept) :])
        return ops.reshape(moved, (*x.shape[: self.lead], *self.plate_shape, flat))

    @property
    def nesting(self) -> int:
        """How many batch dimensions, counted from the right, the plates reach, and the steps of a scan."""
        return len(self.batch_shape) if self.time else max((-p.dim for p in self.plates), default=0)

    def feature_count(self, x: Array) -> int:
        """The ``F`` of ``features(x)``."""
        return math.prod(x.shape[self.lead :]) // math.prod(self.plate_shape)


def sum_to(ops: Ops, value: Array, plates: frozenset[Plate], batch_ndim: int, leading: int = 0) -> Array:
    """Sum ``value [*batch]`` over every batch dimension but those of ``plates`` and the first ``leading`` ones, which
    stay in front; the result has ``batch_ndim`` dimensions, 1 wherever it was summed."""
    keep = {p.dim for p in plates}
    ndim = value.ndim
    axes = tuple(i for i in range(leading, ndim) if i - ndim not in keep and value.shape[i] != 1)
    if axes:
        value = ops.sum(value, axis=axes, keepdims=True)
    front, rest = value.shape[:leading], value.shape[leading:]
    if ndim > batch_ndim:
        return ops.reshape(value, (*front, *rest[ndim - batch_ndim :]))
    if ndim < batch_ndim:
        return ops.reshape(value, (*front, *(1,) * (batch_ndim - ndim), *rest))
    return value


def within(ops: Ops, each: Array, window: Window) -> Array:
    """For each step, along the first axis, and the second too if the window has one inside, the sum over those in the
    window."""
    if window.inner is None:
        return _over_steps(ops, each, window)
    each = ops.flip(each, axis=0) if window.flipped else each
    own = ops.moveaxis(_over_steps(ops, ops.moveaxis(each, 1, 0), window.inner), 0, 1)
    whole, (first, last) = ops.sum(each, axis=1, keepdims=True), window[:2]
    return own + sum(_over_steps(ops, whole, w) for w in (Window(first, min(last, -1)), Window(max(first, 1), last)))


def _over_steps(ops: Ops, each: Array, window: Window) -> Array:
    """For each step, the sum over those in the window."""
    if window.first > window.last:
        return ops.zeros_like(each)
    each, nothing = ops.flip(each, axis=0) if window.flipped else each, ops.zeros_like(each[:1])
    if window.last == math.inf:
        rest = ops.flip(ops.cumulative_sum(ops.flip(each, axis=0), axis=0), axis=0)
        return _ahead(ops, rest, window.first, rest[:1], nothing)
    if window.first == -math.inf:
        so_far = ops.cumulative_sum(each, axis=0)
        return _ahead(ops, so_far, window.last, nothing, so_far[-1:])
    offsets = range(int(window.first), int(window.last) + 1)
    return sum((_ahead(ops, each, d, nothing, nothing) for d in offsets), ops.zeros_like(each))


def _ahead(ops: Ops, x: Array, offset: float, before: Array, after: Array) -> Array:
    """At each step the ``x`` of so many later; ``before`` the first and ``after`` the last as these say."""
    count = x.shape[0]
    d = int(max(-count, min(offset, count)))
    if d == 0:
        return x
    parts = [x[d:], *[after] * d] if d > 0 else [*[before] * -d, x[: count + d]]
    return ops.concat(parts, axis=0)


@dataclass
class Draw:
    """What an estimator drew at its site: the value that the run uses, and whatever it needs later."""

    value: Array
    extra: Mapping[str, Array] = field(default_factory=dict)


@dataclass
class Costs:
    """Downstream costs of one site. ``P`` stands for the site's plate shape.

    ``value [K, *P]``; ``alternatives [A, K, *P]``; ``relaxed [M, K, *P]`` with ``relaxed_slope
    [M, K, *batch, *event]``, the derivative of the total cost in the relaxed value.
    """

    value: Array
    alternatives: Array = None
    relaxed: Array = None
    relaxed_slope: Array = None


@dataclass
class Local:
    """A site's contribution: ``surrogate`` (summed and averaged over particles by the assembly; its gradient is the
    local gradient), an ``auxiliary`` objective to minimise over the estimator's own parameters, and new state."""

    surrogate: Array
    auxiliary: Array = None
    state: Mapping[str, Array] = field(default_factory=dict)
