"""Gradient estimators, one per sample site, for Pyro and NumPyro.

This module holds the specs and imports neither torch nor jax. The ELBOs are in `ppl_estimators.pyro` and
`ppl_estimators.numpyro`.
"""

from .core.errors import EstimatorError, EstimatorWarning
from .core.objectives import EvidenceLowerBound, ImportanceWeighted, Renyi
from .estimators.baselines.constant import Constant
from .estimators.baselines.learned import Given, Learned
from .estimators.baselines.leave_one_out import LeaveOneOut
from .estimators.baselines.moving_average import MovingAverage
from .estimators.baselines.optimal_constant import OptimalConstant
from .estimators.control_variate import ControlVariate
from .estimators.disarm import DisARM
from .estimators.enumerate import Enumerate
from .estimators.gapped_straight_through import GappedStraightThrough
from .estimators.generalized_pathwise import GeneralizedPathwise
from .estimators.gumbel_softmax import GumbelSoftmax
from .estimators.gumbel_straight_through import GumbelStraightThrough
from .estimators.implicit_pathwise import ImplicitPathwise
from .estimators.lax import LAX
from .estimators.pathwise import Pathwise
from .estimators.rao_gumbel import RaoGumbel
from .estimators.rebar import REBAR
from .estimators.reinforce import Reinforce
from .estimators.reinmax import ReinMax
from .estimators.rejection_pathwise import RejectionPathwise
from .estimators.relax import RELAX
from .estimators.sticking_the_landing import StickingTheLanding
from .estimators.straight_through import StraightThrough

__version__ = "0.1.0"

__all__ = [
    "LAX",
    "REBAR",
    "RELAX",
    "Constant",
    "ControlVariate",
    "DisARM",
    "Enumerate",
    "EstimatorError",
    "EstimatorWarning",
    "EvidenceLowerBound",
    "GappedStraightThrough",
    "GeneralizedPathwise",
    "Given",
    "GumbelSoftmax",
    "GumbelStraightThrough",
    "ImplicitPathwise",
    "ImportanceWeighted",
    "Learned",
    "LeaveOneOut",
    "MovingAverage",
    "OptimalConstant",
    "Pathwise",
    "RaoGumbel",
    "ReinMax",
    "Reinforce",
    "RejectionPathwise",
    "Renyi",
    "StickingTheLanding",
    "StraightThrough",
]
