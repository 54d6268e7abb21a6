"""VarGrad, a name for leave-one-out."""

from __future__ import annotations

from .baselines.leave_one_out import LeaveOneOut
from .reinforce import Reinforce


def VarGrad() -> Reinforce:
    """The gradient of ½ Var[log q − log p], which for the ELBO is the score function with leave-one-out.

    >>> VarGrad()
    Reinforce(LeaveOneOut())

    Reference: Richter, Boustati, Nüsken, Ruiz & Akyildiz (2020), "VarGrad: A Low-Variance Gradient Estimator for
    Variational Inference", arXiv:2010.10436.
    """
    return Reinforce(LeaveOneOut())
