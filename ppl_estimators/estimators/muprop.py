"""MuProp: a first-order expansion of the mean-field model as control variate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Kept, Local, Ops, Relaxations, Site
from ..core.families import BERNOULLI, ONEHOT, mean_vjp, probabilities, score
from .baselines.base import Baseline, WithBaseline


@dataclass(frozen=True, eq=False, repr=False)
class MuProp(WithBaseline):
    """A linear control variate, expanded at the mean.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          (f(b) − f(p) − f'(p)·(b − p) − b₀) ∇_a log q_a(b) + ∇_a p · f'(p),   p the probabilities of the site
    Requires      Bernoulli or OneHotCategorical sites; a model that accepts their means and is differentiable in them.
                  Two evaluations, one of them differentiated. Unbiased.
    Not advised   for comparison; superseded by DisARM() and LeaveOneOut()

    While f(p) and its slope are evaluated, discrete sites downstream stand at their means too (those that cannot,
    such as integer Categorical sites, are drawn). f(p) is not the mean of f: without a ``baseline`` b₀ it is often no
    better than plain score function. Not recommended: superseded by DisARM() and LeaveOneOut(); kept for comparison.

    >>> MuProp(baseline=None)
    MuProp()

    Reference: Gu, Levine, Sutskever & Mnih (2016), "MuProp: Unbiased Backpropagation for Stochastic Neural Networks",
    arXiv:1511.05176.
    """

    baseline: Baseline | None = None

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, ONEHOT)
    instead: ClassVar[str] = "Use OneHotCategorical here, or Reinforce(LeaveOneOut())"

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(1, "mean")

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return probabilities(ops, site.family, ops.stop_gradient(site.logits))

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a = ops.stop_gradient(site.logits)
        s = score(ops, site.family, a, draw.value)  # b − p
        slope = ops.stop_gradient(costs.relaxed_slope[0])
        rest = ops.stop_gradient(costs.value - costs.relaxed[0]) - site.sum_elements(ops, slope * s)
        rest, auxiliary, state = self.subtract(ops, site, rest, kept)
        signal = site.spread(ops, rest, trailing=site.family == ONEHOT)
        gradient = signal * s + mean_vjp(ops, site.family, a, slope)
        return Local(ops.stop_gradient(gradient) * site.logits, auxiliary, state)
