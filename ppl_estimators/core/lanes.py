"""Single elements of a site: its lanes are the elements of one plate element, which depend on each other.

A lane's number counts ``Site.lane_axes`` in order, the last one fastest, as ``Site.features`` lays them out.
"""

from __future__ import annotations

import math

from .families import ONEHOT
from .ops import Array, Ops
from .site import Site


def numbers(ops: Ops, site: Site, like: Array) -> Array:
    """``[*batch, *event]`` (1 along plates, no category axis): which lane an element is."""
    shape = [1] * (len(site.batch_shape) + len(site.event_shape) - (site.family == ONEHOT))
    for axis, size in zip(site.lane_axes, site.lane_shape, strict=True):
        shape[axis] = size
    return ops.reshape(ops.indices(math.prod(shape), like), tuple(shape))


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
