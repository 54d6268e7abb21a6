"""Pyro distributions as the core sees them: family, logits, parameters, scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions import Delta, Distribution, MaskedDistribution, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import constraints

from ..core import distributions, families
from ..core.distributions import support_of
from ..core.plan import requested
from ..core.site import Plate, Site
from ..core.verify import Along
from .dependencies import reachable, tensors
from .ops import OPS

Array = torch.Tensor


class _Distributions(distributions.Distributions):
    ops, independent, expanded, masked = OPS, td.Independent, ExpandedDistribution, MaskedDistribution

    def classes(self, name: str) -> Any:
        return getattr(td, name, None) or getattr(dist, name)

    def mask(self, fn: Any) -> Array:
        return torch.as_tensor(fn._mask)

    def from_reals(self, support: Any) -> Any:
        return td.biject_to(support)

    def slopes(self, fn: TorchDistribution, value: Array) -> Sequence[Array] | None:
        base, found = unwrapped(fn), {k: v.detach().requires_grad_() for k, v in parameters(fn).items()}
        known = type(base).arg_constraints
        if {"probs", "logits"} <= known.keys():  # one law, whichever was given, and whatever was looked at since
            found.pop("probs", None)
            found["logits"] = base.logits.detach().expand((*fn.batch_shape, *fn.event_shape)).clone().requires_grad_()
        if not found or not found.keys() <= known.keys():
            return None
        with torch.enable_grad():
            try:
                again = type(base)(**found, validate_args=False)
            except (TypeError, ValueError):  # it takes what its arg_constraints do not name, or not all of that at once
                return None
            total = again.log_prob(value.detach()).sum()
            return torch.autograd.grad(total, [x for k, x in found.items() if not known[k].is_discrete])


_KNOWN = _Distributions()
unwrapped, unmasked, is_masked, family = _KNOWN.unwrapped, _KNOWN.unmasked, _KNOWN.is_masked, _KNOWN.family
natural_parameters, relaxed_log_prob, score_norm = _KNOWN.natural_parameters, _KNOWN.relaxed_log_prob, _KNOWN.score_norm
line, unlike = _KNOWN.line, _KNOWN.unlike


def describe(
    name: str, fn: TorchDistribution, plates: frozenset[Plate], scale: Any, infer: dict[str, Any], value: Any = None
) -> Site:
    """The site's facts and arrays, without lead axes."""
    return _KNOWN.described(
        name,
        fn,
        infer,
        distribution=type(unwrapped(fn)).__name__,
        plates=plates,
        reparameterised=reparameterised(fn, value),
        support_moves=support_moves(fn, value),
        scale=scale,
        law=Law(fn),
        value=value,
        requested=requested(name, infer),
    )


def reparameterised(fn: TorchDistribution, value: Array | None = None) -> bool:
    """Whether a draw can be differentiated: what the distribution says of itself, checked.

    A sampler that accepts and rejects can only in part (`score_parts`), nothing discrete can, and a ``value`` that was
    drawn from parameters with gradients must have one.
    """
    if not fn.has_rsample:
        return False
    base = unwrapped(fn)
    if isinstance(base, Delta):  # its draw is its parameter
        return True
    if Law(fn).discrete or (value is not None and not (value.is_floating_point() or value.is_complex())):
        return False
    if any(getattr(type(part), "score_parts", _WHOLE) is not _WHOLE for part in _chain(base)):
        return False
    if value is None or value.requires_grad or not torch.is_grad_enabled() or _of_the_libraries(base):
        return True
    return not any(x.requires_grad for x in reachable(vars(base)))


_WHOLE = Distribution.score_parts


def _chain(fn: Any) -> Iterator[Any]:
    """A distribution and those it transforms or wraps."""
    while fn is not None:
        base = unwrapped(fn)
        yield base
        fn = getattr(base, "base_dist", None)


def _of_the_libraries(base: Any) -> bool:
    return all(type(part).__module__.startswith(("torch.", "pyro.")) for part in _chain(base))


def support_moves(fn: TorchDistribution, value: Array | None = None) -> bool:
    """Whether the ends of the support move with the parameters, as far as these are differentiated here: those that it
    declares and, for a class of the user's, those that its log probability shows around ``value``."""
    base = unwrapped(fn)
    if not torch.is_grad_enabled() or Law(fn).discrete:
        return False
    held = [x for x in tensors(base) if x.requires_grad]
    if any(_moves(end, held) for end in _ends(base)):
        return True
    return bool(held) and value is not None and not _of_the_libraries(base) and _hidden_end_moves(base, value)


def _hidden_end_moves(base: Any, value: Array) -> bool:
    """Is there a point on either side of ``value`` beyond which log p is minus infinity (and before which it is not
    nearly so, as by an overflow), and do the parameters move it?"""
    if base.event_shape or not value.is_floating_point():
        return False

    def outside(law: Any, x: Array) -> Array:
        return torch.isneginf(law.log_prob(x))

    def nudged(by: float) -> Any:
        return _on_other_parameters(base, lambda x: x + by * (1 + x.abs()) if x.requires_grad else x)

    others = nudged(-1e-2), nudged(1e-2)
    with torch.no_grad():
        for side in (-1.0, 1.0):
            near, far = value.detach(), value.detach() + side * 1e4 * (1 + value.detach().abs())
            try:
                ended = outside(base, far)
                for _ in range(40 if ended.any() else 0):
                    middle = (near + far) / 2
                    beyond = outside(base, middle)
                    near, far = torch.where(beyond, near, middle), torch.where(beyond, middle, far)
                hard = ended & (base.log_prob(near) > -1e4)
                if any(bool((hard & (outside(law, near) | ~outside(law, far))).any()) for law in others):
                    return True
            except ValueError:  # it checks its arguments by itself
                continue
    return False


