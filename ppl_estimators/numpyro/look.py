"""Plain runs of the user's guide and model, as the tools want them before anything is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.optim import SGD

from ..core.verify import Checked
from ..measure.look import Ran, raised_by


@contextmanager
def listening() -> Iterator[list[str]]:
    """Which sample statements run meanwhile."""
    heard: list[str] = []
    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        yield heard
        heard += [name for name, site in trace.items() if site["type"] == "sample"]


def look(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Ran, Ran]:
    """One run of the guide, and of the model on its values."""
    with raised_by("guide"):
        inner = handlers.trace(handlers.seed(guide, 0)).get_trace(*args, **kwargs)
    with raised_by("model"):
        replayed = handlers.replay(handlers.seed(model, 1), trace=inner)
        outer = handlers.trace(replayed).get_trace(*args, **kwargs)
    return _seen("guide", inner), _seen("model", outer)


def _seen(role: str, trace: Any) -> Ran:
    ran = Ran()
    for name, site in trace.items():
        if site["type"] == "plate":
            size, drawn = site["args"]
            ran.plates[name] = (size, drawn or size)
        elif site["type"] == "sample":
            with raised_by(f"{role}'s log probability at site '{name}'"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a value outside the support is said in our own words
                log_p = float(site["fn"].log_prob(site["value"]).sum())
            ran.note(site, log_p)
    return ran


def checked(elbo: Any, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Checked:
    """See `core.verify.checked`. The parameters are as `SVI.init` makes them."""
    svi = SVI(model, guide, SGD(0.0), elbo)
    state = svi.init(jax.random.key(0), *args, **kwargs)
    point = {**svi.get_params(state), **(state.mutable_state or {})}
    return elbo.step(jax.random.key(1), point, model, guide, args, kwargs).check()


def summed_out(guide: Callable[..., Any]) -> Callable[..., Any]:
    """The guide with its sites of finite support marked to be summed out."""
    from numpyro.contrib.funsor import config_enumerate  # needs funsor, which not everybody has

    return config_enumerate(guide)
