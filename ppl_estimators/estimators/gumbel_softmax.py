"""Gumbel-softmax: a relaxed draw in place of a discrete one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import relaxation
from ..core.estimator import Array, Draw, Ops, Site, Value
from .relaxed_value import Temperature, Tempered


@dataclass(frozen=True, eq=False, repr=False)
class GumbelSoftmax(Tempered):
    """Biased: differentiates the model at relaxed values, which are softmax-tempered Gumbel draws.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          ∇_a f(y),   y = σ((a + logit u) / λ), or softmax((log p − log(−log u)) / λ) for one-hot sites
    Requires      Bernoulli or OneHotCategorical sites; a model that accepts relaxed values and is differentiable in
                  them. One evaluation. Biased for every λ > 0, even for linear f; the variance grows like 1 / λ.
    For           models that are smooth between 0 and 1
    Not for       models that must see values that can occur

    The loss too is that of relaxed values, not a bound on the evidence: log p and −log q of the site are the discrete
    ones, extended linearly, not densities of y. ``temperature`` (λ) may be a function of the number of steps taken,
    such as ``lambda step: 0.5 + 0.5 * 0.999**step`` (NumPyro's `SVI.evaluate` hands over no state, and so sees it at
    step 0). Prefer it where the model is smooth between 0 and 1 and only relaxed values give a usable slope. Not
    recommended where the optimum itself matters: DisARM() and Reinforce(LeaveOneOut()) have no bias.
    GumbelStraightThrough() shows the model hard values.

    >>> GumbelSoftmax(temperature=0.7)
    GumbelSoftmax(0.7)

    Reference: Jang, Gu & Poole (2017), "Categorical Reparameterization with Gumbel-Softmax", arXiv:1611.01144;
    Maddison, Mnih & Teh (2017), "The Concrete Distribution", arXiv:1611.00712.
    """

    temperature: Temperature = 0.5

    value: ClassVar[Value] = Value.OWN

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        z = relaxation.unconditional(ops, site.family, site.logits, noise["u"])
        return Draw(relaxation.soften(ops, site.family, z, self.at(noise)))
