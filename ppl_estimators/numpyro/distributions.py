"""NumPyro distributions as the core sees them: family, logits, parameters, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.transforms import AffineTransform, Transform

from ..core import distributions, families
from ..core.distributions import support_of
from ..core.errors import site_error
from ..core.site import Plate, Site
from ..core.verify import Along
from ..policy import requested
from .dependencies import differentiable, edges
from .ops import OPS

Array = Any

#: in a site's infer: in how many scans it is, one inside the other
SCANS = "_scans"


class _Distributions(distributions.Distributions):
    ops, independent, expanded, masked = OPS, dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution

    def classes(self, name: str) -> tuple[type, ...]:
        found = [getattr(dist, name + end, None) for end in ("", "Probs", "Logits")]
        return tuple(c for c in found if isinstance(c, type))  # Bernoulli itself is a function

    def family(self, fn: dist.Distribution) -> str:
        base = self.unwrapped(fn)
        if isinstance(base, (dist.MultinomialLogits, dist.MultinomialProbs)) and _draws_one(base):
            return families.ONEHOT  # NumPyro's one-hot categorical
        return super().family(base)

    def mask(self, fn: Any) -> Array:
        return jnp.asarray(fn._mask)

    def from_reals(self, support: Any) -> Any:
        return dist.biject_to(support)

    def slopes(self, fn: dist.Distribution, value: Array) -> Sequence[Array] | None:
        base, found = unwrapped(fn), parameters(fn)
        batch = (*fn.batch_shape, *fn.event_shape)
        counts = {  # of trials: whole numbers are no parameters to learn
            key: jnp.broadcast_to(getattr(base, key), batch)
            for key, constraint in type(base).arg_constraints.items()
            if key in vars(base) and (key not in found or constraint.is_discrete)
        }
        found = {k: x for k, x in found.items() if k not in counts}
        if not found or type(base).arg_constraints.keys() != found.keys() | counts.keys():
            return None

        def again(p: dict[str, Array]) -> dist.Distribution:
            return type(base)(**p, **counts, validate_args=False)

        try:
            again(found)
        except (TypeError, ValueError):  # it takes what its arg_constraints do not name, or not all of that at once
            return None
        slopes = jax.grad(lambda p: jnp.sum(again(p).log_prob(value)))
        return list(slopes(jax.lax.stop_gradient(found)).values())


_KNOWN = _Distributions()
unwrapped, unmasked, family = _KNOWN.unwrapped, _KNOWN.unmasked, _KNOWN.family
natural_parameters, relaxed_log_prob, score_norm = _KNOWN.natural_parameters, _KNOWN.relaxed_log_prob, _KNOWN.score_norm
line, unlike = _KNOWN.line, _KNOWN.unlike


def _draws_one(fn: Any) -> bool:
    """Is this Multinomial known to draw once, and so a one-hot categorical?"""
    if isinstance(fn, OneHotCategorical) or fn.total_count_max == 1:
        return True
    return not isinstance(fn.total_count, jax.core.Tracer) and bool(np.all(np.asarray(fn.total_count) == 1))


class OneHotCategorical(dist.MultinomialLogits):
    """A categorical distribution over one-hot vectors ``[..., C]``, which NumPyro does not have by this name.

    The same as ``Multinomial(total_count=1, ...)``, and recognised by relaxed estimators inside plates too, where
    ``total_count`` can no longer be seen. Give ``probs`` or ``logits``, ``[..., C]``.
    """

    def __init__(self, probs: Array | None = None, logits: Array | None = None, *, validate_args: bool | None = None):
        if (probs is None) == (logits is None):
            raise ValueError("OneHotCategorical takes probs or logits, one of the two.")
        if logits is None:
            logits = jnp.log(jnp.clip(probs, jnp.finfo(jnp.result_type(probs, float)).tiny))
        super().__init__(logits, 1, total_count_max=1, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        index = jax.random.categorical(key, self.logits, shape=(*sample_shape, *self.batch_shape))
        return jax.nn.one_hot(index, self.logits.shape[-1], dtype=self.logits.dtype)


def describe(
    name: str, fn: dist.Distribution, plates: frozenset[Plate], scale: Any, infer: dict[str, Any], value: Array = None
) -> Site:
    """The site's facts and arrays, without lead axes."""
    if infer.get("baseline"):
        raise site_error(
            name,
            'infer={"baseline": ...} is a word of Pyro\'s, which NumPyro does not read',
            'Write infer={"estimator": Reinforce(MovingAverage())}, say.',
        )
    site = _KNOWN.described(
        name,
        fn,
        infer,
        distribution=type(unwrapped(fn)).__name__.removesuffix("Logits").removesuffix("Probs"),
        plates=plates,
        reparameterised=reparameterised(fn),
        time=infer.get(SCANS, 0),
        scale=1.0 if scale is None else scale,
        law=Law(fn),
        value=value,
        requested=requested(name, infer),
    )
    return site if site.named else site.filled(named=named(fn))


