"""The gradient of the model's own parameters, averaged over every value that an estimator evaluates.

A cost term t below a group of sites is seen at the drawn value (number 0) and at A counterfactual ones, with weights
for which Σ_a w_a f(value_a) is an unbiased estimate of E[f]. Its own gradient then is

    ∇ 1/G Σ_g Σ_a w_{g,a} t_{g,a},   over the G groups above t.

Each group is unbiased by itself, so their mean is. The value of the term stays that of the drawn particles.

A bound L of several particles is a function of all their terms. Its own gradient is that of the mean over particles k,
and over all groups, of Σ_a w_{k,a} L, with the log weight that particle k has at value a in the place of its own
(`core.bounds.MultiSample`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .errors import EstimatorError, site_error, warn
from .estimator import Value
from .families import ONEHOT
from .ops import Array, Ops
from .plan import Group, Plan
from .site import Draw, Site, Term

Key = tuple[str, str]


class Average(NamedTuple):
    """What one group has to say: weights ``[1 + A, *plates]``, and terms by side and site, ``[A, *batch]``."""

    weights: Array
    terms: Mapping[Key, Array]


def check(plan: Plan) -> None:
    """Is there anything to average, and may it be?"""
    if plan.keeps_score and plan.sticking:
        name = min(plan.sticking)
        raise site_error(
            name,
            f"{plan.estimators[name]!r} under a bound weighs the path of its value, and average_model=True knows one "
            "weight for all of a particle",
            "Use Pathwise() here, or leave average_model=False.",
        )
    if plan.branches:
        raise EstimatorError(
            "EstimatorELBO(average_model=True): the program decides something on a drawn value, so the counterfactual "
            "runs may have other terms. Leave average_model=False for this program."
        )
    if not any(group.weighed for group in plan.groups):
        warn(
            "EstimatorELBO(average_model=True): no site has an estimator whose values can be averaged over, so the "
            "argument does nothing. DisARM(), ARMS(n), UnorderedSet(k), SumAndSample(k), Enumerate() and Repeat(n, "
            "Reinforce()) have.",
        )


def weights(
    ops: Ops, plan: Plan, group: Group, sites: Mapping[str, Site], draws: Mapping[str, Draw], like: Array | None
) -> Array:
    """``[1 + A, *plates]``, constants of differentiation."""
    name, *_ = group.sites
    asked = plan.estimators[name].alternatives(sites[name])
    if asked.weights is None:  # each site's values are draws of its own, so each of the joint ones is
        number = 1 + group.alternatives
        like = 1.0 * draws[name].value if like is None else like  # whose distribution has no logits
        return ops.full_like(ops.indices(number, like), 1 / number, dtype=like.dtype)
    return ops.stop_gradient(asked.weights(ops, sites[name], draws[name]))


def possible_at(plan: Plan, group: Group) -> bool:
    """Have the values of a group weights? For a bound, whose gradient is one of all terms, no value that is drawn again
    may carry only a part of its own."""
    partial = [n for n in plan.below(group) if plan.estimators[n].value is Value.PARTIAL]
    return group.weighed and not (plan.keeps_score and partial)


def possible(ops: Ops, site: Site, weight: Array, value: Array, drawn: Array) -> Array:
    """A counterfactual value, and the drawn one where its weight ``[*plates]`` is zero: it may be one that the model
    has no finite log probability for."""
    return ops.where(site.spread(ops, weight, trailing=site.family == ONEHOT) > 0, value, drawn)


def counted(plan: Plan, group: Group, terms: Sequence[Term]) -> list[Term]:
    """The terms below ``group`` whose own gradient can be had at another value: not -log q of a score site (it has
    none) or of one that sticks the landing, nor where a value drawn again carries only a part of its gradient. A
    factor or an observed site of the guide is a cost like those of the model."""
    latent = plan.estimators
    redrawn = plan.graph.descendants(frozenset(group.sites))
    partial = frozenset(n for n in redrawn if plan.estimators[n].value is Value.PARTIAL)
    return [
        t
        for t in terms
        if not t.depends_on & partial
        and (t.side == "model" or t.site not in latent or (latent[t.site].value.moves and t.site not in plan.sticking))
    ]


def averaged(ops: Ops, terms: Sequence[Term], averages: Sequence[Average]) -> list[Term]:
    """The terms with their own gradient averaged, their values as they were."""
    if not averages:
        return list(terms)
    result = []
    for t in terms:
        key = (t.side, t.site)
        above = [(aligned(ops, a.weights, t.value), a.terms[key]) for a in averages if key in a.terms]
        if above:
            mean = sum(w[0] * t.value + ops.sum(w[1:] * x, axis=0) for w, x in above) / len(above)
            rider = mean - ops.stop_gradient(mean)
            rider = ops.where(ops.isfinite(mean), rider, ops.zeros_like(rider))
            t = replace(t, value=ops.stop_gradient(t.value) + rider)
        result.append(t)
    return result


def aligned(ops: Ops, weights: Array, value: Array) -> Array:
    """``[1 + A, *plates]`` in the rank of ``[1 + A, *batch]``; batch dimensions count from the right."""
    count, *plates = weights.shape
    plates = plates[max(len(plates) - value.ndim, 0) :]
    return ops.reshape(weights, (count, *(1,) * (value.ndim - len(plates)), *plates))
