"""Pyro distributions as the core sees them: family, logits, parameters, scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import Delta, Distribution, Logistic, MaskedDistribution, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import constraints

from ..core import families, relaxation
from ..core.errors import site_error
from ..core.plan import requested
from ..core.site import Plate, Site
from ..core.verify import elements
from .dependencies import reachable, tensors
from .ops import OPS

Array = torch.Tensor
_WRAPPERS = (td.Independent, ExpandedDistribution, MaskedDistribution)


def unwrapped(fn: TorchDistribution) -> Any:
    """Without to_event, expand and mask."""
    while _wraps(type(fn)):
        fn = fn.base_dist
    return fn


_wraps: Callable[[type], bool] = lru_cache(maxsize=1024)(lambda kind: issubclass(kind, _WRAPPERS))


def unmasked(fn: TorchDistribution) -> Any:
    """The same distribution with no mask anywhere: a masked latent still has a score."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, ExpandedDistribution):
        return unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, td.Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def family(fn: TorchDistribution) -> str:
    return _family(type(unwrapped(fn)))


def _family_of(base: Any) -> str:
    if issubclass(base, td.Bernoulli):
        return families.BERNOULLI
    if issubclass(base, td.OneHotCategorical):
        return families.ONEHOT
    if issubclass(base, td.Categorical):
        return families.CATEGORICAL
    for kind, known in _CONTINUOUS.items():
        if issubclass(base, known) and base.arg_constraints.keys() == set(families.CONTINUOUS[kind]):
            return kind
    return next((kind for kind, known in _COUNTS.items() if issubclass(base, known)), families.OTHER)


_family: Callable[[type], str] = lru_cache(maxsize=1024)(_family_of)

_CONTINUOUS = {
    families.NORMAL: td.Normal,
    families.LAPLACE: td.Laplace,
    families.LOGISTIC: Logistic,
    families.GUMBEL: td.Gumbel,
    families.CAUCHY: td.Cauchy,
    families.EXPONENTIAL: td.Exponential,
    families.GAMMA: td.Gamma,
    families.BETA: td.Beta,
    families.DIRICHLET: td.Dirichlet,
}
_COUNTS: dict[str, Any] = {
    families.POISSON: td.Poisson,
    families.GEOMETRIC: td.Geometric,
    families.BINOMIAL: td.Binomial,
}


def describe(
    name: str, fn: TorchDistribution, plates: frozenset[Plate], scale: Any, infer: dict[str, Any], value: Any = None
) -> Site:
    """The site's facts and arrays, without lead axes."""
    base, kind = unwrapped(fn), family(fn)
    logits = natural_parameters(fn, kind)
    return Site(
        name=name,
        distribution=type(base).__name__,
        family=kind,
        batch_shape=tuple(fn.batch_shape),
        event_shape=tuple(fn.event_shape),
        plates=plates,
        reparameterised=reparameterised(fn, value),
        support_moves=support_moves(fn, value),
        scale=scale,
        logits=logits,
        named={} if logits is None else {"logits": logits},
        law=Law(fn),
        value=value,
        requested=requested(name, infer),
        analytic=infer.get("kl") == "analytic",
        declared=infer.get("_with_estimators"),
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


def natural_parameters(fn: TorchDistribution, kind: str) -> Array | None:
    """The logits of a family that has some, finite and in the shape of the site."""
    if kind not in families.DISCRETE:
        return None
    logits = families.finite(OPS, unwrapped(fn).logits)
    shape = fn.batch_shape + fn.event_shape
    if kind == families.CATEGORICAL:
        shape = shape + logits.shape[-1:]
    return logits if logits.shape == shape else logits.expand(shape)


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


class Law:
    """The distribution of one element (no to_event, expand or mask), as the core may ask it."""

    def __init__(self, fn: TorchDistribution):
        self.given = fn

    @cached_property
    def fn(self) -> Any:
        return unwrapped(self.given)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.fn.event_shape)

    @property
    def discrete(self) -> bool:
        try:
            return bool(self.fn.support.is_discrete)
        except NotImplementedError:  # a class of the user's that declares no support
            return False

    def cdf(self, z: Array) -> Array:
        return self.fn.cdf(z)

    def log_prob(self, z: Array) -> Array:
        return self.fn.log_prob(z)

    def slope(self, z: Array) -> None:
        """Differentiate the cdf in every parameter; raises what the library raises where it cannot."""
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


def relaxed_log_prob(name: str, side: str, fn: TorchDistribution, value: Array) -> Array:
    """log p at a relaxed value, masked."""
    if family(fn) not in families.RELAXABLE:
        raise relaxation.unknown(name, side, type(fn).__name__)
    return _named_log_prob(fn, value, masked=True)


