"""`assert_same_gradient`: one noise through a Pyro program and through its NumPyro twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import EstimatorError, site_error
from ..core.estimator import Noise
from ..core.objectives import Objective

NODES = 8  # continuous sites take one of so many quadrature nodes: away from the tails


class Twin(NamedTuple):
    """One side: an `EstimatorELBO` of one particle, a program, and what it is called with."""

    elbo: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Differ(AssertionError):
    """The twins' losses or gradients are not the same."""


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


def assert_same_gradient(
    pyro_twin: Twin | tuple[Any, ...],
    numpyro_twin: Twin | tuple[Any, ...],
    *,
    params: Mapping[str, Any] | None = None,
    draws: int = 5,
    seed: int = 0,
    rtol: float | None = None,
) -> None:
    """Assert that two programs give the same loss and the same gradient for the same noise: no statistics.

    A twin is ``(elbo, model, guide)``, ``(elbo, model, guide, args)`` or ``(elbo, model, guide, args, kwargs)``, with
    an `EstimatorELBO` of one particle each; sites, plates and parameters must have the same names and shapes. Values,
    the estimators' own noise, and minibatches are drawn once and given to both. (Discrete sites take any value of their
    support, continuous ones a quadrature node: the comparison needs no particular law.)

    ``params``: the point, ``{name: constrained value}``; else that of the Pyro twin. ``draws``: how many noises.
    ``rtol``: allowed difference of the loss, and of a gradient relative to its largest entry; 1e-9 in double
    precision, 1e-4 in single. Changes nothing: parameter store, ``.grad`` and random states stay as they are.

    Raises `Differ` (an AssertionError: parameter, both values), and `EstimatorError` for twins that cannot be compared.

    >>> assert_same_gradient((PyroELBO(), model, guide, (data,)), (NumPyroELBO(), jax_model, jax_guide, (data,)))
    ... # doctest: +SKIP
    """
    from ..numpyro.injected import loss_and_gradient as in_numpyro
    from ..pyro.injected import loss_and_gradient as in_pyro

    one, other = Twin(*pyro_twin), Twin(*numpyro_twin)
    _check(one, "pyro")
    _check(other, "numpyro")
    if draws < 1:
        raise ValueError(f"assert_same_gradient(draws=...) needs 1 or more, got {draws!r}.")
    for index in range(draws):
        given = Given(np.random.default_rng([seed, index]))
        loss, gradient, point = in_pyro(one, params, given)
        given.replay = True
        their_loss, theirs = in_numpyro(other, point, given)
        _compare(index, loss, gradient, their_loss, theirs, rtol)


def _check(twin: Twin, library: str) -> None:
    kind = type(twin.elbo)
    if not any(
        b.__name__ == "EstimatorELBO" and b.__module__.startswith(f"ppl_estimators.{library}") for b in kind.__mro__
    ):
        raise EstimatorError(
            f"assert_same_gradient: the {library} twin's ELBO must be ppl_estimators.{library}.EstimatorELBO, whose "
            f"noise can be given, got {kind.__module__}.{kind.__name__}."
        )
    if twin.elbo.num_particles != 1:
        raise EstimatorError(
            f"assert_same_gradient compares one particle, got num_particles={twin.elbo.num_particles} in the {library} "
            "twin. Use num_particles=1 in both."
        )
    assert isinstance(twin.elbo.objective, Objective)


def _compare(
    index: int, loss: float, gradient: Mapping[str, np.ndarray], their_loss: float, theirs: Mapping[str, np.ndarray],
    rtol: float | None,
) -> None:  # fmt: skip
    if gradient.keys() != theirs.keys():
        raise EstimatorError(
            f"the twins have different parameters: {sorted(gradient.keys() - theirs.keys())} only in Pyro, "
            f"{sorted(theirs.keys() - gradient.keys())} only in NumPyro."
        )
    single = any(g.dtype.itemsize < 8 for g in (*gradient.values(), *theirs.values()))
    allowed = rtol if rtol is not None else 1e-4 if single else 1e-9
    if not abs(loss - their_loss) <= allowed * max(1.0, abs(loss)):
        raise Differ(f"draw {index}: the loss is {loss:.12g} in Pyro and {their_loss:.12g} in NumPyro.")
    for name, g in gradient.items():
        if g.shape != theirs[name].shape:
            raise EstimatorError(
                f"parameter '{name}' has shape {g.shape} in Pyro and {theirs[name].shape} in NumPyro (unconstrained)."
            )
        difference = np.abs(g - theirs[name])
        if not (difference <= allowed * max(1.0, np.abs(g).max(initial=0))).all():
            worst = np.unravel_index(int(np.argmax(difference)), g.shape)
            where = str(list(map(int, worst))) if worst else ""
            raise Differ(
                f"draw {index}: the gradient of '{name}'{where} is {g[worst]:.12g} in Pyro and "
                f"{theirs[name][worst]:.12g} in NumPyro. Loss {loss:.12g} in both."
            )
