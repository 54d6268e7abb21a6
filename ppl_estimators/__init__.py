"""Gradient estimators, one per sample site, for Pyro and NumPyro.

This module holds the specs and imports neither torch nor jax. The ELBOs are in `ppl_estimators.pyro` and
`ppl_estimators.numpyro`.
"""

from .citations import citation
from .core.bounds import ImportanceWeighted, Renyi, WakeSleep
from .core.errors import EstimatorError, EstimatorWarning
from .core.objectives import AnalyticKL, EvidenceLowerBound, KLAnnealed
from .core.regression import OtherParticles, PastSteps
from .estimators.antithetic import Antithetic
from .estimators.arm import ARM
from .estimators.arms import ARMS
from .estimators.arsm import ARSM
from .estimators.average import Average
from .estimators.baselines.constant import Constant
from .estimators.baselines.learned import Given, Learned
from .estimators.baselines.leave_one_out import LeaveOneOut
from .estimators.baselines.moving_average import MovingAverage
from .estimators.baselines.optimal_constant import OptimalConstant
from .estimators.baselines.vimco import VIMCO
from .estimators.bit_flip import BitFlip
from .estimators.combine import Combine
from .estimators.control_variate import ControlVariate
from .estimators.coupled_importance import CoupledImportance
from .estimators.delta_method import DeltaMethod
from .estimators.disarm import DisARM
from .estimators.disarm_stick_breaking import DisARMStickBreaking
from .estimators.disarm_tree import DisARMTree
from .estimators.double_control_variate import DoubleControlVariate
from .estimators.doubly_reparameterized import DoublyReparameterized
from .estimators.enumerate import Enumerate
from .estimators.evolution_strategy import EvolutionStrategy
from .estimators.gapped_straight_through import GappedStraightThrough
from .estimators.generalized_pathwise import GeneralizedPathwise
from .estimators.gumbel_softmax import GumbelSoftmax
from .estimators.gumbel_straight_through import GumbelStraightThrough
from .estimators.implicit_pathwise import ImplicitPathwise
from .estimators.importance_sampled import ImportanceSampled
from .estimators.lax import LAX
from .estimators.measure_valued import MeasureValued
from .estimators.muprop import MuProp
from .estimators.nvil import NVIL
from .estimators.pathwise import Pathwise
from .estimators.rao_gumbel import RaoGumbel
from .estimators.rebar import REBAR
from .estimators.reinforce import Reinforce
from .estimators.reinmax import ReinMax
from .estimators.rejection_pathwise import RejectionPathwise
from .estimators.relax import RELAX
from .estimators.relax_with_model import RELAXWithModel
from .estimators.repeat import Repeat
from .estimators.smoothed_triple import SmoothedTriple
from .estimators.stein import Stein
from .estimators.sticking_the_landing import StickingTheLanding
from .estimators.stochastic_triple import StochasticTriple
from .estimators.straight_through import StraightThrough
from .estimators.sum_and_sample import SumAndSample
from .estimators.sum_around_mode import SumAroundMode
from .estimators.ugc import UGC
from .estimators.unordered_set import UnorderedSet
from .estimators.vargrad import VarGrad

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "ARMS",
    "ARSM",
    "LAX",
    "NVIL",
    "REBAR",
    "RELAX",
    "UGC",
    "VIMCO",
    "AnalyticKL",
    "Antithetic",
    "Average",
    "BitFlip",
    "Combine",
    "Constant",
    "ControlVariate",
    "CoupledImportance",
    "DeltaMethod",
    "DisARM",
    "DisARMStickBreaking",
    "DisARMTree",
    "DoubleControlVariate",
    "DoublyReparameterized",
    "Enumerate",
    "EstimatorError",
    "EstimatorWarning",
    "EvidenceLowerBound",
    "EvolutionStrategy",
    "GappedStraightThrough",
    "GeneralizedPathwise",
    "Given",
    "GumbelSoftmax",
    "GumbelStraightThrough",
    "ImplicitPathwise",
    "ImportanceSampled",
    "ImportanceWeighted",
    "KLAnnealed",
    "Learned",
    "LeaveOneOut",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "OptimalConstant",
    "OtherParticles",
    "PastSteps",
    "Pathwise",
    "RELAXWithModel",
    "RaoGumbel",
    "ReinMax",
    "Reinforce",
    "RejectionPathwise",
    "Renyi",
    "Repeat",
    "SmoothedTriple",
    "Stein",
    "StickingTheLanding",
    "StochasticTriple",
    "StraightThrough",
    "SumAndSample",
    "SumAroundMode",
    "UnorderedSet",
    "VarGrad",
    "WakeSleep",
    "citation",
]
