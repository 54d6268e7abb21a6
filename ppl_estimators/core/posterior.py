"""The posterior of what was summed, given what was drawn: marginals and joint draws, as derivatives of the sum.

    p(z = v | the rest)  =  ∂ log Σ Π  /  ∂ (a log factor of z at v)

A joint draw is the same derivative, where each log Σ passes its own on to one of its entries alone, drawn in proportion
to them: what the derivative of the whole reaches is a value for each site. Along a scan that is filtering forward and
sampling backward; with plates, backward through the order of the elimination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from .elimination import Axis, Time, log_probability
from .enumeration import Cell, Enumeration, steps_first
from .ops import Array, Ops
from .site import Plate

#: noise of a shape, in the dtype of an array, uniform in [0, 1): new at each call
Uniform = Callable[[tuple[int, ...], Array], Array]


class Posterior(NamedTuple):
    """What `EstimatorELBO.posterior` found of the latent sites, by name; the draws come first in every array.

    ``samples``: of every latent site, ``[draws, *batch, *event]``: from the guide, and, given that, of what is summed
    from its posterior, all sites together. ``marginals``: of every site that is summed, the probability of each value
    given what the guide drew, ``[draws, *batch, values]``, in the order of its distribution's `enumerate_support`.
    """

    samples: Mapping[str, Array]
    marginals: Mapping[str, Array]


class Tables(NamedTuple):
    """Of one run: ``log_p`` of the factors of the model's sums, masked and not scaled, but neither for what is summed;
    ``log_q`` of the guide's sites that are enumerated; the ``values`` of these and of what is summed, ``[values,
    *event]``; what was ``drawn``, and how many event dimensions it has."""

    log_p: Mapping[str, Array]
    log_q: Mapping[str, Array]
    values: Mapping[str, Array]
    drawn: Mapping[str, tuple[Array, int]]


def posterior(ops: Ops, found: Enumeration | None, tables: Tables, uniform: Uniform) -> Posterior:
    """The marginals given one run, and one joint draw. ``found`` is None if every site is drawn."""
    if found is None:
        return Posterior({n: value for n, (value, _) in tables.drawn.items()}, {})
    summed = {n: _elements(c, n, tables.log_p[n]) for n, c in found.model.items() if c.summed}
    of_guide = {n: _elements(found.guide[n], n, log_q) for n, log_q in tables.log_q.items()}
    log_q = tables.log_q.__getitem__
    marginals = {}
    for name in of_guide:
        cell = found.guide[name]
        own = frozenset(v for v in cell.values if v.name == name and not v.ago)
        marginals[name] = found.chance(ops, own, cell.plates, name, log_q) if own else ops.ones_like(log_q(name))
        marginals[name] = marginals[name] if cell.time is None else steps_first(ops, marginals[name], log_q(name).ndim)

    def expected(log_p: Mapping[str, Array]) -> Array:
        return sum(ops.sum(found.expected(ops, name, log_p, log_q)) for name in found.blocks)

    def drawn(log_p: Mapping[str, Array]) -> Array:
        return sum(ops.sum(found.sum(drawing, name, log_p).value) for name in found.blocks)

    marginals |= _slopes(ops, expected, tables.log_p, summed)
    hits: dict[str, Array] = {}
    at, drawing = partial(_at, ops, found, hits), Drawing(ops, uniform)
    for name, site in of_guide.items():  # in the guide's order: what decides a value comes before it
        if found.guide[name].time is None:
            law = ops.broadcast_to(at(log_q(name), found.guide[name]), site.shape)
            hits[name] = ops.ones_like(law) if site.dim is None else _hit(ops, law, site.dim, uniform)
        elif name not in hits:
            sites = found.chain(name)
            laws = {n: at(log_q(n), found.guide[n]) for n in sites}
            hits |= _slopes(ops, partial(_ended, drawing, found, sites), laws, {n: of_guide[n] for n in sites})
    log_p = {n: at(x, found.model[n], model=True) for n, x in tables.log_p.items()}
    hits |= _slopes(ops, drawn, log_p, summed)
    samples, nesting = {}, min((-1 - d for c in found.guide.values() for d in _dims(c.axes)), default=0)
    for name, (value, events) in tables.drawn.items():
        cell = found.guide[name]
        samples[name] = at(value, cell, events)
        if dims := _dims(cell.axes):
            samples[name] = _plain(ops, samples[name], -min(dims), nesting, events, cell.plates)
    for name, site in {**of_guide, **summed}.items():
        chance = site.last(ops, marginals[name])
        marginals[name] = chance / ops.sum(chance, axis=-1, keepdims=True)  # a minibatch counts N/B times
        samples[name] = tables.values[name][ops.argmax(site.last(ops, hits[name]), axis=-1)]
    return Posterior(samples, marginals)


class Drawing:
    """Array operations whose log Σ passes its derivative on to one entry, drawn in proportion to all."""

    def __init__(self, ops: Ops, uniform: Uniform):
        self.ops, self.uniform = ops, uniform

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def logsumexp(self, x: Array, axis: int) -> Array:
        fixed = self.ops.stop_gradient(x)
        moving = self.ops.sum(_hit(self.ops, fixed, axis, self.uniform) * (x - fixed), axis=axis)
        return self.ops.logsumexp(fixed, axis=axis) + moving

    def fold(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        return self._each(self.ops.fold, step, start, *along)

    def folds(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        return self._each(self.ops.folds, step, start, *along)

    def _each(self, fold: Callable[..., Array], step: Callable[..., Array], start: Array, *along: Array) -> Array:
        def one(ops: Ops, total: Array, noise: Array, *new: Array) -> Array:
            return step(Drawing(ops, lambda *like: noise), total, *new)

        return fold(one, start, self.uniform((along[0].shape[0], *start.shape), start), *along)


def _hit(ops: Ops, log_p: Array, axis: int, uniform: Uniform) -> Array:
    """1 at one entry along ``axis``, drawn in proportion to them all, and 0 elsewhere."""
    log_p = ops.moveaxis(log_p, axis, -1)
    below = ops.cumulative_sum(ops.softmax(log_p), axis=-1)
    u = uniform(log_p.shape[:-1], log_p)[..., None] * below[..., -1:]
    index = ops.sum(ops.astype(below[..., :-1] <= u, ops.indices(1, log_p).dtype), axis=-1)
    return ops.moveaxis(ops.one_hot(index, log_p.shape[-1], log_p), -1, axis)


class _Elements(NamedTuple):
    """A site in an array with an entry for each element and, along ``dim``, for each value; None if it has only one."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    dim: int | None

    def last(self, ops: Ops, x: Array) -> Array:
        """As ``[*batch, values]``."""
        x = ops.broadcast_to(x, self.shape)
        x = x[..., None] if self.dim is None else ops.moveaxis(x, self.dim, -1)
        return ops.reshape(x, (*self.batch, x.shape[-1]))


