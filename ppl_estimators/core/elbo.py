"""What the two `EstimatorELBO` have in common: their own arguments, and what they say of costs that went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import warn
from .estimator import Estimator
from .objectives import EvidenceLowerBound, Objective
from .plan import Policy, Settings, check_mapping
from .site import Term


def name_of(term: Term) -> str:
    """As a report calls it."""
    return f"'{term.site}' ({'log p' if term.side == 'model' else '-log q'})"


def warn_of_costs(names: Iterable[str], fix: str) -> None:
    """Of cost terms that are not finite."""
    warn(
        f"site {', '.join(dict.fromkeys(names))}: the cost is not finite at this step. Running averages of the "
        f"estimators are left as they were; look for a support mismatch, or {fix}."
    )


class Configured:
    """Mixed into the library's own ELBO. Attributes may be changed between steps: each step asks for its settings."""

    num_particles: int
    automatic: Policy
    _given: tuple[Any, ...] = ()
    _settings: Settings

    def _configure(
        self,
        estimators: Mapping[str, Estimator] | Estimator | None,
        default: str | Estimator,
        objective: Objective | None,
        max_parallel: int,
        average_model: bool,
    ) -> None:
        self.estimators = check_mapping(estimators, "EstimatorELBO")
        self.default = default
        self.objective = EvidenceLowerBound() if objective is None else objective
        self.max_parallel = max_parallel
        self.average_model = average_model
        _ = self.settings

    @property
    def settings(self) -> Settings:
        if self.default != "auto" and not isinstance(self.default, Estimator):
            raise TypeError(f'EstimatorELBO(default=...) takes "auto" or an estimator, got {self.default!r}.')
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"EstimatorELBO(objective=...) takes an objective such as ImportanceWeighted(), got {self.objective!r}."
            )
        for name in ("num_particles", "max_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"EstimatorELBO({name}=...) needs 1 or more, got {getattr(self, name)!r}.")
        given = (
            tuple(check_mapping(self.estimators, "EstimatorELBO").items()),
            self.default if isinstance(self.default, Estimator) else self.automatic,
            self.objective,
            self.num_particles,
            self.max_parallel,
            self.average_model,
        )
        if self._given != given:  # mostly they are as at the last step
            self._given, self._settings = given, Settings(*given)
        return self._settings

    def __repr__(self) -> str:
        return f"EstimatorELBO({self.estimators!r}, num_particles={self.num_particles})"
