"""Formulas of counts (Poisson, Geometric, Binomial) and bits in their natural parameter, the log rate or the logit."""

from __future__ import annotations

from .families import BERNOULLI, POISSON
from .ops import Array, Ops
from .site import Site


def in_natural_units(ops: Ops, site: Site, gradient: Array) -> Array:
    """A surrogate whose gradient in the logit or log rate is ``gradient``, through the parameter that the site has."""
    if site.family == BERNOULLI:
        return ops.stop_gradient(gradient) * site.logits
    name = "rate" if site.family == POISSON else "probs"
    x = ops.stop_gradient(site.named[name])
    slope = x if name == "rate" else x * (1 - x)  # d parameter / d natural parameter
    safe = ops.where(slope > 0, slope, ops.ones_like(slope))
    return ops.stop_gradient(ops.where(slope > 0, gradient / safe, ops.zeros_like(gradient))) * site.named[name]