def still(site: Site, fn: dist.Distribution) -> Site:
    """The facts of a site, with shapes in place of arrays."""
    scale = site.scale if isinstance(site.scale, (int, float)) else _shape(site.scale)
    arrays = jax.tree.map(_shape, {"value": site.value, "logits": site.logits, "named": dict(site.named)})
    return site.filled(**arrays, scale=scale, law=site.law.still(site.value))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def reparameterised(fn: dist.Distribution) -> bool:
    """Is a draw differentiable in every parameter that it depends on?

    ``has_rsample`` is a claim: it is true of every class that declares no ``arg_constraints``. NumPyro's own
    distributions are right about it; others are asked for their derivative. A Delta has nothing to draw.
    """
    if not fn.has_rsample or isinstance(unwrapped(fn), dist.Delta):
        return bool(fn.has_rsample)
    if Law(fn).discrete:
        return False
    return not _foreign(fn) or differentiable(lambda: fn.sample_with_intermediates(jax.random.key(0))[0])


def _foreign(fn: Any) -> bool:
    """Is any part of a distribution of a class that is not NumPyro's?"""
    if isinstance(fn, (list, tuple)):
        return any(_foreign(part) for part in fn)
    if not isinstance(fn, (dist.Distribution, Transform)):
        return False
    return not type(fn).__module__.startswith("numpyro.distributions.") or any(map(_foreign, vars(fn).values()))


def ends(fn: dist.Distribution) -> list[Array]:
    """What says where the support of one element begins and ends, as far as these are arrays: a parameter that reaches
    them moves the support, and has no score function there."""
    base = unwrapped(fn)
    if Law(fn).discrete:
        return []
    found = jax.tree.leaves(support_of(base))
    if _foreign(base):  # which may say less than there is
        with contextlib.suppress(Exception):  # whatever its log_prob raises is said where it is wanted
            found += edges(base.log_prob, jax.eval_shape(base.sample, jax.random.key(0)))
    if isinstance(base, dist.TransformedDistribution):  # NumPyro takes the image of an interval for the real line
        found += ends(base.base_dist)
        shape = _shape_of(support_of(base.base_dist))
        for transform in base.transforms:
            if not isinstance(transform, AffineTransform):
                shape = _shape_of(transform.codomain) if shape == "line" else "bounded"
            elif shape != "line":
                found += [transform.loc] if shape == "half-line" else [transform.loc, transform.scale]
                shape = "bounded"
    arrays = map(jnp.asarray, found)
    return [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]


def _shape_of(support: Any) -> str:
    if support in (constraints.real, constraints.real_vector):
        return "line"
    return "half-line" if support in (constraints.positive, constraints.nonnegative) else "bounded"


def named(fn: dist.Distribution) -> dict[str, Array]:
    """The parameters that the core knows the family by, else those of the distribution itself."""
    base, kind = unwrapped(fn), family(fn)
    if kind not in families.COUNTS:
        return parameters(fn)
    batch = (*fn.batch_shape, *fn.event_shape)  # whichever way the user gave them: probs or logits
    return {key: jnp.broadcast_to(jnp.asarray(getattr(base, key), float), batch) for key in families.COUNTS[kind]}


def parameters(fn: dist.Distribution) -> dict[str, Array]:
    """The parameters of the innermost distribution, broadcast to the batch and event shape that it has at this site."""
    base, shape = unwrapped(fn), (*fn.batch_shape, *fn.event_shape)
    while hasattr(base, "base_dist") and family(fn) == families.OTHER:
        inner = base.base_dist  # its event dimensions may have other sizes: a simplex has one element more
        batch = len(base.batch_shape)
        shape = (*shape[: len(shape) - len(base.event_shape)], *inner.batch_shape[batch:], *inner.event_shape)
        base = unwrapped(inner)
    batch_shape = shape[: len(shape) - len(base.event_shape)]
    found = {}
    for key, constraint in base.arg_constraints.items():
        x = vars(base).get(key)
        if x is None or isinstance(constraint, type(constraints.dependent)):
            continue
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        n = constraint.event_dim
        found[key] = jnp.broadcast_to(x, (*batch_shape, *x.shape[x.ndim - n :]))
    return found


class Law(distributions.Law):
    """The distribution of one element, as the core may ask it."""

    known = _KNOWN

    def slope(self, z: Array) -> None:
        leaves, tree = jax.tree.flatten(self.fn)
        _differentiate_cdf(tree, jax.tree.map(_shape, leaves), _shape(z))

    def still(self, z: Array) -> StillLaw:
        return StillLaw(self, z)


