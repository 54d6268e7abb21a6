"""What both `Gradients` share: kinds of draws, names, and errors that name the user's mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..core.errors import EstimatorError

#: called with the number of draws done so far
Progress = Callable[[int], None]

#: the part of the gradient that reaches the parameters through no latent site's distribution: the model's own
EXPLICIT = "(explicit)"

#: losses ``[chunk, ...]`` and gradients ``{name: [chunk, ...]}``
Chunks = Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]


class GradientDraws:
    """The draws of a `Gradients`, each a function of ``(seed, index)``; the first index is ``start``."""

    sites: list[str]

    def _chunks(self, kind: str, num_draws: int, seed: int, progress: Progress | None = None, start: int = 0) -> Chunks:
        raise NotImplementedError

    def draws(self, num_draws: int, seed: int = 0, progress: Progress | None = None, start: int = 0) -> Chunks:
        """Losses ``[chunk]`` and gradients ``{name: [chunk, ...]}``."""
        return self._chunks("total", num_draws, seed, progress, start)

    def parts(self, num_draws: int, seed: int = 0) -> Chunks:
        """The same draws in parts: ``{name: [chunk, 1 + sites, ...]}``, in the order of ``part_names``.

        A site's part is the gradient that reaches the cost by way of its own distribution and no later site's: its
        surrogate, or the cost's slope in its reparameterised value, followed back to every parameter. The parts sum
        to the gradient.
        """
        return self._chunks("parts", num_draws, seed)

    def pairs(self, num_draws: int, seed: int = 0) -> Chunks:
        """Two draws for each of ``num_draws`` minibatches: losses ``[chunk, 2]``, ``{name: [chunk, 2, ...]}``."""
        return self._chunks("pairs", num_draws, seed)

    @property
    def part_names(self) -> list[str]:
        return [EXPLICIT, *self.sites]


def kept_by_estimators(name: str, sites: Iterable[str]) -> bool:
    """Is a parameter an estimator's own (``"z$network.w1"``), trained on another objective than the ELBO?"""
    return any(re.match(re.escape(site) + r"\$(?!\$)", name) for site in sites)


def check_program(elbo: Any, model: Any, guide: Any) -> None:
    """Complain of arguments in the wrong order, before the libraries do it in their own words."""
    if isinstance(elbo, type):
        raise EstimatorError(f"elbo is the class {elbo.__name__}, not an ELBO. Write {elbo.__name__}().")
    for role, thing in (("model", model), ("guide", guide)):
        if not callable(thing):
            raise EstimatorError(f"the {role} is not callable, got {thing!r}. Pass (elbo, model, guide, *args).")


def check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Every given parameter must be one of the program's."""
    known = list(known)
    for name in given:
        if name not in known:
            there = ", ".join(f"'{k}'" for k in known) or "none"
            raise EstimatorError(f"params: '{name}' is no parameter of model or guide. Parameters: {there}.")


def check_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(given) != tuple(wanted):
        raise EstimatorError(f"params: '{name}' has shape {tuple(given)}, the program's has {tuple(wanted)}.")


def check_sites(sites: Iterable[str], parameters: Iterable[str]) -> None:
    """A guide without latent sites, or a program without parameters, has no gradient to look at."""
    if not list(sites):
        raise EstimatorError(
            "the guide has no latent sites: nothing is sampled in it. Is it the model, or is every site observed?"
        )
    if not list(parameters):
        raise EstimatorError("neither model nor guide has a parameter. Declare some with param(...), or a module.")
