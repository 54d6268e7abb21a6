"""Parameters, networks and state of estimators, in Pyro's parameter store."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import torch

from ..core.keep import Initial, Keeps, Kept, Network, mlp
from ..core.site import Site
from .ops import OPS

Array = torch.Tensor


class Keeper(torch.nn.Module):
    """Holds the parameters as a torch module does, and shows them to `pyro.param` as a guide does."""

    def declare(self, site: Site, declared: Keeps, given: Mapping[str, Array], like: Array) -> Kept:
        """Declare what an estimator keeps at ``site``; return its present values."""
        parameters = {k: self._param(f"{site.name}${k}", v, like) for k, v in declared.parameters.items()}
        networks = {k: self._network(f"{site.name}${k}", v, like) for k, v in declared.networks.items()}
        state = {k: read_state(site.name, k, v, like).detach().clone() for k, v in declared.state.items()}
        return Kept(parameters, networks, state, given)

    def _param(self, name: str, initial: Initial, like: Array) -> Array:
        key, store = name.replace(".", "/"), pyro.get_param_store()
        if key not in self._parameters and name not in store:
            value = torch.full(initial.shape, initial.value, dtype=like.dtype, device=like.device)
            if initial.spread:
                value = value + initial.spread * torch.randn_like(value)
            self.register_parameter(key, torch.nn.Parameter(value))
        mine = self._parameters.get(key)
        stored = pyro.param(name, mine)
        if stored is not mine:  # loaded, or declared by another keeper: the store is right
            if not isinstance(stored, torch.nn.Parameter):
                store.replace_param(name, torch.nn.Parameter(stored.detach()), store[name])
                stored = pyro.param(name)
            self._parameters[key] = stored
        return stored

    def _network(self, name: str, network: Network, like: Array) -> Callable[[Array], Array]:
        if network.module is None:
            weights = {k: self._param(f"{name}.{k}", v, like) for k, v in network.parameters().items()}
            return lambda x: mlp(OPS, weights, x)
        if not isinstance(network.module, torch.nn.Module):
            raise TypeError(
                f"{name}: a network must be a torch.nn.Module, got {type(network.module).__name__}. "
                "Leave network=None for the default."
            )
        key = name.replace(".", "/")
        if self._modules.get(key) is not network.module:
            self.add_module(key, network.module)
        store = pyro.get_param_store()
        if not any(store.param_name(p) for p in network.module.parameters()) or f"{name}$$$" in "".join(store.keys()):
            pyro.module(name, network.module, update_module_params=True)
        return network.module

    def get_extra_state(self) -> dict[str, Array]:
        """Running averages travel with ``state_dict()``."""
        store = pyro.get_param_store()
        return {k: store[k].detach().clone() for k in store.keys() if "$state." in k}

    def set_extra_state(self, state: dict[str, Array]) -> None:
        store = pyro.get_param_store()
        for name, value in state.items():
            store[name] = value


def read_state(site: str, key: str, initial: Initial, like: Array) -> Array:
    """State lives in the store beside the parameters, but no optimiser sees it."""
    store, name = pyro.get_param_store(), f"{site}$state.{key}"
    if name not in store:
        store[name] = torch.full(initial.shape, initial.value, dtype=like.dtype, device=like.device)
    return store[name]


def update_state(site: str, state: Mapping[str, Array]) -> None:
    store = pyro.get_param_store()
    with torch.no_grad():
        for key, value in state.items():
            store[f"{site}$state.{key}"].copy_(value)
