"""`recommend`: which estimator for which site, by measurement."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..catalogue import ENTRIES, Kind
from ..core.errors import EstimatorError, EstimatorWarning
from ..core.estimator import Estimator
from ..estimators.baselines.leave_one_out import LeaveOneOut
from ..estimators.control_variate import ControlVariate
from ..estimators.reinforce import Reinforce
from ..testing.library import backend_of
from .candidates import admitted, look
from .compare import Comparison, compare, reference_for
from .show import Showable, Shown, number


@dataclass(frozen=True)
class Choice:
    """For one site: the estimator, the runner-up, how many times its variance × ms would be (the price of taking that
    instead), and the last round of measurements."""

    site: str
    estimator: Estimator
    runner_up: str | None
    price: float | None
    considered: int
    evidence: Comparison


@dataclass(frozen=True)
class Recommendation(Showable):
    """What `recommend` found. ``mapping`` goes into ``EstimatorELBO(mapping, num_particles=num_particles)``; ``joint``
    compares it with the default, all sites together."""

    library: str
    num_particles: int
    choices: tuple[Choice, ...]
    joint: Comparison

    @property
    def mapping(self) -> dict[str, Estimator]:
        return {c.site: c.estimator for c in self.choices}

    def tables(self) -> list[Shown]:
        rows = tuple(
            (
                c.site, repr(c.estimator), number(c.evidence[repr(c.estimator)].variance_times_milliseconds),
                str(c.considered), c.runner_up or "–", "–" if c.price is None else f"{number(c.price)}×",
            )
            for c in self.choices
        )  # fmt: skip
        shown = "{" + ", ".join(f'"{s}": {e!r}' for s, e in self.mapping.items()) + "}"
        caption = f"EstimatorELBO({shown}, num_particles={self.num_particles})"
        headings = ("site", "estimator", "variance × ms", "considered", "runner-up", "which costs")
        return [Shown(f"Recommended ({self.library})", headings, rows, caption), *self.joint.tables()]

    def records(self) -> list[dict[str, Any]]:
        return [
            {"site": c.site, "estimator": repr(c.estimator), "runner_up": c.runner_up, "price": c.price}
            for c in self.choices
        ]

    def facts(self) -> dict[str, Any]:
        evidence = {c.site: c.evidence.facts() for c in self.choices}
        return {"choices": self.records(), "evidence": evidence, "joint": self.joint.facts()}


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    budget: int = 600,
    num_particles: int = 1,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    backend: str | None = None,
    progress: bool | None = None,
) -> Recommendation:
    """Choose an unbiased estimator for each site by measuring variance × ms at one point of the parameters.

    For each site in turn, the others at the default: every unbiased estimator of the catalogue that the site admits,
    that keeps nothing (what is learned shows only after training) and that has no measurable bias here (so that a
    pathwise gradient through a model with jumps falls out); the better half goes on with twice the draws, until one
    is left. ``budget``: draws of each candidate in the last round. Milliseconds are those of this machine and moment.

    Raises `EstimatorError` where no estimator works at a site.
    """
    kwargs = dict(kwargs or {})
    library = backend or backend_of(model, guide, args, kwargs)
    plan = look(library, model, guide, args, kwargs, params, num_particles)
    program = (library, model, args, kwargs, params, seed)
    reference = reference_for(program, guide, plan, "auto", 2000, budget, progress)
    common = {
        "reference": reference,
        "kwargs": kwargs,
        "params": params,
        "seed": seed,
        "backend": library,
        "progress": progress,
    }
    choices = []
    for site in plan.sites:
        choices.append(_choose(site, plan, model, guide, args, budget, num_particles, common))
    mapping = {c.site: c.estimator for c in choices}
    joint = compare(
        model, guide, args, {"recommended": mapping, "default": {}}, num_draws=budget, num_particles=num_particles,
        **common,
    )  # fmt: skip
    return Recommendation(library, joint["recommended"].num_particles, tuple(choices), joint)


def _choose(
    site: str, plan: Any, model: Any, guide: Any, args: Any, budget: int, particles: int, common: dict[str, Any]
) -> Choice:
    left = [e for e in candidates(particles) if admitted(e, plan, particles)[site] is None]
    considered = len(left)
    rounds = max(considered - 1, 1).bit_length()
    while True:
        draws = max(50, budget >> rounds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EstimatorWarning)
            found = compare(
                model, guide, args, {repr(e): {site: e} for e in left},
                num_draws=draws, num_particles=particles, timing_steps=5 if rounds else 20, **common,
            )  # fmt: skip
        sound = [row for row in found.rows if not row.biased]
        if not sound:
            raise EstimatorError(f"site '{site}': every estimator that it admits shows a bias here.")
        if rounds <= 0 or len(sound) == 1:
            break
        rounds -= 1
        going_on = {row.label for row in sound[: max(2, (len(sound) + 1) // 2)]}
        left = [e for e in left if repr(e) in going_on]
        if len(left) == 2:
            rounds = 0 if draws < budget and rounds > 0 else rounds
    best, second = sound[0], sound[1] if len(sound) > 1 else None
    price = None
    if second is not None and best.variance_times_milliseconds > 0:
        price = second.variance_times_milliseconds / best.variance_times_milliseconds
    chosen = next(e for e in left if repr(e) == best.label)
    return Choice(site, chosen, None if second is None else second.label, price, considered, found)


def candidates(particles: int) -> list[Estimator]:
    """The unbiased estimators of the catalogue that keep nothing and need no function of the user's; plain score
    function only beside leave-one-out."""
    found = [
        e.subject
        for e in ENTRIES
        if e.unbiased and e.kind is not Kind.composition and isinstance(e.subject, Estimator)
        and not e.subject.keeps and not isinstance(e.subject, ControlVariate)
    ]  # fmt: skip
    named = [e for e in found if not (isinstance(e, Reinforce) and e != Reinforce())]
    return [*named, Reinforce(LeaveOneOut())]