class StillLaw:
    """What can be asked of a `Law` without its arrays."""

    def __init__(self, law: Law, z: Array):
        self.event_shape, self.discrete = law.event_shape, law.discrete
        leaves, self._tree = jax.tree.flatten(law.fn)
        self._leaves, self._error = jax.tree.map(_shape, leaves), None
        if _foreign(law.fn):  # may hold arrays that are no leaves, and is asked at once
            self._tree = None
            try:
                law.slope(z)
            except Exception as error:  # without its traceback, which holds the arrays
                self._error = ValueError(f"{type(error).__name__}: {error}")

    def slope(self, z: Any) -> None:
        if self._error is not None:
            raise self._error
        if self._tree is not None:
            _differentiate_cdf(self._tree, self._leaves, z)


def _differentiate_cdf(tree: Any, leaves: list[Any], z: Any) -> None:
    def pull(leaves: list[Array], z: Array) -> Any:
        f, back = jax.vjp(lambda leaves: tree.unflatten(leaves).cdf(z), leaves)
        return back(jnp.ones_like(f))

    with contextlib.suppress(jax.errors.UnexpectedTracerError):  # parameters that the class does not declare
        jax.eval_shape(pull, leaves, z)


def cost_log_prob(fn: dist.Distribution, value: Array, intermediates: Any = None) -> Array:
    """log p(value) ``[*batch]``, masked. Bernoulli sites use our formula, right at logits of exactly 0."""
    if family(fn) == families.BERNOULLI:
        return _KNOWN.log_prob(fn, value, masked=True)
    if intermediates:
        return fn.log_prob(value, intermediates)
    return fn.log_prob(value)


def log_p_of_all(fn: dist.Distribution, values: Array, dim: int, *, masked: bool = False) -> Array:
    """log p of all values of a site, which lie along batch dimension ``dim``. NumPyro looks each of a categorical's up
    in an array with as many copies of the probabilities; they are these probabilities, moved there."""
    base = unwrapped(fn)
    if type(base) not in (dist.CategoricalLogits, dist.CategoricalProbs):
        return cost_log_prob(fn if masked else unmasked(fn), values)
    log_p = base.logits if type(base) is dist.CategoricalProbs else jax.nn.log_softmax(base.logits)
    missing = max(0, -dim - len(fn.batch_shape))
    log_p = jnp.broadcast_to(log_p, (*(1,) * missing, *fn.batch_shape, log_p.shape[-1]))
    log_p = jnp.swapaxes(log_p, dim - 1, -1)[..., 0]
    for mask in _KNOWN.masks(fn, 0) if masked else ():
        log_p = jnp.where(mask, log_p, 0.0)
    return log_p


def divergence(q: dist.Distribution, p: dist.Distribution) -> Array:
    """KL(q ‖ p) ``[*batch]``, masked; `NotImplementedError` where no closed form is known."""
    kind = family(q)
    if kind != family(p) or kind not in families.DISCRETE:  # for those NumPyro has none
        return jnp.broadcast_to(kl_divergence(q, p), q.batch_shape)
    found = families.divergence(OPS, kind, _KNOWN.logits(q, kind), _KNOWN.logits(p, kind))
    events = len(q.event_shape) - (kind == families.ONEHOT)
    ours, theirs = _KNOWN.masks(q, events), _KNOWN.masks(p, events)
    if bool(ours) != bool(theirs):
        raise NotImplementedError
    for mask in (*ours, *theirs):
        found = jnp.where(mask, found, 0.0)
    return jnp.sum(found, axis=tuple(range(len(q.batch_shape), found.ndim)))


def another(fn: dist.Distribution, value: Array, key: Array, pattern: int | Along) -> Array:
    """A value of the support that differs from ``value``, in the elements of a pattern where the support is known."""
    if isinstance(pattern, Along):
        return _KNOWN.along(fn, value, another(fn, value, key, 0), pattern)
    return _KNOWN.moved_on(fn, value, pattern) if family(fn) in families.DISCRETE else fn.sample(key)


def log_q(fn: dist.Distribution, value: Array) -> Array:
    """The score's log q(value) ``[*batch]``: neither masked nor scaled."""
    if family(fn) in families.DISCRETE:
        return _KNOWN.log_prob(fn, value, masked=False)
    return unmasked(fn).log_prob(value)


def sampled_dtype(fn: dist.Distribution) -> Any:
    """The dtype that the distribution's own sampler returns."""
    return jax.eval_shape(unwrapped(fn).sample, jax.random.key(0)).dtype
