"""The core's array operations in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import torch
from array_api_compat import torch as standard

Array = torch.Tensor
_SMALL = 1 << 12  # so many elements are copied sooner than summed by themselves


class TorchOps:
    """`array_api_compat.torch`, and the few operations that the standard lacks."""

    sigmoid = staticmethod(torch.sigmoid)
    softplus = staticmethod(torch.nn.functional.softplus)
    # torch's own are the standard's, and quicker than through its layer
    where = staticmethod(torch.where)
    clip = staticmethod(torch.clamp)
    mean = staticmethod(torch.mean)
    isfinite = staticmethod(torch.isfinite)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(standard, name)
        setattr(self, name, operation)  # and is not asked here again
        return operation

    def broadcast_to(self, x: Array, shape: tuple[int, ...]) -> Array:
        return x if x.shape == shape else x.expand(shape)

    def stop_gradient(self, x: Array) -> Array:
        return x.detach() if x.requires_grad else x

    def total(self, arrays: Sequence[Array]) -> Array:
        if len(arrays) == 1:
            return torch.sum(arrays[0])
        shape = arrays[0].shape
        alike = shape.numel() <= _SMALL and all(x.shape == shape for x in arrays)
        return torch.sum(torch.stack([x if alike else torch.sum(x) for x in arrays]))

    def riding(self, value: Array, rider: Array) -> Array:
        found = value + rider
        with torch.no_grad():
            return found.copy_(value)

    def softmax(self, x: Array) -> Array:
        return torch.softmax(x, -1)

    def log_softmax(self, x: Array) -> Array:
        return torch.log_softmax(x, -1)

    def logsumexp(self, x: Array, axis: int) -> Array:
        return torch.logsumexp(x, axis)

    def cumulative_logsumexp(self, x: Array) -> Array:
        return torch.logcumsumexp(x, 0)

    def fold(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        return reduce(lambda total, xs: step(self, total, *xs), zip(*along, strict=True), start)

    def folds(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        steps = accumulate(zip(*along, strict=True), lambda total, xs: step(self, total, *xs), initial=start)
        return torch.stack(list(steps))

    lgamma = staticmethod(torch.lgamma)
    digamma = staticmethod(torch.digamma)

    def polygamma(self, n: int, x: Array) -> Array:
        return torch.polygamma(n, x)

    def one_hot(self, index: Array, categories: int, like: Array) -> Array:
        return torch.nn.functional.one_hot(index.long(), categories).to(like)

    def take_last(self, x: Array, index: Array) -> Array:
        shape = torch.broadcast_shapes(x.shape[:-1], index.shape[:-1])
        return x.expand(*shape, x.shape[-1]).gather(-1, index.long().expand(*shape, index.shape[-1]))

    def solve(self, a: Array, b: Array) -> Array:
        return torch.linalg.solve_ex(a, b)[0]  # `solve` asks the device whether it could

    def like(self, x: Any, template: Array) -> Array:
        """Numbers of ours are not sent to a device at every step: it would be waited for."""
        if isinstance(x, (bool, int, float)):
            return torch.full((), x, dtype=template.dtype, device=template.device)
        if isinstance(x, (list, tuple)):
            return _constant(_fixed(x), template.dtype, template.device)
        return torch.as_tensor(x, dtype=template.dtype, device=template.device)

    def memberships(self, sets: tuple[frozenset[int], ...], n: int, like: Array) -> Array:
        return _memberships(sets, n, like.dtype, like.device)

    def indices(self, n: int, like: Array) -> Array:
        return torch.arange(n, device=like.device)

    def vjp(self, fn: Callable[[Array], Array], x: Array, cotangent: Array) -> Array:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = fn(x)
            (slope,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        return slope


def _fixed(x: Any) -> Any:
    return tuple(map(_fixed, x)) if isinstance(x, (list, tuple)) else x


@lru_cache(maxsize=64)
def _memberships(sets: tuple[frozenset[int], ...], n: int, dtype: torch.dtype, device: torch.device) -> Array:
    return _constant(tuple(tuple(i in s for s in sets) for i in range(n)), dtype, device)


@lru_cache(maxsize=256)
def _constant(x: Any, dtype: torch.dtype, device: torch.device) -> Array:
    with torch.inference_mode(False):  # to be of use outside too
        found = torch.tensor(x, dtype=dtype, device=device)
    CONSTANTS[id(found)] = found
    return found


#: tensors of ours that stay from step to step, by id
CONSTANTS = WeakValueDictionary[int, Array]()
OPS = TorchOps()