def _elements(cell: Cell, name: str, log_p: Array) -> _Elements:
    axes = cell.named
    shape = [1] * max(log_p.ndim, *(-d for d in axes), 0)
    batch, own = [1] * max((-p.dim for p in cell.plates), default=0), None
    for dim, axis in axes.items():
        if isinstance(axis, Plate) and not axis.values:
            shape[dim] = batch[dim] = axis.size
        elif isinstance(axis, Time) or (
            axis == name or (isinstance(axis, Plate) and axis.name == name and not axis.ago)
        ):
            shape[dim] = log_p.shape[dim]
            own = own if isinstance(axis, Time) else dim
    steps = [log_p.shape[d] for d, axis in axes.items() if isinstance(axis, Time)]
    return _Elements(tuple(shape), (*steps, *batch), own)


def _ended(ops: Ops, found: Enumeration, sites: tuple[str, ...], log_q: Mapping[str, Array]) -> Array:
    """log Σ q of all values in all steps of a scan of the guide."""
    _, last = found.laws(ops, sites, log_q.__getitem__)
    return ops.sum(log_probability(ops, [last], frozenset()).value)


def _slopes(
    ops: Ops, total: Callable[[Mapping[str, Array]], Array], log_p: Mapping[str, Array], summed: Mapping[str, _Elements]
) -> dict[str, Array]:
    """The derivative of ``total`` in a factor for each value of each summed site."""
    if not summed:
        return {}
    ends, end = {}, 0
    for name, site in summed.items():
        ends[name], end = (end, end + math.prod(site.shape)), end + math.prod(site.shape)

    def parts(x: Array) -> dict[str, Array]:
        return {n: ops.reshape(x[slice(*ends[n])], site.shape) for n, site in summed.items()}

    def height(x: Array) -> Array:
        return total({**log_p, **{n: log_p[n] + part for n, part in parts(x).items()}})

    like = next(iter(log_p.values()))
    start = ops.like([0.0] * end, like)
    return parts(ops.stop_gradient(ops.vjp(height, start, ops.like(1.0, like))))


