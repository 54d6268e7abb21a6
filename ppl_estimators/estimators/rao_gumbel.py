"""Gumbel straight-through with the relaxation averaged given the hard draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core import relaxation
from ..core.estimator import Array, Draw, Noise, Ops, Site
from ..core.families import BERNOULLI, finite
from .relaxed_value import Temperature, Tempered, hard, with_slope


@dataclass(frozen=True, eq=False, repr=False)
class RaoGumbel(Tempered):
    """Biased: Gumbel straight-through, its slope averaged over the relaxed values that give the drawn one.

    Approximates  ∇_a E_{b ~ q_a}[f(b)]
    With          f'(b) · 1/R Σ_r ∂_a σ_λ(a + G_r),   a + G_r = z̃_r ~ p(z | H(z) = b), each G_r held fixed
    Requires      Bernoulli or OneHotCategorical sites; a model differentiable in the value. One evaluation whatever
                  R is. Biased as GumbelStraightThrough(λ) is: the mean is the same, the variance is smaller.
    For           low temperatures; wherever you would use Gumbel straight-through
    Not for       when the optimum itself matters

    f' depends on b alone, so averaging what is left over R conditional draws only removes noise, and R costs next to
    nothing beside the model. Prefer it to GumbelStraightThrough() always. It permits lower temperatures, and so less
    bias; DisARM() and Reinforce(LeaveOneOut()) have none. ``temperature`` (λ) may be a function of the number of
    steps taken.

    >>> RaoGumbel(20, 0.3)
    RaoGumbel(20, 0.3)

    Reference: Paulus, Maddison & Krause (2021), "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient
    Estimator", arXiv:2010.04838.
    """

    r: int = 10
    temperature: Temperature = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"RaoGumbel(r=...) needs one or more conditional draws, got {self.r!r}.")

    def noise(self, site: Site) -> Mapping[str, Noise]:
        own = super().noise(site)
        return {**own, **{f"v{i}": own["u"] for i in range(self.r)}}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        b, temperature = hard(ops, site, noise), self.at(noise)
        a = site.logits if site.family == BERNOULLI else finite(ops, ops.log_softmax(site.logits))
        soft = []
        for i in range(self.r):
            z_tilde = relaxation.conditional(ops, site.family, a, noise[f"v{i}"], b)
            soft.append(relaxation.soften(ops, site.family, a + ops.stop_gradient(z_tilde - a), temperature))
        return Draw(with_slope(ops, b, sum(soft) / self.r))
