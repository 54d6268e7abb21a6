"""`with_estimators`: the guide hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from numpyro.primitives import Messenger

from ..core.errors import EstimatorError
from ..core.estimator import Estimator
from ..core.families import OTHER
from ..core.keep import Keeps
from ..core.objectives import NAME, EvidenceLowerBound, Objective
from ..core.plan import check_mapping, hooked, match
from ..core.site import Site
from .distributions import describe
from .keep import declare
from .run import in_scans, plates_of, within

_WHERE = "with_estimators"


class WithEstimators:
    """A guide that names its estimators and declares what they keep. Attributes of the guide remain reachable."""

    def __init__(self, guide: Callable[..., Any], estimators: Mapping[str, Estimator], objective: Objective):
        self.guide = guide
        self.estimators, self.objective = estimators, objective
        self.__name__ = getattr(guide, "__name__", type(guide).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Requests(self.estimators) as requests:
            result = self.guide(*args, **kwargs)
        for site in requests.sites.values():
            if isinstance(site.requested, Estimator):
                given = site.requested.given(args, kwargs)
                if site.time and match(self.estimators, site.name) is None:  # of one step, from inside it
                    given = {k: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for k, x in given.items()}
                declare(site, _kept(site, given), given)
        declare(Site(NAME, "", OTHER, (), (), frozenset()), self.objective.keeps(), {})
        return result

    def __getattr__(self, name: str) -> Any:
        if name in ("guide", "estimators", "objective") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.guide, name)

    def __repr__(self) -> str:
        return f"with_estimators({self.guide!r}, {dict(self.estimators)!r})"


def _kept(site: Site, given: Mapping[str, Any]) -> Keeps:
    """What is kept at a site. Nothing where the estimator refuses it: the ELBO will say why, if it is asked there."""
    try:
        site.requested.check(site, sys.maxsize)  # the number of particles is the ELBO's affair
    except EstimatorError:
        return Keeps()
    return site.requested.keeps(site, given)


def with_estimators(
    guide: Callable[..., Any],
    estimators: Mapping[str, Estimator] | Estimator | None = None,
    *,
    objective: Objective | None = None,
) -> WithEstimators:
    """Choose an estimator per site of ``guide``, and declare whatever it keeps.

    ``estimators`` maps site names or glob patterns to estimators; it overrides the sites' own
    ``infer={"estimator": ...}``, and ``EstimatorELBO(...)`` overrides it. Without it, the sites' own are declared.

    Networks and temperatures become `numpyro.param` sites, running averages `numpyro.mutable` sites, named
    ``"<site>$..."``: ``SVI.init`` finds them, ``SVI.run`` trains, carries and returns them.

    ``objective``: one that counts the steps, of which the state is declared too; the ELBO takes it besides.

    The ELBO raises `EstimatorError` for a key that matches none of the guide's latent sites.

    >>> guide = with_estimators(guide, {"z_*": Reinforce(MovingAverage()), "w": Pathwise()})  # doctest: +SKIP
    """
    return WithEstimators(guide, check_mapping(estimators, _WHERE), objective or EvidenceLowerBound())


class _Requests(Messenger):
    """Writes the requests into the sites' ``infer``, and takes note of the sites."""

    def __init__(self, estimators: Mapping[str, Estimator]):
        self.estimators = estimators
        self.sites: dict[str, Any] = {}
        super().__init__()

    def __enter__(self) -> _Requests:
        super().__enter__()
        return self

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            within(msg, partial(_Inside, msg))
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["infer"] = hooked(self.estimators, msg["name"], msg["infer"])

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            site = describe(msg["name"], msg["fn"], plates_of(msg), msg["scale"], msg["infer"])
            self.sites[msg["name"]] = site


class _Inside(Messenger):
    """Inside a scan or a cond, whose message is ``flow``; ``scans``: how many there are around that."""

    def __init__(self, flow: Any, fn: Any, scans: int = 0):
        self.scans = in_scans(flow, scans)
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            within(msg, partial(_Inside, msg, scans=self.scans))
        in_scans(msg, self.scans)
