"""`assert_unbiased`: does the mean gradient of an ELBO equal the exact one?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import of_elbo, of_program
from ..core.errors import EstimatorError
from ..core.objectives import Objective
from ..measure.gradients import check_program, kept_by_estimators
from ..measure.states import Exact, Minibatches
from .draws import Differences
from .exact import exact_gradient
from .power import Outcome, Wanted, measure


class Biased(AssertionError):
    """The mean gradient is not the exact one. ``sigmas``: ``{parameter: distance in standard errors, per entry}``."""

    def __init__(self, message: str, sigmas: Mapping[str, np.ndarray]):
        super().__init__(message)
        self.sigmas = sigmas


class TooFewDraws(AssertionError):
    """So many draws could not have seen the bias that was to be seen. ``needed``: about how many could."""

    def __init__(self, message: str, needed: float):
        super().__init__(message)
        self.needed = needed


@dataclass(frozen=True)
class Unbiased:
    """What was found where nothing was wrong.

    ``draws``: how many were taken. ``sigmas``: the farthest entry, in standard errors. ``sees``: the relative bias
    that would have been found with the wanted probability.
    """

    draws: int
    sigmas: float
    sees: float


def assert_unbiased(
    elbo: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: Mapping[str, Any] | None = None,
    reference: Exact | Mapping[str, Any] | None = None,
    able_to_see: float = 0.05,
    false_alarms: float = 0.01,
    detection: float = 0.99,
    max_draws: int = 200_000,
    seed: int = 0,
    nodes: int = 24,
    max_states: int = 20_000,
    minibatches: Minibatches | None = None,
    **kwargs: Any,
) -> Unbiased:
    """Assert that the gradient of ``elbo`` has the right mean at one point, with a stated power.

    ``elbo``: any ELBO of Pyro or NumPyro, ours, stock or your own subclass; one draw is one gradient of its loss, all
    its particles included; its objective is that of ours. ``reference``: the exact gradient, of the loss and in the
    unconstrained parameters, if `exact_gradient` cannot find it. Parameters that it does not name are not compared.

    A correct gradient fails with probability ``false_alarms`` at most. One whose mean is off by ``able_to_see`` times
    the length ‖g‖ of the exact gradient over all parameters, in whatever direction, fails with probability
    ``detection`` at least: every entry's mean is held against its standard error (Bonferroni over the entries), and
    as many draws are taken as that needs, (c + z)² Σσ² / (able_to_see ‖g‖)², the variances estimated as it goes. The
    probabilities hold as well as the central limit theorem does: events of probability 1/draws are beyond it.

    ``max_draws``: a Pyro step takes about a millisecond, so give noisy ELBOs particles
    (``num_particles=1000, vectorize_particles=True``) there. Draws are seeded: the same call gives the same answer.
    ``params``, ``nodes``, ``max_states``, ``minibatches``: as in `exact_gradient`. Other arguments go to model and
    guide.

    Raises `Biased` (an AssertionError: parameter, standard errors, exact, found), `TooFewDraws` (an AssertionError)
    where ``max_draws`` could not have seen such a bias, and `EstimatorError` for what cannot be compared.

    >>> assert_unbiased(EstimatorELBO({"z": DisARM()}), model, guide, data)  # doctest: +SKIP
    Unbiased(draws=5312, sigmas=1.4, sees=0.049)
    """
    wanted = Wanted(able_to_see, false_alarms, detection)
    if max_draws < 2:
        raise ValueError(f"assert_unbiased(max_draws=...) needs 2 or more, got {max_draws!r}.")
    check_program(elbo, model, guide)
    library = of_elbo(elbo) or of_program(model, guide, args, kwargs)
    if reference is None:
        objective = _objective(elbo)
        reference = exact_gradient(
            model, guide, *args, params=params, nodes=nodes, max_states=max_states, minibatches=minibatches,
            backend=library, objective=objective, num_particles=getattr(elbo, "num_particles", 1), **kwargs,
        )  # fmt: skip
    off = 0.0
    if isinstance(reference, Exact):
        off, params = reference.quadrature_error, {**_trained(reference), **(params or {})}
        reference = reference.gradient
    gradients = library.gradients(elbo, model, guide, args, kwargs, params, seed=seed)
    target = _comparable(reference, gradients)
    length = float(np.linalg.norm(np.concatenate([np.ravel(g) for g in target.values()])))
    if length < 1e-6:
        raise EstimatorError(
            f"the exact gradient is zero (length {length:.1e}), so that no relative bias can be stated. "
            "Move the parameters away from the optimum with params={...}."
        )
    if off > 0.1 * able_to_see * length:
        raise EstimatorError(
            f"the reference is off by up to {off:.1e} itself, by its quadrature, and its length is {length:.2e}. "
            "Pass more nodes=."
        )
    draws = Differences(gradients, target, seed)
    outcome = measure(draws, length, wanted, max_draws, lambda spread: off + 200 * draws.eps * (length + spread))
    return _judge(outcome, target, wanted, max_draws)


def _trained(exact: Exact) -> dict[str, Any]:
    """The point, without what estimators keep and what is not trained."""
    there = {name.partition("[")[0] for name in exact.gradient}
    return {n: v for n, v in exact.params.items() if n in there and not kept_by_estimators(n, exact.sites)}


def _objective(elbo: Any) -> Objective | None:
    objective = getattr(elbo, "objective", None)
    if isinstance(objective, Objective):
        return objective
    if {base.__name__ for base in type(elbo).__mro__} & {"RenyiELBO", "ReweightedWakeSleep", "TraceTailAdaptive_ELBO"}:
        raise EstimatorError(
            f"{type(elbo).__name__}: its objective is not the ELBO, whose gradient exact_gradient finds. Pass the "
            "exact gradient of its loss as reference={...}."
        )
    return None


def _comparable(reference: Mapping[str, Any], gradients: Any) -> dict[str, np.ndarray]:
    """The reference as arrays, without what belongs to estimators; every parameter there, and in its shape."""
    target = {n: np.asarray(g, float) for n, g in reference.items() if not kept_by_estimators(n, gradients.sites)}
    if not target:
        raise EstimatorError("the reference names no parameter, so there is nothing to compare.")
    for name, g in target.items():
        if name not in gradients.names:
            raise EstimatorError(f"the reference names '{name}', the program's parameters are {gradients.names}.")
        if gradients.shapes[name] != g.shape:
            raise EstimatorError(
                f"parameter '{name}': the reference has shape {g.shape}, the gradient {gradients.shapes[name]} (of the "
                "unconstrained parameter)."
            )
        if not np.isfinite(g).all():
            raise EstimatorError(f"parameter '{name}': the reference is not finite: {g}.")
    return target


def _judge(outcome: Outcome, target: Mapping[str, np.ndarray], wanted: Wanted, max_draws: int) -> Unbiased:
    labels = [
        f"'{name}'" + (str(list(index)) if index else "") for name, g in target.items() for index in np.ndindex(g.shape)
    ]
    exact = np.concatenate([np.ravel(g) for g in target.values()])
    n = outcome.draws
    if np.isnan(outcome.sigmas).any():
        worst = int(outcome.difference.argmax())
        raise Biased(
            f"parameter {labels[worst]}: the gradient is not finite in {int(outcome.difference[worst]):,} of {n:,} "
            "draws.",
            _split(outcome.sigmas, target),
        )
    if outcome.biased:
        lines = []
        for i in np.argsort(-outcome.sigmas)[:5]:
            if outcome.sigmas[i] > outcome.threshold:
                found = exact[i] + outcome.difference[i]
                how = f"{outcome.sigmas[i]:.1f} standard errors off" if outcome.error[i] else "off without any noise"
                lines.append(
                    f"  parameter {labels[i]}: {how}: exact {exact[i]:.6g}, found {found:.6g} ± {outcome.error[i]:.2g}"
                )
        beyond = int((outcome.sigmas > outcome.threshold).sum())
        raise Biased(
            f"the gradient is biased: {beyond} of {len(exact)} entries lie beyond {outcome.threshold:.2f} standard "
            f"errors ({wanted.false_alarms:.0%} false alarms) over {n:,} draws.\n" + "\n".join(lines),
            _split(outcome.sigmas, target),
        )
    if n < outcome.needed:
        raise TooFewDraws(
            f"{n:,} draws cannot see a bias of {wanted.able_to_see:.0%}: with them it would have to be "
            f"{outcome.sees:.0%} of the gradient's length. About {outcome.needed:,.0f} draws can, and max_draws is "
            f"{max_draws:,}. Raise max_draws=, give the ELBO more particles, or allow a larger able_to_see=.",
            outcome.needed,
        )
    return Unbiased(n, float(outcome.sigmas.max()), outcome.sees)


def _split(flat: np.ndarray, target: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found, start = {}, 0
    for name, g in target.items():
        found[name] = flat[start : start + g.size].reshape(g.shape)
        start += g.size
    return found
