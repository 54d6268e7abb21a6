"""Gradient estimators, one per sample site, for Pyro and NumPyro.

This module holds the specs and imports neither torch nor jax. The ELBOs are in `ppl_estimators.pyro` and
`ppl_estimators.numpyro`.
"""

from .core.errors import EstimatorError, EstimatorWarning
from .core.objectives import EvidenceLowerBound, ImportanceWeighted, Renyi
from .estimators.arm import ARM
from .estimators.arms import ARMS
from .estimators.arsm import ARSM
from .estimators.baselines.constant import Constant
from .estimators.baselines.learned import Given, Learned
from .estimators.baselines.leave_one_out import LeaveOneOut
from .estimators.baselines.moving_average import MovingAverage
from .estimators.baselines.optimal_constant import OptimalConstant
from .estimators.bit_flip import BitFlip
from .estimators.control_variate import ControlVariate
from .estimators.coupled_importance import CoupledImportance
from .estimators.disarm import DisARM
from .estimators.disarm_stick_breaking import DisARMStickBreaking
from .estimators.disarm_tree import DisARMTree
from .estimators.enumerate import Enumerate
from .estimators.pathwise import Pathwise
from .estimators.rebar import REBAR
from .estimators.reinforce import Reinforce
from .estimators.relax import RELAX
from .estimators.sticking_the_landing import StickingTheLanding
from .estimators.sum_and_sample import SumAndSample
from .estimators.ugc import UGC
from .estimators.unordered_set import UnorderedSet

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "ARMS",
    "ARSM",
    "REBAR",
    "RELAX",
    "UGC",
    "BitFlip",
    "Constant",
    "ControlVariate",
    "CoupledImportance",
    "DisARM",
    "DisARMStickBreaking",
    "DisARMTree",
    "Enumerate",
    "EstimatorError",
    "EstimatorWarning",
    "EvidenceLowerBound",
    "Given",
    "ImportanceWeighted",
    "Learned",
    "LeaveOneOut",
    "MovingAverage",
    "OptimalConstant",
    "Pathwise",
    "Reinforce",
    "Renyi",
    "StickingTheLanding",
    "SumAndSample",
    "UnorderedSet",
]
