"""The noise of one evaluation, chosen by the caller: what `injected` puts into a program of either library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import site_error
from ..core.estimator import Noise

NODES = 8  # continuous sites take one of so many quadrature nodes: away from the tails


class Twin(NamedTuple):
    """One side: an `EstimatorELBO` of one particle, a program, and what it is called with."""

    elbo: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


@dataclass
class Given:
    """The noise of one comparison. The Pyro twin asks first, and its answers are kept for the other."""

    rng: np.random.Generator
    kept: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)
    replay: bool = False

    def choices(self, site: str, elements: tuple[int, ...], size: int) -> np.ndarray:
        """Which of ``size`` values every element of the site takes, integers ``[*elements]``."""
        return self._get(site, "value", elements, lambda: self.rng.integers(size, size=elements))

    def noise(self, site: str, label: str, noise: Noise) -> np.ndarray:
        """What an estimator asked for."""
        draw: dict[str, Callable[[], Any]] = {
            "uniform": lambda: self.rng.uniform(size=noise.shape),
            "normal": lambda: self.rng.normal(size=noise.shape),
            "log gamma": lambda: np.log(self.rng.gamma(np.asarray(noise.concentration), size=noise.shape)),
            "poisson": lambda: self.rng.poisson(np.asarray(noise.concentration), size=noise.shape).astype(float),
        }
        return self._get(site, label, tuple(noise.shape), draw[noise.law])

    def minibatch(self, plate: str, size: int, part: int) -> np.ndarray:
        return self._get(plate, "minibatch", (part,), lambda: self.rng.permutation(size)[:part])

    def _get(self, site: str, label: str, shape: tuple[int, ...], draw: Callable[[], Any]) -> np.ndarray:
        key = (site, label)
        if key not in self.kept:
            if self.replay:
                known = ", ".join(sorted({f"'{s}'" for s, _ in self.kept})) or "none"
                raise site_error(
                    site,
                    f"the NumPyro twin draws '{label}' here, which the Pyro twin does not (it draws at {known})",
                    "Give both twins the same sites and the same estimators.",
                )
            self.kept[key] = np.asarray(draw())
        if self.kept[key].shape != shape:
            raise site_error(
                site,
                f"'{label}' has shape {self.kept[key].shape} in the Pyro twin and {shape} in the NumPyro twin",
                "Give the site the same batch and event shape in both.",
            )
        return self.kept[key]
