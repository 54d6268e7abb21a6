"""The bound with a mean of the other particles in the place of each."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.estimator import Control
from .base import OfTheOthers

_MEANS = {"geometric": Control.GEOMETRIC, "arithmetic": Control.OTHERS}


@dataclass(frozen=True, eq=False, repr=False)
class VIMCO(OfTheOthers):
    """For each particle the bound with a mean of the *other* particles' weights in the place of its own.

    For           score functions under a bound of several particles
    Not for       the ELBO, whose baseline it is too, under the name of LeaveOneOut()

    Under `ImportanceWeighted` and `Renyi` the learning signal of particle k is L(w_1, ..., w_K) less L with ŵ_k in the
    place of w_k. The mean is "geometric", exp of the mean log weight, as published; or "arithmetic", which for the
    importance-weighted bound is the bound of the others, as `LeaveOneOut` has it. Neither has seen z_k. For the ELBO,
    a mean of log weights, both are the mean of the others' costs. Needs two particles or more.

    >>> VIMCO()
    VIMCO()

    Reference: Mnih & Rezende (2016), "Variational Inference for Monte Carlo Objectives", arXiv:1602.06725.
    """

    mean: str = "geometric"

    def __post_init__(self) -> None:
        if self.mean not in _MEANS:
            raise ValueError(f'VIMCO(mean=...) takes "geometric" or "arithmetic", got {self.mean!r}.')

    @property
    def control(self) -> Control:  # type: ignore[override]
        return _MEANS[self.mean]