def _at(
    ops: Ops, found: Enumeration, hits: Mapping[str, Array], x: Array, cell: Cell, events: int = 0, model: bool = False
) -> Array:
    """``x [*batch, *event]`` at the values of the guide that were drawn."""
    for dim, axis in cell.axes.items():
        if isinstance(axis, Plate) and axis.name in hits:
            hit = hits[axis.name]
            if axis.ago is not None:
                hit = _before(ops, hit, axis, found.guide[axis.name], x.ndim - events)
                hit = ops.flip(hit, axis=0) if model and axis.of_step and cell.reversed else hit
            hit = ops.reshape(hit, (*hit.shape, *(1,) * events)) > 0
            x = ops.sum(ops.where(hit, x, ops.zeros_like(x)), axis=dim - events, keepdims=True)
    return x


def _before(ops: Ops, hit: Array, axis: Plate, cell: Cell, ndim: int) -> Array:
    """What was drawn at each step of a scan, ``[steps, *batch]``: of the steps before, or of the last, along the
    dimension of ``axis``, in so many dimensions."""
    own = next(v.dim for v in cell.values if (v.name, v.ago) == (axis.name, 0))
    count, size = hit.shape[0], hit.shape[own]
    hit = ops.reshape(hit, (count, *hit.shape[own:]))
    hit = ops.flip(hit, axis=0) if cell.reversed else hit
    first = ops.reshape(ops.like([1.0] + [0.0] * (size - 1), hit), (1, size, *(1,) * (hit.ndim - 2)))  # as if the first
    first = ops.broadcast_to(first, (axis.ago, *hit.shape[1:]))
    hit = ops.concat([first, hit], axis=0)[:count]
    hit = hit[-1:] if axis.last else ops.flip(hit, axis=0) if cell.reversed else hit
    between, lead = own - axis.dim, () if axis.last else (count,)
    missing = ndim - len(lead) + axis.dim
    return ops.reshape(hit, (*lead, *(1,) * missing, size, *(1,) * between, *hit.shape[2:]))


def _dims(axes: Mapping[int, Axis]) -> list[int]:
    """Those of values that the guide enumerates."""
    return [d for d, axis in axes.items() if isinstance(axis, Plate) and axis.values]


def _plain(ops: Ops, x: Array, enumerated: int, nesting: int, events: int, plates: frozenset[Plate]) -> Array:
    """``x [*batch, *event]``, one value of the ``enumerated`` many to the left of ``nesting`` dimensions, as it would
    have been drawn without them."""
    batch = x.ndim - events
    shape, most = list(x.shape[batch - nesting :]), max((-p.dim for p in plates), default=0)
    while len(shape) - events > most and shape[0] == 1:
        del shape[0]
    return ops.reshape(x, (*x.shape[: batch - enumerated], *shape))
