"""Errors and warnings that name the site, the fact, the reason and the fix."""

from __future__ import annotations


class EstimatorError(ValueError):
    """A choice that cannot work. The message reads ``site 'z': fact. Fix.``"""


class EstimatorWarning(UserWarning):
    """A choice that is legal but poor, or a step that went wrong without harm."""


def site_error(site: str, fact: str, fix: str) -> EstimatorError:
    """``site 'z': DisARM needs a Bernoulli site, got Normal. Use Pathwise() here.``"""
    return EstimatorError(f"site '{site}': {fact}. {fix}")
