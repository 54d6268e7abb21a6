"""The mean over the other particles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import site_error
from ...core.keep import Kept
from ...core.ops import Array, Ops
from ...core.site import Site
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOut(Baseline):
    """For each particle the mean cost of the *other* particles, per element of the site's plates.

    ``Reinforce(LeaveOneOut())`` is RLOO, also known as VarGrad: (1/(K−1)) Σ_k (f_k − f̄) ∇ log q(z_k). Its cost does
    not grow with the number of sites, it keeps no state, and its variance is within K/(K−1) of the perfect constant
    baseline's. The default whenever there are several particles; needs at least two.

    >>> LeaveOneOut()
    LeaveOneOut()

    Reference: Kool, van Hoof & Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!"; Richter et al.
    (2020), "VarGrad", arXiv:2010.10436.
    """

    from_particles: ClassVar[bool] = True

    def check(self, site: Site, particles: int) -> None:
        if particles < 2:
            raise site_error(
                site.name,
                f"LeaveOneOut needs at least two particles, got num_particles={particles}",
                "Pass EstimatorELBO(..., num_particles=2) or more, or use Reinforce(MovingAverage()).",
            )

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        k = cost.shape[0]
        if k < 2:  # a site that a dynamic guide visited in one particle only
            return ops.zeros_like(cost)
        return (ops.sum(cost, axis=0, keepdims=True) - cost) / (k - 1)
