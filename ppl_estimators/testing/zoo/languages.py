"""The two libraries behind one vocabulary, so that a test program is written once.

Each is a thin renaming and nothing more: a reader who knows the library can see through it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np


class Language:
    """What both call by the same name, in ``handlers`` and ``dist`` of the library and ``as_array`` of its arrays."""

    name: str
    dist: Any
    handlers: Any
    as_array: Callable[..., Any]

    def array(self, values: Any) -> Any:
        values = np.asarray(values)
        return self.as_array(values if values.dtype == bool else values.astype(float))

    def scale(self, scale: float) -> AbstractContextManager[Any]:
        return self.handlers.scale(scale=scale)

    def mask(self, mask: Any) -> AbstractContextManager[Any]:
        return self.handlers.mask(mask=mask)

    def total(self, x: Any) -> Any:
        """The sum over the last dimension, kept."""
        return x.sum(-1, keepdims=True)

    def mix(self, matrix: Any, x: Any) -> Any:
        return x @ matrix.T

    def dot(self, x: Any, y: Any) -> Any:
        return (x * y).sum(-1)


class PyroLanguage(Language):
    """Pyro."""

    name = "pyro"

    def __init__(self) -> None:
        import pyro
        import pyro.distributions
        import torch

        self.pyro, self.torch, self.handlers = pyro, torch, pyro.poutine
        self.dist, self.as_array = pyro.distributions, torch.as_tensor
        self.sample, self.exp = pyro.sample, torch.exp
        self.minibatch: Any = None

    def param(self, name: str, init: Mapping[str, Any]) -> Any:
        return self.pyro.param(name, lambda: self.array(init[name]).clone())

    def plate(self, name: str, size: int, **kwargs: Any) -> Any:
        """Subsampling draws at random, unless a `minibatch` is set."""
        if "subsample_size" in kwargs and self.minibatch is not None:
            kwargs = {"subsample": self.torch.tensor(self.minibatch)}
        return self.pyro.plate(name, size, **kwargs)

    def one_hot(self, logits: Any) -> Any:
        return self.dist.OneHotCategorical(logits=logits)

    def branch(self, z: Any, yes: Any, no: Any) -> Any:
        return self.torch.as_tensor(yes if z.item() else no)

    def switch(self, k: Any, values: Any) -> Any:
        return self.torch.tensor(values[k.item()])

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, xs: Any) -> None:
        """Pyro has no scan: a loop whose sites are called z_0, z_1, ..."""
        sample = self.sample
        for t in range(len(xs)):
            self.sample = lambda name, *args, t=t, **kwargs: sample(f"{name}_{t}", *args, **kwargs)
            carry = step(carry, xs[t])
        self.sample = sample


class NumPyroLanguage(Language):
    """NumPyro."""

    name = "numpyro"

    def __init__(self) -> None:
        import jax
        import numpyro
        import numpyro.contrib.control_flow
        import numpyro.distributions

        self.jax, self.numpyro, self.handlers = jax, numpyro, numpyro.handlers
        self.dist, self.as_array = numpyro.distributions, jax.numpy.asarray
        self.sample, self.plate, self.exp = numpyro.sample, numpyro.plate, jax.numpy.exp

    def param(self, name: str, init: Mapping[str, Any]) -> Any:
        return self.numpyro.param(name, self.array(init[name]))

    def one_hot(self, logits: Any) -> Any:
        """NumPyro has no OneHotCategorical: it is the multinomial of one draw."""
        return self.dist.Multinomial(total_count=1, logits=logits)

    def branch(self, z: Any, yes: Any, no: Any) -> Any:
        yes, no = self.as_array(yes), self.as_array(no)
        return self.jax.lax.cond(z > 0, lambda: yes, lambda: no)

    def switch(self, k: Any, values: Any) -> Any:
        return self.jax.lax.switch(k, [lambda v=v: self.array(v) for v in values])

    def scan(self, step: Callable[[Any, Any], Any], carry: Any, xs: Any) -> None:
        def body(carry: Any, x: Any) -> tuple[Any, None]:
            return step(carry, x).astype(float), None

        self.numpyro.contrib.control_flow.scan(body, carry, xs)


def language(library: str) -> PyroLanguage | NumPyroLanguage:
    """The vocabulary of "pyro" or "numpyro"."""
    languages: dict[str, type[PyroLanguage | NumPyroLanguage]] = {"pyro": PyroLanguage, "numpyro": NumPyroLanguage}
    return languages[library]()
