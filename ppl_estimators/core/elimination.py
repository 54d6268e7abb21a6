"""Sums over discrete values inside a logarithm: variable elimination with plates.

    log Σ_z Π_f exp f(z)

The factors f are the log probabilities that a summed value z can move. A value is summed out in the innermost plates
that hold all its factors; what is left is multiplied over these plates, N/B times for a minibatch, until a factor
outside needs it (Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs"). The order is greedy:
always the variable whose factors have the smallest product. Steps of a scan are like a plate, but for what goes from
step to step, which is summed along the steps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from .errors import site_error
from .ops import Array, Ops
from .site import Plate


class Time(NamedTuple):
    """The steps of a scan, which runs from the last to the first if ``reverse``. ``carried``: of each value that goes
    from step to step its names, those before a step from the oldest on and that after it, and the number of values.
    Before the first step it has none: nothing depends on it there."""

    name: str
    reverse: bool = False
    carried: tuple[tuple[tuple[str, ...], int], ...] = ()


#: a site that is summed out, by its name; a plate; the steps of a scan
Axis = str | Plate | Time

#: stands for log 0, whose derivative is not a number
_IMPOSSIBLE = -1e30


class Factor(NamedTuple):
    """A log probability with one axis for each of ``axes``."""

    value: Array
    axes: tuple[Axis, ...]

    @property
    def inside(self) -> frozenset[Plate | Time]:
        """The plates and scans that it is inside of."""
        return frozenset(a for a in self.axes if not isinstance(a, str) and not (isinstance(a, Plate) and a.values))

    @property
    def summed(self) -> frozenset[str]:
        return frozenset(a for a in self.axes if isinstance(a, str))


def factor(ops: Ops, log_p: Array, axes: Mapping[int, Axis]) -> Factor:
    """``log_p [*batch]``, whose dimensions are called ``axes``, counted from the right. Others are summed; a plate
    along which ``log_p`` is constant counts all its elements."""
    n = log_p.ndim
    others = tuple(i for i in range(n) if i - n not in axes and log_p.shape[i] != 1)
    if others:
        log_p = ops.sum(log_p, axis=others, keepdims=True)
    names, shape, full = [], [], []
    for dim in sorted(axes):
        axis, size = axes[dim], log_p.shape[dim] if -dim <= n else 1
        plate = isinstance(axis, Plate) and not axis.values
        if size == 1 and not plate and not isinstance(axis, Time):
            continue
        names.append(axis)
        shape.append(size)
        full.append(axis.size if isinstance(axis, Plate) else size)
    log_p = ops.reshape(log_p, tuple(shape))
    return Factor(log_p if shape == full else ops.broadcast_to(log_p, tuple(full)), tuple(names))


def blocks(factors: Sequence[tuple[Axis, ...]]) -> list[tuple[int, ...]]:
    """The numbers of the factors, given by their axes, that are connected by variables; those without any belong to
    none."""
    found: dict[str, tuple[set[str], list[int]]] = {}  # of each variable its block, of variables and of factors
    for i, axes in enumerate(factors):
        parts = {id(p): p for p in (found.setdefault(a, ({a}, [])) for a in axes if isinstance(a, str))}
        if not parts:
            continue
        names, members = block = max(parts.values(), key=lambda p: len(p[0]))  # which takes in the smaller ones
        members.append(i)
        for more, others in parts.values():
            if more is not names:
                names |= more
                members += others
                found |= dict.fromkeys(more, block)
    return sorted(tuple(sorted(m)) for m in {id(m): m for _, m in found.values()}.values())


def remaining(factors: Iterable[tuple[Axis, ...]]) -> frozenset[Plate]:
    """The axes of the sum over a block: plates that hold all of its factors, and values that the guide enumerates."""
    axes = [frozenset(a for a in f if isinstance(a, Plate)) for f in factors]
    values = frozenset(a for f in axes for a in f if a.values)
    return frozenset.intersection(*axes) | values


def log_probability(ops: Ops, factors: Sequence[Factor], values: frozenset[Plate]) -> Factor:
    """log Π of probabilities, given by their logarithms, of ``values``; those of others are summed over."""
    renamed = [
        f._replace(axes=tuple(str(a) if isinstance(a, Plate) and a.values and a not in values else a for a in f.axes))
        for f in factors
    ]
    others = list(dict.fromkeys(name for f in renamed for name in f.summed))
    return joined(ops, summed_out(ops, renamed, others))


def placed(ops: Ops, f: Factor) -> Array:
    """A factor with nothing left to sum out, as ``[*batch]``; the steps of a scan come first."""
    times = [a for a in f.axes if isinstance(a, Time)]
    plates = sorted((a for a in f.axes if isinstance(a, Plate)), key=lambda a: a.dim)
    value = _along(ops, f, (*times, *plates))
    shape = [1] * -min((a.dim for a in plates), default=0)
    for a in plates:
        shape[a.dim] = a.size
    return ops.reshape(value, (*value.shape[: len(times)], *shape))


def marginal(ops: Ops, factors: Sequence[Factor], above: Mapping[Plate, frozenset[Plate]] | None = None) -> Factor:
    """log Σ Π of a block of factors, in the plates that hold all of them. Axes of values that the guide enumerates
    stay; ``above`` says in which plates they are."""
    times = {t for f in factors for t in f.inside if isinstance(t, Time)}
    chains = {t: {n for names, _ in t.carried for n in names} for t in times}
    home: dict[str, frozenset[Plate | Time]] = {}  # what holds all factors of a variable
    for f in factors:
        for name in f.summed:
            if not any(t in f.inside and name in names for t, names in chains.items()):
                home[name] = home.get(name, f.inside) & f.inside
    along: dict[Time, frozenset[Plate | Time]] = {}  # and of all that a scan carries
    for t, names in chains.items():
        if carrying := [f.inside for f in factors if t in f.inside and f.summed & names]:
            along[t] = frozenset.intersection(*carrying)
            for after in (n for names_, _ in t.carried for n in names_[1:]):
                home[after] = home.get(after, along[t]) & (along[t] - {t})
    root = frozenset.intersection(*(f.inside for f in factors)) - along.keys()
    floor = ops.like(_IMPOSSIBLE, factors[0].value)
    pending = [Factor(ops.where(f.value > floor, f.value, floor), f.axes) for f in factors]
    while True:
        leaf = max((f.inside for f in pending), key=len)
        here = [f for f in pending if f.inside == leaf]
        pending = [f for f in pending if f.inside != leaf]
        messages = summed_out(ops, here, [n for n, holds in home.items() if holds == leaf])
        if leaf == root:
            total = joined(ops, [*pending, *messages])
            value = ops.where(total.value > floor / 2, total.value, ops.full_like(total.value, -math.inf))
            return Factor(value, total.axes)
        for t in [t for t, holds in along.items() if holds == leaf]:
            steps = [m for m in messages if m.summed & chains[t]]
            messages = [m for m in messages if not m.summed & chains[t]]
            pending.append(_last(ops, joined(ops, steps), t))
        for m in messages:
            steps_in = frozenset().union(*(along[t] for t in along if t in leaf and m.summed & chains[t]))
            carried_in = frozenset().union(*(chains[t] for t in along if t in leaf))
            inner = root.union(steps_in, *(home[n] for n in m.summed - carried_in))
            if inner == leaf:
                names_ = ", ".join(sorted(m.summed))
                raise site_error(
                    min(m.summed),
                    f"summed out together with others ({names_}) whose plates cross: every combination of values "
                    "in all elements would count",
                    "Draw one of them in the guide.",
                )
            pending.append(_product(ops, m, leaf - inner, above or {}))


def _product(ops: Ops, f: Factor, over: frozenset[Plate | Time], above: Mapping[Plate, frozenset[Plate]]) -> Factor:
    """Π over plates, each minibatch standing for its plate, and over the steps of scans."""
    for axis in f.axes:
        if isinstance(axis, Plate) and over & above.get(axis, frozenset()):
            raise site_error(
                min(f.summed),
                f"summed out in the model, outside of a plate of site '{axis.name}', which is enumerated in the guide: "
                "every combination of values in all elements of the plate would count",
                f"Remove the mark of '{axis.name}' in the guide: its estimator then draws it.",
            )
    axes = tuple(i for i, a in enumerate(f.axes) if a in over)
    scale = math.prod(p.scale for p in over if isinstance(p, Plate))
    value = ops.sum(f.value, axis=axes)
    return Factor(value * scale if scale != 1 else value, tuple(a for a in f.axes if a not in over))


def _last(ops: Ops, f: Factor, time: Time) -> Factor:
    """Summed over all values that a scan carries but the last, one step after another."""
    oldest = tuple(names[0] for names, _ in time.carried)
    newer = tuple(n for names, _ in time.carried for n in names[1:])
    rest = tuple(a for a in f.axes if a != time and a not in oldest and a not in newer)
    size = dict(zip(f.axes, f.value.shape, strict=True)) | {n: k for names, k in time.carried for n in names}
    axes = (time, *rest, *oldest, *newer)
    value = ops.broadcast_to(_along(ops, f, axes), tuple(size[a] for a in axes))
    outer, states = tuple(size[a] for a in rest), math.prod(size[n] for n in oldest)
    new = tuple(size[n] for n in newer)
    value = ops.reshape(value, (size[time], *outer, states, *new))
    if time.reverse:
        value = ops.flip(value, axis=0)
    # what a step ends with, [*outer, *newer], begins the next as [*outer, *oldest, *newer but the last of each]
    held = tuple(n for names, _ in time.carried for n in names[:-1])
    order = [held.index(n) for n in (*oldest, *(n for n in newer if n in held))]
    begins = (*outer, states, *(size[n] if n in held else 1 for n in newer))

    def step(ops: Ops, total: Array, new: Array) -> Array:
        total = ops.permute_dims(total, (*range(len(outer)), *(len(outer) + i for i in order)))
        return ops.logsumexp(ops.reshape(total, begins) + new, axis=len(outer))

    nothing = ops.like([0.0, *[_IMPOSSIBLE] * (math.prod(new) - 1)], value)  # is like the first of all values
    start = ops.broadcast_to(ops.reshape(nothing, (*(1,) * len(outer), *new)), (*outer, *new))
    return Factor(ops.fold(step, start, value), (*rest, *newer))


def chain(ops: Ops, factors: Sequence[Factor], values: frozenset[Plate]) -> tuple[Factor, Factor]:
    """log Π of what a scan of the guide enumerates in a step, and of the steps before it: at each step with ``values``
    of the step and of so many before as some are ago; and after the last."""
    floor = ops.like(_IMPOSSIBLE, factors[0].value)
    both = joined(ops, [Factor(ops.where(f.value > floor, f.value, floor), f.axes) for f in factors])
    time = next(a for a in both.axes if isinstance(a, Time))
    known = {(v.name, v.ago, v.last): v for v in values}
    sizes = {v.name: v.size for v in values}
    depth = {n: max((v.ago or 0) + v.last for v in values if v.name == n) for n in sizes}

    def lags(newest: int, last: bool) -> list[Plate]:  # of each site, the oldest first
        every = [(n, ago - last, last) for n, d in depth.items() for ago in range(d, newest - 1, -1)]
        return [known.get(key, Plate(key[0], 0, sizes[key[0]], 1.0, True, *key[1:])) for key in every]

    rest, each, ends = tuple(a for a in both.axes if a != time and a not in values), lags(0, False), lags(1, True)
    size = dict(zip(both.axes, both.value.shape, strict=True)) | {v: v.size for v in each}
    axes = (time, *rest, *each)
    law = ops.broadcast_to(_along(ops, both, axes), tuple(size[a] for a in axes))
    law = ops.flip(law, axis=0) if time.reverse else law
    outer, oldest = tuple(size[a] for a in rest), [i for i, v in enumerate(each, len(rest)) if v.ago == depth[v.name]]
    order = sorted(range(len(rest) + len(each)), key=oldest.__contains__)
    begins = (*outer, *(v.size if v.ago else 1 for v in each))
    held = tuple(v.size for v in ends)

    def step(ops: Ops, total: Array, new: Array) -> Array:
        total = ops.permute_dims(ops.reshape(total, begins) + new, order)
        return ops.logsumexp(ops.reshape(total, (*outer, *held, -1)), axis=len(outer) + len(held))

    nothing = ops.like([0.0, *[_IMPOSSIBLE] * (math.prod(held) - 1)], law)  # is like the first of all values
    start = ops.broadcast_to(ops.reshape(nothing, (*(1,) * len(outer), *held)), (*outer, *held))
    totals = ops.folds(step, start, law)
    law = ops.reshape(totals[:-1], (totals.shape[0] - 1, *begins)) + law
    law = ops.flip(law, axis=0) if time.reverse else law
    return Factor(law, axes), Factor(totals[-1], (*rest, *ends))


def joined(ops: Ops, factors: Sequence[Factor]) -> Factor:
    """Their product."""
    if len(factors) == 1:
        return factors[0]
    axes = tuple(dict.fromkeys(a for f in sorted(factors, key=lambda f: -len(f.axes)) for a in f.axes))
    total = None
    for f in factors:
        x = _along(ops, f, axes)
        total = x if total is None else total + x
    return Factor(total, axes)


def _along(ops: Ops, f: Factor, axes: tuple[Axis, ...]) -> Array:
    if f.axes == axes:
        return f.value
    own = [a for a in axes if a in f.axes]
    value = f.value
    if tuple(own) != f.axes:
        value = ops.permute_dims(value, tuple(f.axes.index(a) for a in own))
    sizes = dict(zip(own, value.shape, strict=True))
    return ops.reshape(value, tuple(sizes.get(a, 1) for a in axes))


def summed_out(ops: Ops, factors: Sequence[Factor], variables: Sequence[str]) -> list[Factor]:
    """The factors that are left when variables are summed out, one after another."""
    if not variables:
        return list(factors)
    sizes = {a: n for f in factors for a, n in zip(f.axes, f.value.shape, strict=True)}
    steps = _order(tuple(f.axes for f in factors), tuple(variables), tuple(sizes.items()))
    held = dict(enumerate(factors))
    for number, (name, members) in enumerate(steps, len(factors)):
        both = joined(ops, [held.pop(i) for i in members])
        axes = tuple(a for a in both.axes if a != name)
        held[number] = Factor(ops.logsumexp(both.value, axis=both.axes.index(name)), axes)
    return list(held.values())


@lru_cache(maxsize=256)
def _order(
    factors: tuple[tuple[Axis, ...], ...], variables: tuple[str, ...], sizes: tuple[tuple[Axis, int], ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Which variable to sum out when, and from which factors: those given are 0, 1, ..., and each sum adds the next."""
    size, axes = dict(sizes), {i: frozenset(f) for i, f in enumerate(factors)}
    holds: dict[str, dict[int, None]] = {v: {} for v in variables}
    for i, f in enumerate(factors):
        for a in f:
            if a in holds:
                holds[a][i] = None

    def price(v: str) -> int:
        return math.prod(size[a] for a in frozenset().union(*(axes[i] for i in holds[v])))

    rank = {v: i for i, v in enumerate(variables)}
    prices = {v: price(v) for v in variables}
    heap = [(prices[v], rank[v], v) for v in variables]
    heapq.heapify(heap)
    steps: list[tuple[str, tuple[int, ...]]] = []
    while heap:
        paid, _, v = heapq.heappop(heap)
        if prices.get(v) != paid:  # another price since
            continue
        members, new = tuple(holds.pop(v)), len(factors) + len(steps)
        steps.append((v, members))
        axes[new] = frozenset().union(*(axes[i] for i in members)) - {v}
        gone = frozenset(members)
        del prices[v]
        for u in axes[new]:
            if u in holds:
                kept = {i: None for i in holds[u] if i not in gone}
                holds[u] = {**kept, new: None}
                prices[u] = price(u)
                heapq.heappush(heap, (prices[u], rank[u], u))
    return tuple(steps)
