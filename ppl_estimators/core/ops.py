"""The array operations that the core may use.

An adapter passes an object with the functions of the array API standard (``sum``, ``where``, ``stack``,
``permute_dims``, ...) and the few that the standard lacks, listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Array = Any


class Ops(Protocol):
    """Extras beyond the array API standard; both adapters implement them under these names."""

    def __getattr__(self, name: str) -> Any: ...

    def stop_gradient(self, x: Array) -> Array:
        """``x`` as a constant of differentiation."""

    def total(self, arrays: Sequence[Array]) -> Array:
        """The sum of all elements of all arrays."""

    def riding(self, value: Array, rider: Array) -> Array:
        """``value``, with the gradient of ``value + rider``; also where the rider is not a number."""

    def sigmoid(self, x: Array) -> Array: ...

    def softplus(self, x: Array) -> Array: ...

    def softmax(self, x: Array) -> Array:
        """Over the last axis."""

    def log_softmax(self, x: Array) -> Array:
        """Over the last axis."""

    def logsumexp(self, x: Array, axis: int) -> Array: ...

    def cumulative_logsumexp(self, x: Array) -> Array:
        """Of the elements up to each, itself included, along the first axis."""

    def fold(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        """``step(self, ... step(self, step(self, start, *along[:][0]), *along[:][1]) ..., *along[:][-1])``."""

    def folds(self, step: Callable[..., Array], start: Array, *along: Array) -> Array:
        """``start`` and what `fold` has after each of its steps, ``[1 + steps, ...]``."""

    def lgamma(self, x: Array) -> Array: ...

    def digamma(self, x: Array) -> Array: ...

    def polygamma(self, n: int, x: Array) -> Array:
        """The n-th derivative of ``digamma``, differentiable in ``x``."""

    def one_hot(self, index: Array, categories: int, like: Array) -> Array:
        """``index [...]`` as ``[..., categories]`` in the dtype of ``like``."""

    def take_last(self, x: Array, index: Array) -> Array:
        """``x [..., C]`` and integer ``index [..., C']``: entries picked along the last axis."""

    def solve(self, a: Array, b: Array) -> Array:
        """``a⁻¹ b``, for a matrix that surely has an inverse."""

    def like(self, x: Array, template: Array) -> Array:
        """``x`` (array or number) in the dtype and on the device of ``template``."""

    def memberships(self, sets: tuple[frozenset[int], ...], n: int, like: Array) -> Array:
        """``[n, len(sets)]``, 1 where a set has the number of the row; as values that a compiler does not know."""

    def indices(self, n: int, like: Array) -> Array:
        """``[0, ..., n - 1]`` as integers, on the device of ``like``."""

    def vjp(self, fn: Callable[[Array], Array], x: Array, cotangent: Array) -> Array:
        """``(d fn / d x)^T cotangent`` at ``x``, itself differentiable in what ``fn`` closes over."""
