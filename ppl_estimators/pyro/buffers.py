"""Buffers of modules (the averages of batch normalisation): further runs of a program leave them as one run does."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

#: module, name of the buffer, the tensor, and a copy of what it held
Held = list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]]


class Buffers:
    """The modules whose buffers a program writes, as far as its runs were watched."""

    def __init__(self) -> None:
        self._written: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    @contextmanager
    def watched(self) -> Iterator[Held]:
        """Notes which modules write to their buffers inside; what these held before."""
        held: Held = []
        seen: set[int] = set()

        def note(module: torch.nn.Module, _: Any) -> None:
            if module._buffers and id(module) not in seen:
                seen.add(id(module))
                held.extend(_copied(module))

        hook = register_module_forward_pre_hook(note)
        try:
            with warnings.catch_warnings():  # noting a module of `torch.compile` twice does no harm
                warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
                yield held
        finally:
            hook.remove()
            held[:] = [h for h in held if h[0]._buffers.get(h[1]) is not h[2] or not torch.equal(h[2], h[3])]
            self._written.update(module for module, *_ in held)

    def held(self) -> Held:
        """What the buffers hold now."""
        return [h for module in self._written for h in _copied(module)]

    @staticmethod
    @contextmanager
    def lent(before: Held) -> Iterator[None]:
        """Inside, every buffer is a copy that holds what it held before."""
        now = [(module, key, module._buffers.get(key)) for module, key, _, _ in before]
        for module, key, _, value in before:
            module._buffers[key] = value.clone()
        try:
            yield
        finally:
            for module, key, tensor in now:
                module._buffers[key] = tensor

    @staticmethod
    def restore(before: Held) -> None:
        """Every buffer holds again what it held before."""
        with torch.no_grad():
            for module, key, tensor, value in before:
                tensor.copy_(value)
                module._buffers[key] = tensor


def _copied(module: torch.nn.Module) -> Held:
    return [(module, key, x, x.detach().clone()) for key, x in module._buffers.items() if x is not None]
