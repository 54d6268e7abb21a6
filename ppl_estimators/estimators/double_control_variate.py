"""Leave-one-out with a second control variate: the slopes of the other particles' costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Estimator, Initial, Keeps, Kept, Local, Ops, Relaxations, Site
from ..core.families import BERNOULLI, ONEHOT, mean_vjp, score
from ..core.particles import of_the_others


@dataclass(frozen=True, eq=False, repr=False)
class DoubleControlVariate(Estimator):
    """Leave-one-out, with a linear control variate from the slopes at the other particles' draws.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          1/K Σ_k { [f_k + α c_k − 1/(K−1) Σ_{j≠k} (f_j + α c_j)] (b_k − p) − α ∇_a p · ḡ_k },
                  c_k = ḡ_k · (b_k − p),   ḡ_k = 1/(K−1) Σ_{j≠k} ∇f(b_j)
    Requires      Bernoulli or OneHotCategorical sites; two particles or more; a model that is differentiable in the
                  site's value. Two evaluations per particle, the second for the slope. Unbiased for every α.
    For           several particles, and slopes that resemble differences
    Not for       probabilities near ½, where it is LeaveOneOut() at a higher price

    α (``coefficient``) starts at 0, which is leave-one-out, and is trained by your optimiser on the variance of the
    site's local gradient; useful values are negative, −1 where f is close to linear. It pays where the slope of f at
    0 and 1 resembles the difference f(1) − f(0), and where the probabilities are away from ½; elsewhere it costs a
    backward pass for nothing.

    >>> DoubleControlVariate()
    DoubleControlVariate()

    Reference: Titsias & Shi (2022), "Double Control Variates for Gradient Estimation in Discrete Latent Variable
    Models", arXiv:2111.05300.
    """

    coefficient: float = 0.0

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI, ONEHOT)
    compares: ClassVar[bool] = True
    instead: ClassVar[str] = "Use OneHotCategorical here, or Reinforce(LeaveOneOut())"

    def relaxations(self, site: Site) -> Relaxations:
        return Relaxations(1, "drawn")

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return Keeps(parameters={"coefficient": Initial(value=self.coefficient)})

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        return ops.like(draw.value, site.logits)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a = ops.stop_gradient(site.logits)
        k, alpha, onehot = costs.value.shape[0], kept.parameters["coefficient"], site.family == ONEHOT
        s = score(ops, site.family, a, draw.value)  # b − p
        slope = of_the_others(ops, ops.stop_gradient(costs.relaxed_slope[0]))
        f = ops.stop_gradient(costs.value) + alpha * site.sum_elements(ops, slope * s)
        signal = site.spread(ops, f - of_the_others(ops, f), trailing=onehot)
        gradient = signal * s - alpha * mean_vjp(ops, site.family, a, slope)
        mean = ops.sum(gradient / site.spread(ops, site.unit(ops, f), onehot), axis=0) / k
        return Local(ops.stop_gradient(gradient) * site.logits, k * mean**2)
