"""`assert_same_gradient`: one noise through a Pyro program and through its NumPyro twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends import Library
from ..core.errors import EstimatorError
from ..measure.chosen import Given, Twin


class Differ(AssertionError):
    """The twins' losses or gradients are not the same."""


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
    one, other = Twin(*pyro_twin), Twin(*numpyro_twin)
    _check(one, Library.pyro)
    _check(other, Library.numpyro)
    if draws < 1:
        raise ValueError(f"assert_same_gradient(draws=...) needs 1 or more, got {draws!r}.")
    for index in range(draws):
        given = Given(np.random.default_rng([seed, index]))
        loss, gradient, point = Library.pyro.part("injected").loss_and_gradient(one, params, given)
        given.replay = True
        their_loss, theirs = Library.numpyro.part("injected").loss_and_gradient(other, point, given)
        _compare(index, loss, gradient, their_loss, theirs, rtol)


def _check(twin: Twin, library: Library) -> None:
    kind = type(twin.elbo)
    if not isinstance(twin.elbo, library.adapter.EstimatorELBO):
        raise EstimatorError(
            f"assert_same_gradient: the {library} twin's ELBO must be ppl_estimators.{library}.EstimatorELBO, whose "
            f"noise can be given, got {kind.__module__}.{kind.__name__}."
        )
    if twin.elbo.num_particles != 1:
        raise EstimatorError(
            f"assert_same_gradient compares one particle, got num_particles={twin.elbo.num_particles} in the {library} "
            "twin. Use num_particles=1 in both."
        )


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
