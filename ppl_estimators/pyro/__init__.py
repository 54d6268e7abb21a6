"""Gradient estimators for Pyro: `EstimatorELBO` and the guide hook `with_estimators`."""

from .elbo import EstimatorELBO, JitEstimatorELBO
from .hook import with_estimators

__all__ = ["EstimatorELBO", "JitEstimatorELBO", "with_estimators"]
