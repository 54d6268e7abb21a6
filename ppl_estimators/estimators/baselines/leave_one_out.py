"""The mean over the other particles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.estimator import Control
from .base import OfTheOthers


@dataclass(frozen=True, eq=False, repr=False)
class LeaveOneOut(OfTheOthers):
    """For each particle the mean cost of the *other* particles, per element of the site's plates.

    For           several particles; the default there
    Not for       nearly decided elements, where it can be noisier than no baseline: DisARM() or Enumerate()

    ``Reinforce(LeaveOneOut())`` is RLOO, also known as VarGrad: (1/(K−1)) Σ_k (f_k − f̄) ∇ log q(z_k). Its cost does
    not grow with the number of sites, and it keeps no state. The default whenever there are several particles; needs at
    least two.

    It is not the constant that minimises the variance, which is E[f s²] / E[s²] with s the score. The two are close for
    broad guides. Near the optimum they need not be: for a nearly decided bit the best constant is the cost of the
    *unlikely* value, and the other particles show that of the likely one. A bit that is on with probability 0.3, and
    then costs nothing, has 6.4 times the variance with two particles of leave-one-out that it has with no baseline; at
    0.1 it is 82 times. DisARM(), Enumerate() and OptimalConstant(PastSteps()) do not have this weakness, and
    `recommend` measures it.

    >>> LeaveOneOut()
    LeaveOneOut()

    Reference: Kool, van Hoof & Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!" [kool2019buy];
    Richter et al. (2020), "VarGrad", arXiv:2010.10436.
    """

    control: ClassVar[Control] = Control.OTHERS