def _named_log_prob(fn: TorchDistribution, value: Array, *, masked: bool) -> Array:
    """log p of a family with logits, ``[*batch]``."""
    kind = family(fn)
    log_p = families.log_prob(OPS, kind, unwrapped(fn).logits, value)
    events = len(fn.event_shape) - (kind == families.ONEHOT)
    for mask in _masks(fn, events) if masked else ():
        log_p = torch.where(mask, log_p, torch.zeros_like(log_p))
    return log_p.sum(tuple(range(-events, 0))) if events else log_p


def _masks(fn: Any, events: int) -> list[Array]:
    """Every mask inside ``fn``, broadcastable to one number per element."""
    masks, reinterpreted = [], 0
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, td.Independent):
            reinterpreted += fn.reinterpreted_batch_ndims
        elif isinstance(fn, MaskedDistribution):
            mask = torch.as_tensor(fn._mask)
            masks.append(mask.reshape(*mask.shape, *(1,) * (events - reinterpreted)) if mask.ndim else mask)
        fn = fn.base_dist
    return masks


def is_point(fn: Any) -> bool:
    """Is there nothing to draw?"""
    return isinstance(unwrapped(fn), Delta)


def is_masked(fn: Any) -> bool:
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def divergence(q: TorchDistribution, p: TorchDistribution) -> Array:
    """KL(q ‖ p) ``[*batch]``, masked inside of them; `NotImplementedError` where no closed form is known."""
    return td.kl_divergence(q, p)


def another(fn: TorchDistribution, value: Array, pattern: int) -> Array:
    """A value of the support that differs from ``value``, in the elements of a pattern where the support is known; on
    the real line one that lies further away from pattern to pattern."""
    kind = family(fn)
    if kind not in families.DISCRETE:
        for _ in range(4 + pattern):
            other = fn.sample()
            if not (pattern or torch.equal(other, value)):
                break
        with suppress(NotImplementedError):  # a class of the user's that declares no support
            if pattern and unwrapped(fn).support in (constraints.real, constraints.real_vector):
                return value + (1 + pattern) * (other - value)
        return other
    shape = value.shape[: value.ndim - (kind == families.ONEHOT)]
    moves = torch.zeros(shape.numel(), dtype=torch.bool)
    moves[elements(pattern, shape.numel())] = True
    moves = moves.reshape(shape).to(value.device)
    if kind == families.BERNOULLI:
        return torch.where(moves, 1 - value, value)
    if kind == families.CATEGORICAL:
        return torch.where(moves, (value + 1) % unwrapped(fn).logits.shape[-1], value)
    return torch.where(moves[..., None], value.roll(1, -1), value)


def log_q(fn: TorchDistribution, value: Array) -> Array:
    """The score's log q(value) ``[*batch]``: neither masked nor scaled."""
    if family(fn) in families.DISCRETE:
        return _named_log_prob(fn, value, masked=False)
    # A new tensor, so that no transform answers from its cache: the inverse must depend on the parameters.
    return unmasked(fn).log_prob(value.clone())


def score_norm(site: Site, fn: TorchDistribution, value: Array) -> Array:
    """Squared norm of d log q / d parameters, per plate element, ``[*plates]``."""
    if site.family in families.DISCRETE:
        s = families.score(OPS, site.family, site.logits.detach(), value) ** 2
        return site.sum_lanes(OPS, s if site.family == families.BERNOULLI else s.sum(-1))
    base, found = unwrapped(fn), {k: v.detach().requires_grad_() for k, v in parameters(fn).items()}
    known = type(base).arg_constraints
    if {"probs", "logits"} <= known.keys():  # one law, whichever was given, and whatever was looked at since
        found.pop("probs", None)
        found["logits"] = base.logits.detach().expand((*fn.batch_shape, *fn.event_shape)).clone().requires_grad_()
    if not found or not found.keys() <= known.keys():
        raise site_error(
            site.name,
            f"OptimalConstant needs the score in the distribution's own parameters, and {site.distribution} does not "
            "show them",
            "Use LeaveOneOut() or MovingAverage().",
        )
    with torch.enable_grad():
        total = type(base)(**found, validate_args=False).log_prob(value.detach()).sum()
        slopes = torch.autograd.grad(total, [x for k, x in found.items() if not known[k].is_discrete])
    n = len(site.batch_shape)
    squares: Array = sum((s**2).sum(tuple(range(n, s.ndim))) if s.ndim > n else s**2 for s in slopes)  # type: ignore[assignment]
    undeclared = tuple(i for i in site.lane_axes if i < n)
    return squares.sum(undeclared, keepdim=True) if undeclared else squares
