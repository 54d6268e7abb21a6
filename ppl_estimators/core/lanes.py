"""Single elements of a site: its lanes are the elements of one plate element, which depend on each other.

A lane's number counts ``Site.lane_axes`` in order, the last one fastest, as ``Site.features`` lays them out.
"""

from __future__ import annotations

import math

from .families import BERNOULLI, category, encoded
from .ops import Array, Ops
from .site import Site


def numbers(ops: Ops, site: Site, like: Array) -> Array:
    """``[*batch, *event]`` (1 along plates, no category axis): which lane an element is."""
    shape = [1] * (len(site.batch_shape) + site.event_axes)
    for axis, size in zip(site.lane_axes, site.lane_shape, strict=True):
        shape[axis] = size
    return ops.reshape(ops.indices(math.prod(shape), like), tuple(shape))


def shifted(ops: Ops, site: Site, value: Array, index: Array) -> Array:
    """A discrete ``value`` with lane ``index // (C - 1)`` moved on by ``1 + index % (C - 1)`` categories; every plate
    element at once."""
    c = site.categories
    lane, shift = (0, index) if site.lanes == 1 else (index // (c - 1), index % (c - 1))
    here = numbers(ops, site, value) == lane
    if site.family == BERNOULLI:
        return ops.where(here, 1 - value, value)
    drawn = category(ops, site.family, value)
    return encoded(ops, site.family, ops.where(here, (drawn + 1 + shift) % c, drawn), site.logits)


def each(ops: Ops, site: Site, x: Array) -> Array:
    """``[*batch, *event, ...]`` (no category axis, no lead axes) as ``[D ..., *plates]``, rows lane by lane."""
    rows = site.features(ops, x)
    return ops.permute_dims(rows, (rows.ndim - 1, *range(rows.ndim - 1)))


def weights(ops: Ops, site: Site, drawn: Array, moved: Array) -> Array:
    """What the drawn value ``[*batch, *event]`` and those that the lanes move to ``[*batch, *event, values]``, one lane
    at a time and to each of its values in turn, weigh, adding up to 1 in every lane: ``[1 + D values, *plates]``."""
    own = ops.mean(each(ops, site, drawn), axis=0)[None]
    return ops.concat([own, each(ops, site, moved) / site.lanes], axis=0)


def by_lane(ops: Ops, site: Site, costs: Array) -> Array:
    """Costs ``[D values, K, *plates]`` of moving each lane to each of its values, ``[K, *batch, *event, values]``."""
    n = len(site.batch_shape)
    x = ops.reshape(costs, (*site.lane_shape, costs.shape[0] // site.lanes, *costs.shape[1:]))
    values = len(site.lane_shape)
    undeclared = values - site.event_axes
    # axes of x: [lanes..., values, K, batch...]; a batch axis that is a lane has size 1 and gives way to it
    order, lane = [values + 1], 0
    dropped = set(site.lane_axes[:undeclared])
    for axis in range(n):
        if axis in dropped:
            order.append(lane)
            lane += 1
        else:
            order.append(values + 2 + axis)
    order += [*range(undeclared, values), values]
    if dropped:
        keep = [i for i in range(x.ndim) if i - values - 2 not in dropped]
        x = ops.reshape(x, tuple(x.shape[i] for i in keep))
        rank = {axis: i for i, axis in enumerate(keep)}
        order = [rank[axis] for axis in order]
    return ops.permute_dims(x, tuple(order))
