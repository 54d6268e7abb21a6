"""Single elements of a site: its lanes are the elements of one plate element, which depend on each other.

A lane's number counts ``Site.lane_axes`` in order, the last one fastest, as ``Site.features`` lays them out.
"""

from __future__ import annotations

import math

from .families import BERNOULLI, ONEHOT, category, encoded
from .ops import Array, Ops
from .site import Site


def numbers(ops: Ops, site: Site, like: Array) -> Array:
    """``[*batch, *event]`` (1 along plates, no category axis): which lane an element is."""
    shape = [1] * (len(site.batch_shape) + len(site.event_shape) - (site.family == ONEHOT))
    for axis, size in zip(site.lane_axes, site.lane_shape, strict=True):
        shape[axis] = size
    return ops.reshape(ops.indices(math.prod(shape), like), tuple(shape))


def shifted(ops: Ops, site: Site, value: Array, index: Array) -> Array:
    """A discrete ``value`` with lane ``index // (C - 1)`` moved on by ``1 + index % (C - 1)`` categories; every plate
    element at once."""
    c = site.categories
    here = numbers(ops, site, value) == index // (c - 1)
    if site.family == BERNOULLI:
        return ops.where(here, 1 - value, value)
    drawn = category(ops, site.family, value)
    return encoded(ops, site.family, ops.where(here, (drawn + 1 + index % (c - 1)) % c, drawn), site.logits)


def each(ops: Ops, site: Site, x: Array) -> Array:
    """``[*batch, *event]`` (one number per element, no lead axes) as ``[D, *plates]``, a row per lane."""
    rows = site.features(ops, x)
    return ops.permute_dims(rows, (rows.ndim - 1, *range(rows.ndim - 1)))


def weights(ops: Ops, site: Site, drawn: Array, moved: list[Array]) -> Array:
    """What the drawn value and those that the lanes move to, one lane at a time and to each of its values in turn,
    weigh: from ``[*batch, *event]`` each, adding up to 1 in every lane, to ``[1 + D len(moved), *plates]``."""
    rows = ops.stack([each(ops, site, x) for x in moved], axis=1)  # [D, values, *plates]
    others = ops.reshape(rows, (rows.shape[0] * rows.shape[1], *rows.shape[2:]))
    return ops.concat([ops.mean(each(ops, site, drawn), axis=0)[None], others / rows.shape[0]], axis=0)


def by_lane(ops: Ops, site: Site, costs: Array) -> Array:
    """Costs ``[D, K, *plates]`` of moving each lane, as ``[K, *batch, *event]``."""
    n = len(site.batch_shape)
    events = len(site.event_shape) - (site.family == ONEHOT)
    x = ops.reshape(costs, (*site.lane_shape, *costs.shape[1:]))
    lanes = len(site.lane_shape)
    undeclared = lanes - events
    # axes of x: [lanes..., K, batch...]; a batch axis that is a lane has size 1 and gives way to it
    order, lane = [lanes], 0
    dropped = set(site.lane_axes[:undeclared])
    for axis in range(n):
        if axis in dropped:
            order.append(lane)
            lane += 1
        else:
            order.append(lanes + 1 + axis)
    order += list(range(undeclared, lanes))
    if dropped:
        keep = [i for i in range(x.ndim) if i <= lanes or i - lanes - 1 not in dropped]
        x = ops.reshape(x, tuple(x.shape[i] for i in keep))
        rank = {axis: i for i, axis in enumerate(keep)}
        order = [rank[axis] for axis in order]
    return ops.permute_dims(x, tuple(order))
