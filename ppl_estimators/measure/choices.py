"""What a site can be where it is summed over: values of a finite support, or quadrature nodes, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..core import families
from ..core.errors import site_error
from ..core.ops import Array, Ops
from . import quadrature


class Laws(Protocol):
    """What is asked of a library's distributions. ``base`` is one without to_event, expand and mask."""

    ops: Ops
    #: its classes of these laws
    delta: Any
    normal: Any
    multivariate: Any
    mixture: Any
    transformed: Any
    #: supports that no parameter moves
    still: tuple[Any, ...]

    def unwrapped(self, fn: Any) -> Any: ...

    def family(self, fn: Any) -> str: ...

    def log_q(self, fn: Any, value: Array) -> Array: ...

    def values(self, base: Any) -> Any:
        """Of a finite support, ``[values, *event]``; None where it is not. May raise `NotImplementedError`."""

    def sampled(self, values: Any, fn: Any) -> Array:
        """As the distribution's own sampler returns them."""

    def only(self, fn: Any) -> Array:
        """The value of a Delta."""

    def array(self, numbers: np.ndarray, base: Any) -> Array:
        """In the dtype and on the device of a distribution's parameters."""

    def mixing(self, base: Any) -> Array:
        """Logits of a mixture's components."""

    def fixed(self, value: Array) -> Array:
        """A constant of differentiation, and a new array: no transform may answer from its cache."""


class Rule(NamedTuple):
    """``size`` choices for each of ``elements`` (a shape). ``value(fn, digits)`` is the value of a joint choice,
    ``weigh(fn, digits, value)`` the logarithm of its weight."""

    elements: tuple[int, ...]
    size: int
    value: Callable[[Any, Array], Array]
    weigh: Callable[[Any, Array, Array], Array]
    discrete: bool


def rule_of(laws: Laws, name: str, fn: Any, nodes: int) -> Rule:
    ops, base = laws.ops, laws.unwrapped(fn)
    if isinstance(base, laws.delta):
        return Rule((), 1, lambda fn, digits: laws.only(fn), lambda fn, digits, value: ops.zeros(()), True)
    shape = (*fn.batch_shape, *fn.event_shape)
    batch = shape[: len(shape) - len(base.event_shape)]
    try:
        support = laws.values(base)
    except NotImplementedError as error:
        raise _refused(laws, name, base, str(error)) from error
    if support is not None:

        def possible(fn: Any, digits: Array) -> Array:
            return laws.sampled(support, fn)[digits]

        return Rule(batch, len(support), possible, lambda fn, digits, value: ops.sum(laws.log_q(fn, value)), True)
    noise, size = _noise(laws, name, base, nodes)
    still = base.support in laws.still

    def value(fn: Any, digits: Array) -> Array:
        placed, _ = _place(laws, laws.unwrapped(fn), digits, nodes)
        placed = ops.broadcast_to(placed, (*fn.batch_shape, *fn.event_shape))
        return laws.fixed(placed) if still else placed

    def weigh(fn: Any, digits: Array, value: Array) -> Array:
        """The nodes stand still and the density moves, so a cost that jumps has its derivative; where the parameters
        move the support, the nodes move with it."""
        log_weight = _place(laws, laws.unwrapped(fn), digits, nodes)[1]
        if not still:
            return log_weight
        log_density = ops.sum(laws.log_q(fn, value))
        return ops.stop_gradient(log_weight - log_density) + log_density

    return Rule((*batch, *noise[len(base.batch_shape) :]), size, value, weigh, False)


def _noise(laws: Laws, name: str, base: Any, nodes: int) -> tuple[tuple[int, ...], int]:
    """Shape of a continuous distribution's noise, and choices per element."""
    if isinstance(base, (laws.normal, laws.multivariate)):
        event = base.event_shape if isinstance(base, laws.multivariate) else ()
        return (*base.batch_shape, *event), len(quadrature.hermite(nodes)[0])
    if isinstance(base, laws.mixture):
        if base.event_shape:
            raise _refused(laws, name, base, "its components are not one-dimensional")
        _, size = _noise(laws, name, laws.unwrapped(base.component_distribution), nodes)
        return base.batch_shape, laws.mixing(base).shape[-1] * size
    if isinstance(base, laws.transformed):
        whole, inner = base.base_dist.shape(), laws.unwrapped(base.base_dist)
        noise, size = _noise(laws, name, inner, nodes)
        return (*whole[: len(whole) - len(inner.shape())], *noise), size
    try:
        base.icdf(laws.ops.asarray(0.5))
    except (NotImplementedError, AttributeError, ImportError) as error:
        raise _refused(laws, name, base, "no quadrature is known for it") from error
    return base.batch_shape, len(quadrature.unit(nodes)[0])


def _place(laws: Laws, base: Any, digits: Array, nodes: int) -> tuple[Array, Array]:
    """Value and log weight of a continuous choice."""
    ops = laws.ops
    if isinstance(base, (laws.normal, laws.multivariate)):
        x, w = (laws.array(a, base)[digits] for a in quadrature.hermite(nodes))
        moved = base.scale * x if isinstance(base, laws.normal) else (base.scale_tril @ x[..., None])[..., 0]
        return base.loc + moved, ops.sum(w)
    if isinstance(base, laws.mixture):  # a component, then its own node
        part, logits = laws.unwrapped(base.component_distribution), ops.log_softmax(laws.mixing(base))
        components, size = logits.shape[-1], _noise(laws, "", part, nodes)[1]
        k, node = (digits // size)[..., None], (digits % size)[..., None]
        wide = (*digits.shape, components)
        values, _ = _place(laws, part, ops.broadcast_to(node, wide), nodes)
        _, log_weight = _place(laws, part, node, nodes)
        value = ops.take_last(ops.broadcast_to(values, wide), k)[..., 0]
        return value, ops.sum(ops.take_last(ops.broadcast_to(logits, wide), k)) + log_weight
    if isinstance(base, laws.transformed):
        value, log_weight = _place(laws, laws.unwrapped(base.base_dist), digits, nodes)
        for transform in base.transforms:
            value = transform(value)
        return value, log_weight
    u, w = (laws.array(a, base) for a in quadrature.unit(nodes))
    info = ops.finfo(u.dtype)
    return base.icdf(ops.clip(u, float(info.smallest_normal), 1 - float(info.eps) / 2)[digits]), ops.sum(w[digits])


def _refused(laws: Laws, site: str, base: Any, why: str) -> Exception:
    known = "Normal, MultivariateNormal, mixtures and transforms of them, and what has a quantile function (icdf)"
    if getattr(base.support, "is_discrete", False) or laws.family(base) in families.COUNTS:
        known = "distributions with a small finite support"
    return site_error(
        site,
        f"exact_gradient cannot sum over {type(base).__name__} ({why})",
        f"It sums over {known}. Pass assert_unbiased(..., reference={{...}}) if you know the gradient otherwise.",
    )
