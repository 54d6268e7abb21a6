"""One loss and gradient with noise that the caller chooses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch

from ..measure.choices import rule_of
from ..measure.chosen import NODES, Given, Twin
from .exact import LAWS, Point
from .look import untouched
from .memory import Memory
from .randomness import Minibatch, Randomness

Array = torch.Tensor


class _Chosen(Randomness):
    """Draws and noise as they are given."""

    def __init__(self, given: Given):
        self.given = given

    def value(self, name: str, fn: Any, *args: Any, **kwargs: Any) -> Array:
        rule = rule_of(LAWS, name, fn, NODES)
        return rule.value(fn, torch.as_tensor(self.given.choices(name, tuple(rule.elements), rule.size)))

    def noise(self, name: str, label: str, noise: Any, like: Array) -> Array:
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        concentration = noise.concentration
        if isinstance(concentration, Array):
            noise = type(noise)(noise.law, noise.shape, concentration.detach().cpu().numpy())
        return torch.as_tensor(self.given.noise(name, label, noise), dtype=dtype, device=like.device)


def loss_and_gradient(
    twin: Twin, params: Mapping[str, Any] | None, given: Given
) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Loss, gradient, and the point as constrained arrays."""

    elbo = copy.copy(twin.elbo)
    elbo.randomness, elbo.memory = _Chosen(given), Memory()
    store = pyro.get_param_store()
    point = Point(dict(params or {}))

    def step() -> float:
        for p in store._params.values():
            p.grad = None
        with Minibatch(given.minibatch):
            return float(elbo.loss_and_grads(twin.model, twin.guide, *twin.args, **twin.kwargs))

    with untouched():
        pyro.set_rng_seed(0)
        loss = point.settled(step)
        point.check()
        named = {n: p for n, p in store.named_parameters() if "$state." not in n}
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
        found = {n: g.detach().cpu().numpy().copy() for n, g in gradient.items()}
        return loss, found, {n: v.cpu().numpy() for n, v in point.values().items()}
