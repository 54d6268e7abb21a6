"""Errors and warnings that name the site, the fact, the reason and the fix."""

from __future__ import annotations

import sys
import warnings

#: whose frames a warning is not about
_OTHERS = sys.stdlib_module_names | {"ppl_estimators", "pyro", "numpyro", "torch", "jax"}


class EstimatorError(ValueError):
    """A choice that cannot work. The message reads ``site 'z': fact. Fix.``"""


class EstimatorWarning(UserWarning):
    """A choice that is legal but poor, or a step that went wrong without harm."""


def site_error(site: str, fact: str, fix: str) -> EstimatorError:
    """``site 'z': DisARM needs a Bernoulli site, got Normal. Use Pathwise() here.``"""
    return EstimatorError(f"site '{site}': {fact}. {fix}")


def of_the_other_library(mine: str, theirs: str) -> EstimatorError:
    """For an ELBO in the other library's SVI."""
    return EstimatorError(
        f"this EstimatorELBO is {mine}'s, and the SVI that asks is {theirs}'s. "
        f"Type: from ppl_estimators.{theirs.lower()} import EstimatorELBO"
    )


def warn(message: str) -> None:
    """An `EstimatorWarning` that points at the line of the user's own code that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OTHERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EstimatorWarning, stacklevel=level)