def _moves(end: Array, held: list[Array]) -> bool:
    if not end.requires_grad:
        return False
    slopes = torch.autograd.grad(end.sum(), held, retain_graph=True, allow_unused=True) if held else ()
    known = [s for s in slopes if s is not None]
    return not known or any(bool((s != 0).any()) for s in known)  # 0 * scale is an end that stays


def _ends(base: Any) -> list[Array]:
    """The ends of a support; those of a transformed distribution are images of its base's ends."""
    try:
        if type(base).support is td.TransformedDistribution.support:
            ends = _ends(unwrapped(base.base_dist))
            for transform in base.transforms:
                if transform.domain.event_dim:  # no interval
                    return []
                ends = [transform.with_cache(0)(end) for end in ends]
            return ends
        support = base.support
    except NotImplementedError:  # a class of the user's that declares none
        return []
    while "base_constraint" in vars(support):  # of several elements, or of a mixture
        support = support.base_constraint
    return [torch.as_tensor(vars(support)[k]) for k in ("lower_bound", "upper_bound") if k in vars(support)]


def named(fn: TorchDistribution) -> dict[str, Array]:
    """The parameters that the core knows the family by, else those of the distribution itself."""
    base, kind = unwrapped(fn), family(fn)
    if kind not in families.COUNTS:
        return parameters(fn)
    batch = (*fn.batch_shape, *fn.event_shape)  # whichever way the user gave them: probs or logits
    return {key: getattr(base, key).expand(batch) for key in families.COUNTS[kind]}


def parameters(fn: TorchDistribution) -> dict[str, Array]:
    """The parameters of the innermost distribution, broadcast to the batch and event shape."""
    base = unwrapped(fn)
    while hasattr(base, "base_dist") and family(fn) == families.OTHER:
        base = unwrapped(base.base_dist)
    outer = (*fn.batch_shape, *fn.event_shape)
    batch = outer[: len(outer) - len(base.event_shape)]
    found = {}
    for key, constraint in base.arg_constraints.items():
        x = vars(base).get(key)
        if isinstance(getattr(type(base), key, None), property):  # Beta keeps a Dirichlet and shows its parts
            x = getattr(base, key)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or constraint is constraints.dependent:
            continue
        n = constraint.event_dim
        found[key] = x.expand((*batch, *x.shape[x.ndim - n :]))
    return found


class Law(distributions.Law):
    """The distribution of one element, as the core may ask it."""

    known = _KNOWN

    def slope(self, z: Array) -> None:
        with torch.enable_grad():
            fn, leaves = _leaves(self.fn)
            f = fn.cdf(z)
            if f.requires_grad:
                torch.autograd.grad(f.sum(), leaves, allow_unused=True)


def _leaves(fn: Any) -> tuple[Any, list[Array]]:
    """A copy of ``fn`` on parameters of its own, and those parameters."""
    leaves: list[Array] = []

    def leaf(x: Array) -> Array:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    return _on_other_parameters(fn, leaf), leaves


def constant(fn: Any) -> Any:
    """The same distribution, its parameters constants of differentiation."""
    return _on_other_parameters(fn, torch.Tensor.detach)


def _on_other_parameters(fn: Any, change: Callable[[Array], Array]) -> Any:
    fn = copy.copy(fn)
    for key, x in vars(fn).items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            vars(fn)[key] = change(x)
        elif isinstance(x, td.Distribution):
            vars(fn)[key] = _on_other_parameters(x, change)
    return fn


def is_point(fn: Any) -> bool:
    """Is there nothing to draw?"""
    return isinstance(unwrapped(fn), Delta)


def divergence(q: TorchDistribution, p: TorchDistribution) -> Array:
    """KL(q ‖ p) ``[*batch]``, masked inside of them; `NotImplementedError` where no closed form is known."""
    return td.kl_divergence(q, p)


def another(fn: TorchDistribution, value: Array, pattern: int | Along) -> Array:
    """A value of the support that differs from ``value``, in the elements of a pattern where the support is known; on
    the real line one that lies further away from pattern to pattern."""
    if isinstance(pattern, Along):
        return _KNOWN.along(fn, value, another(fn, value, 0), pattern)
    if family(fn) in families.DISCRETE:
        return _KNOWN.moved_on(fn, value, pattern)
    for _ in range(4 + pattern):
        other = fn.sample()
        if not (pattern or torch.equal(other, value)):
            break
    if pattern and support_of(unwrapped(fn)) in (constraints.real, constraints.real_vector):
        return value + (1 + pattern) * (other - value)
    return other


def log_q(fn: TorchDistribution, value: Array) -> Array:
    """The score's log q(value) ``[*batch]``: neither masked nor scaled."""
    if family(fn) in families.DISCRETE:
        return _KNOWN.log_prob(fn, value, masked=False)
    # A new tensor, so that no transform answers from its cache: the inverse must depend on the parameters.
    return unmasked(fn).log_prob(value.clone())
