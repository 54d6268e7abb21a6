"""Gradient estimators for NumPyro: `EstimatorELBO` and the guide hook `with_estimators`."""

from .distributions import OneHotCategorical
from .elbo import EstimatorELBO
from .hook import with_estimators

__all__ = ["EstimatorELBO", "OneHotCategorical", "with_estimators"]
