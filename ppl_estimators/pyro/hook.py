"""`with_estimators`: the guide hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ..core.estimator import Estimator
from ..core.objectives import EvidenceLowerBound, Objective
from ..core.plan import check_mapping, hooked
from .keep import Keeper

_WHERE = "with_estimators"


class Wrapped(torch.nn.Module):
    """Something around a guide, whose attributes remain reachable."""

    def __init__(self, guide: Callable[..., Any]):
        super().__init__()
        self.guide = guide

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "guide":
                raise
            return getattr(self.guide, name)


class WithEstimators(Wrapped):
    """A guide that names its estimators and holds what they keep. Attributes of the guide remain reachable."""

    def __init__(self, guide: Callable[..., Any], estimators: Mapping[str, Estimator], objective: Objective):
        super().__init__(guide)
        self.estimators, self.objective = estimators, objective
        self.keeper = Keeper()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Requests(self.estimators, self.keeper):
            return self.guide(*args, **kwargs)

    def __repr__(self) -> str:
        return f"with_estimators({self.guide!r}, {dict(self.estimators)!r})"


def with_estimators(
    guide: Callable[..., Any],
    estimators: Mapping[str, Estimator] | Estimator | None = None,
    *,
    objective: Objective | None = None,
) -> WithEstimators:
    """Choose an estimator per site of ``guide``, and hold whatever it keeps.

    ``estimators`` maps site names or glob patterns to estimators; it overrides the sites' own
    ``infer={"estimator": ...}``, and ``EstimatorELBO(...)`` overrides it. Without it, the sites' own are used.

    Networks and temperatures become parameters named ``"<site>$..."``, of the module that is returned and of Pyro's
    store; running averages are kept in the store, and in ``state_dict()``. `SVI` finds them without the hook too; an
    `ELBOModule` with a plain torch optimiser needs it.

    ``objective``: as in NumPyro, where the guide has to declare what an objective keeps.

    The ELBO raises `EstimatorError` for a key that matches none of the guide's latent sites.

    >>> guide = with_estimators(guide, {"z_*": Reinforce(MovingAverage()), "w": Pathwise()})  # doctest: +SKIP
    """
    return WithEstimators(guide, check_mapping(estimators, _WHERE), objective or EvidenceLowerBound())


class _Requests(Messenger):
    """Writes the requests into the sites' ``infer``, and takes note of the sites."""

    def __init__(self, estimators: Mapping[str, Estimator], keeper: Keeper):
        super().__init__()
        self.estimators, self.keeper = estimators, keeper

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)):
            msg["infer"] = hooked(self.estimators, msg["name"], msg["infer"], self.keeper)
