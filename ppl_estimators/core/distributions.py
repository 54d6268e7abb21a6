"""Distributions of either library as the core sees them: family, logits, scores.

Both libraries wrap them alike: what `to_event`, `expand` and `mask` return is of a class of its own, and holds what it
wraps as ``base_dist``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any, ClassVar

from . import families
from .errors import site_error
from .ops import Array, Ops
from .plan import check_words
from .relaxation import unknown
from .site import Site
from .verify import Along, elements


class Distributions:
    """What both have in common; a subclass says how the library calls the rest."""

    ops: Ops
    #: of what `to_event`, `expand` and `mask` return
    independent: Any
    expanded: Any
    masked: Any

    def __init__(self) -> None:
        wrappers = (self.independent, self.expanded, self.masked)
        self.wraps: Callable[[type], bool] = lru_cache(maxsize=1024)(lambda kind: issubclass(kind, wrappers))
        self._family: Callable[[type], str] = lru_cache(maxsize=1024)(self._family_of)

    def classes(self, name: str) -> Any:
        """A class or several, as for `issubclass`, by the family's name in both libraries."""
        raise NotImplementedError

    def mask(self, fn: Any) -> Array:
        """Of a masked distribution."""
        raise NotImplementedError

    def slopes(self, fn: Any, value: Array) -> Sequence[Array] | None:
        """The derivatives of log q(value) in the distribution's own parameters, each ``[*batch, ...]``; None if it does
        not show these."""
        raise NotImplementedError

    def from_reals(self, support: Any) -> Any:
        """The library's transform of all real numbers to a support, which knows its inverse."""
        raise NotImplementedError

    def unwrapped(self, fn: Any) -> Any:
        """Without to_event, expand and mask."""
        while self.wraps(type(fn)):
            fn = fn.base_dist
        return fn

    def unmasked(self, fn: Any) -> Any:
        """The same distribution with no mask anywhere: a masked latent still has a score."""
        if isinstance(fn, self.masked):
            return self.unmasked(fn.base_dist)
        if isinstance(fn, self.expanded):
            return self.unmasked(fn.base_dist).expand(fn.batch_shape)
        if isinstance(fn, self.independent):
            return self.unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
        return fn

    def family(self, fn: Any) -> str:
        return self._family(type(self.unwrapped(fn)))

    def _family_of(self, kind: Any) -> str:
        for family, name in families.NAMES.items():
            parameters = families.CONTINUOUS.get(family)  # a subclass may have others
            if issubclass(kind, self.classes(name)):
                if parameters is None or kind.arg_constraints.keys() == set(parameters):
                    return family
        return families.OTHER

    def described(self, name: str, fn: Any, infer: Mapping[str, Any], **facts: Any) -> Site:
        """The site's facts and arrays, without lead axes: those that both libraries tell alike, beside ``facts``."""
        check_words(name, infer)
        family = self.family(fn)
        logits = self.natural_parameters(fn, family)
        return Site(
            name=name,
            family=family,
            batch_shape=tuple(fn.batch_shape),
            event_shape=tuple(fn.event_shape),
            logits=logits,
            named={} if logits is None else {"logits": logits},
            analytic=infer.get("kl") == "analytic",
            declared=infer.get("_with_estimators"),
            **facts,
        )

    def logits(self, fn: Any, family: str) -> Array:
        """Of a family that has some, in the shape of the site."""
        logits = self.unwrapped(fn).logits
        trailing = logits.shape[-1:] if family == families.CATEGORICAL else ()
        return self.ops.broadcast_to(logits, (*fn.batch_shape, *fn.event_shape, *trailing))

    def natural_parameters(self, fn: Any, family: str) -> Array | None:
        """The same, finite; None where there are none."""
        return families.finite(self.ops, self.logits(fn, family)) if family in families.DISCRETE else None

    def log_prob(self, fn: Any, value: Array, *, masked: bool) -> Array:
        """log p of a family with logits, ``[*batch]``, linear in a relaxed value."""
        ops, family = self.ops, self.family(fn)
        log_p = families.log_prob(ops, family, self.logits(fn, family), value)
        events = len(fn.event_shape) - (family == families.ONEHOT)
        for mask in self.masks(fn, events) if masked else ():
            log_p = ops.where(mask, log_p, ops.zeros_like(log_p))
        return ops.sum(log_p, axis=tuple(range(-events, 0))) if events else log_p

    def relaxed_log_prob(self, name: str, side: str, fn: Any, value: Array) -> Array:
        """log p at a relaxed value, masked."""
        if self.family(fn) not in families.RELAXABLE:
            raise unknown(name, side, type(fn).__name__)
        return self.log_prob(fn, value, masked=True)

    def masks(self, fn: Any, events: int) -> list[Array]:
        """Every mask inside ``fn``, broadcastable to one number per element."""
        masks, reinterpreted = [], 0
        while self.wraps(type(fn)):
            if isinstance(fn, self.independent):
                reinterpreted += fn.reinterpreted_batch_ndims
            elif isinstance(fn, self.masked):
                mask = self.mask(fn)
                masks.append(mask.reshape(*mask.shape, *(1,) * (events - reinterpreted)) if mask.ndim else mask)
            fn = fn.base_dist
        return masks

    def unlike(self, *sides: tuple[Any, Any, Any]) -> bool | Array:
        """Of two distributions, each with a scale and a mask (or None) beside: does any element weigh otherwise? An
        array where one of these is an array."""
        ops, weights = self.ops, []
        scales = [1.0 if scale is None else scale for _, scale, _ in sides]
        masks = [
            [*([] if mask is None else [self._behind(fn, mask)]), *self.masks(fn, len(fn.event_shape))]
            for fn, _, mask in sides
        ]
        if all(isinstance(scale, Real) for scale in scales) and not any(masks):
            return not math.isclose(*scales)
        for (fn, *_), scale, its in zip(sides, scales, masks, strict=True):
            weight = self._behind(fn, scale)
            for m in its:
                weight = ops.where(m, weight, ops.zeros_like(weight))
            weights.append(weight)
        return ops.any(ops.abs(weights[0] - weights[1]) > 1e-5 * ops.abs(weights[1]))

    def _behind(self, fn: Any, x: Any) -> Array:
        """``x [*batch]`` with a dimension for each of the events'."""
        x = self.ops.asarray(x)
        return x.reshape(*x.shape, *(1,) * len(fn.event_shape)) if x.ndim else x

    def is_masked(self, fn: Any) -> bool:
        while self.wraps(type(fn)):
            if isinstance(fn, self.masked):
                return True
            fn = fn.base_dist
        return False

    def score_norm(self, site: Site, fn: Any, value: Array) -> Array:
        """Squared norm of d log q / d parameters, per plate element, ``[*plates]``."""
        ops, batch = self.ops, len(site.batch_shape)
        if site.family in families.DISCRETE:
            s = families.score(ops, site.family, ops.stop_gradient(site.logits), value) ** 2
            return site.sum_lanes(ops, s if site.family == families.BERNOULLI else ops.sum(s, axis=-1))
        slopes = self.slopes(fn, value)
        if slopes is None:
            raise site_error(
                site.name,
                f"OptimalConstant needs the score in the distribution's own parameters, and {site.distribution} does "
                "not show them",
                "Use LeaveOneOut() or MovingAverage().",
            )
        squares = [ops.sum(s**2, axis=tuple(range(batch, s.ndim))) if s.ndim > batch else s**2 for s in slopes]
        return site.to_plates(ops, sum(squares[1:], squares[0]))

    def moved_on(self, fn: Any, value: Array, pattern: int) -> Array:
        """A discrete value with the elements of a pattern one category further."""
        ops, family = self.ops, self.family(fn)
        shape = value.shape[: value.ndim - (family == families.ONEHOT)]
        moves = ops.reshape(elements(ops, pattern, math.prod(shape), value), shape)
        if family == families.BERNOULLI:
            return ops.where(moves, 1 - value, value)
        if family == families.CATEGORICAL:
            return ops.where(moves, (value + 1) % self.unwrapped(fn).logits.shape[-1], value)
        return ops.where(moves[..., None], ops.roll(value, 1, axis=-1), value)

    def along(self, fn: Any, value: Array, other: Array, part: Along) -> Array:
        """``other`` in the elements of ``part``, ``value`` elsewhere."""
        events = len(fn.event_shape)
        if value.ndim < events - part.dim:
            return value
        return self.ops.where(part.moves(self.ops, value, events), other, value)

    def line(self, fn: Any, value: Array, number: int) -> Callable[[Array], Array]:
        """Values along a line through ``value``, or through a relaxed one beside it, as a function of the step. All
        elements move; by how much depends on the number."""
        ops = self.ops
        if self.family(fn) in families.DISCRETE:
            other = self.moved_on(fn, value, 0)
            return lambda step: 0.8 * value + 0.2 * other + step * (other - value)
        try:
            transform = self.from_reals(support_of(self.unwrapped(fn)))
            real, back = transform.inv(value), transform
        except NotImplementedError:  # of a support that nobody knows
            real, back = value, lambda x: x
        count = math.prod(real.shape)
        by = 0.3 + 0.618 * (number + 1) * ops.like(ops.indices(count, real) + 1, real) % 1
        return lambda step: back(real + step * ops.reshape(by, real.shape))


class Law:
    """The distribution of one element (no to_event, expand or mask), as the core may ask it."""

    known: ClassVar[Distributions]

    def __init__(self, fn: Any):
        self.given = fn

    @cached_property
    def fn(self) -> Any:
        return self.known.unwrapped(self.given)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.fn.event_shape)

    @property
    def discrete(self) -> bool:
        support = support_of(self.fn)
        try:
            return support is not None and bool(support.is_discrete)
        except NotImplementedError:  # several beside one another
            return False

    def cdf(self, z: Array) -> Array:
        return self.fn.cdf(z)

    def log_prob(self, z: Array) -> Array:
        return self.fn.log_prob(z)

    def slope(self, z: Array) -> None:
        """Differentiate the cdf in every parameter; raises what the library raises where it cannot."""
        raise NotImplementedError


def support_of(fn: Any) -> Any:
    """None where a class of the user's does not say."""
    try:
        return fn.support
    except NotImplementedError:
        return None
