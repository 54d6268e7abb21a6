"""Many gradients of an ELBO at one point, as running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch

from ..testing.power import Sums
from .exact import Point, untouched

Array = torch.Tensor


class Draws:
    """``loss_and_grads`` of any Pyro ELBO, one seed a draw. Every draw starts from the same parameters and state."""

    def __init__(
        self,
        elbo: Any,
        model: Any,
        guide: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        params: Any,
        seed: int,
    ):
        self.call: Callable[[], float] = lambda: elbo.loss_and_grads(model, guide, *args, **kwargs)
        self.params, self.seed = dict(params or {}), seed

    def sums(self, reference: Mapping[str, np.ndarray], first: int, number: int) -> Sums:
        """Sums of gradient − reference, entries in the order of ``reference``, over draws first, first + 1, ..."""
        target = np.concatenate([np.ravel(reference[n]) for n in reference]).astype(float)
        zero = np.zeros_like(target)
        total, squares, broken = zero.copy(), zero.copy(), zero.copy()
        with self._prepared() as draw:
            for index in range(first, first + number):
                gradient = draw(index)
                found = [gradient.get(n, np.zeros_like(r)) for n, r in reference.items()]
                difference = np.concatenate([np.ravel(g) for g in found]) - target
                finite = np.isfinite(difference)
                difference = np.where(finite, difference, 0)
                total, squares, broken = total + difference, squares + difference**2, broken + ~finite
        return Sums(number, total, squares, broken)

    def one(self) -> dict[str, np.ndarray]:
        with self._prepared() as draw:
            return draw(0)

    @contextmanager
    def _prepared(self) -> Any:
        store = pyro.get_param_store()
        grads = {p: p.grad for p in store._params.values()}
        point = Point(self.params)
        with untouched():
            try:
                for p in grads:
                    p.grad = None
                pyro.set_rng_seed(self.seed)
                point.settled(self.call)  # declares what the ELBO keeps, too
                point.check()
                start = store.get_state()
                values = {p: (p.detach().clone(), p._version) for p in start["params"].values()}

                def draw(index: int) -> dict[str, np.ndarray]:
                    for p in start["params"].values():
                        p.grad = None
                    pyro.set_rng_seed(int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]))
                    self.call()
                    found = {
                        n: p.grad.detach().cpu().numpy().copy()
                        for n, p in start["params"].items()
                        if p.grad is not None
                    }
                    for p, (value, version) in values.items():
                        if p._version != version:  # a running average
                            with torch.no_grad():
                                p.copy_(value)
                            values[p] = (value, p._version)
                    store.clear()
                    store.set_state(start)
                    return found

                yield draw
            finally:
                for p in store._params.values():
                    p.grad = None
                for p, grad in grads.items():
                    p.grad = grad
                point.restore()
