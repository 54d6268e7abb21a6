"""Plain runs of the user's guide and model, as the tools want them before anything is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.util import site_is_subsample

from ..core.verify import Checked
from ..measure.look import Ran, raised_by
from .buffers import Buffers
from .memory import Memory


@contextmanager
def untouched(beside: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[None]:
    """The parameter store, the values and ``.grad`` of its tensors, and all random states are afterwards what they
    were. Meanwhile it holds what a state of a store has ``beside``, too."""
    store = pyro.get_param_store()
    state, rng = store.get_state(), pyro.util.get_rng_state()
    if beside is not None:
        store.set_state({part: {**beside[part], **state[part]} for part in ("params", "constraints")})
    before = [(p, p.detach().clone(), p.grad) for p in store._params.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value, grad in before:
                p.grad = grad
                if not torch.equal(p, value):
                    p.copy_(value)
        store.clear()
        store.set_state(state)
        for name in state["params"]:
            store[name]  # a store remembers unconstrained tensors on access
        pyro.util.set_rng_state(rng)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Which sample statements run meanwhile."""
    heard: list[str] = []
    with untouched(), poutine.trace() as trace:
        yield heard
        heard += [name for name, site in trace.trace.nodes.items() if site["type"] == "sample"]


def look(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Ran, Ran]:
    """One run of the guide, and of the model on its values."""
    with untouched(), torch.no_grad():
        pyro.set_rng_seed(0)
        with raised_by("guide"):
            inner = poutine.trace(guide).get_trace(*args, **kwargs)
            inner.compute_log_prob()
        with raised_by("model"):
            outer = poutine.trace(poutine.replay(model, trace=inner)).get_trace(*args, **kwargs)
            outer.compute_log_prob()
    return _seen(inner), _seen(outer)


def _seen(trace: Any) -> Ran:
    ran = Ran()
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site_is_subsample(site):
            ran.plates[name] = (site["fn"].size, site["fn"].subsample_size or site["fn"].size)
        else:
            ran.note(site, site["log_prob"].sum().item())
    return ran


def checked(elbo: Any, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Checked:
    """See `core.verify.checked`. Parameters, buffers of modules and random states are afterwards what they were."""
    elbo = copy.copy(elbo)
    elbo.memory, elbo.verify = Memory(), False  # what a step would have verified is asked here
    with untouched(), torch.enable_grad(), Buffers().watched(model, guide, args, kwargs) as held:
        pyro.set_rng_seed(0)
        try:
            return elbo.step(model, guide, args, kwargs).check()
        finally:
            Buffers.restore(held)


def summed_out(guide: Callable[..., Any]) -> Callable[..., Any]:
    """The guide with its sites of finite support marked to be summed out."""
    return config_enumerate(guide)
