"""Gradient estimators for Pyro: `EstimatorELBO` and the guide hook `with_estimators`."""

from .elbo import EstimatorELBO
from .hook import with_estimators

__all__ = ["EstimatorELBO", "with_estimators"]
