"""Where randomness enters: draws from the sites' own distributions, and the noise that estimators ask for."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.estimator import Noise
from .dependencies import reachable

Array = torch.Tensor


class Randomness:
    """What `EstimatorELBO.randomness` is unless a test puts a source of its own there."""

    def value(self, name: str, fn: Any, *args: Any, **kwargs: Any) -> Array:
        """A draw from a site's own distribution: `rsample` where there is one."""
        return fn(*args, **kwargs)

    def noise(self, name: str, label: str, noise: Noise, like: Array) -> Array:
        """Noise that an estimator asked for; uniform noise lies strictly inside (0, 1)."""
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        if noise.law == "normal":
            return torch.randn(noise.shape, dtype=dtype, device=like.device)
        if noise.law == "poisson":
            return torch.poisson(noise.concentration.detach())
        info = torch.finfo(dtype)
        u = torch.rand(noise.shape, dtype=dtype, device=like.device).clamp(info.tiny, 1 - info.eps / 2)
        if noise.law == "log gamma":  # g u^(1/a) has shape a if g has shape a + 1; in logarithms nothing underflows
            a = noise.concentration.detach()
            return torch._standard_gamma(a + 1).log() + u.log() / a
        return u

    def uniform(self, shape: tuple[int, ...], like: Array) -> Array:
        """Noise in [0, 1), by which values that were summed are drawn."""
        return torch.rand(shape, dtype=like.dtype, device=like.device)


class Minibatch(Messenger):
    """Plates that subsample see the elements that ``indices(name, size, subsample_size)`` says."""

    def __init__(self, indices: Callable[[str, int, int], Any]):
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if site_is_subsample(msg) and msg["value"] is None and law.subsample_size not in (None, law.size):
            indices = torch.as_tensor(self.indices(msg["name"], law.size, law.subsample_size))
            msg["value"], msg["done"] = indices.to(torch.get_default_device()), True


State = tuple[Any, ...]

#: how generators that a program holds for itself tell their state, and take it back
_OWN: dict[Any, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, x: setattr(g.bit_generator, "state", x)),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
}


class Generators:
    """Every generator of random numbers that a program may read: torch's on each device, those that it holds for
    itself, and Python's and numpy's once a program was seen to use them."""

    def __init__(self) -> None:
        self.foreign = False
        self.own: dict[Any, None] = {}

    def look(self, *roots: Any, everything: bool) -> None:
        """Find the generators that a program holds: at its first run, and then at every one if there were some."""
        if everything or self.own:
            held = reachable(*roots, kinds=tuple(_OWN))
            self.own = dict.fromkeys(g for g in held if not isinstance(g, random.SystemRandom))

    def state(self, *, everything: bool = False) -> State:
        here = torch.default_generator.get_state()
        if not (everything or self.foreign or self.own or torch.cuda.is_initialized()):
            return here, (), None, ()
        devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        foreign = (random.getstate(), np.random.get_state()) if self.foreign or everything else None
        own = tuple((g, _ways(g)[0](g)) for g in self.own)
        return here, tuple(g.get_state() for g in devices), foreign, own

    def restore(self, state: State) -> None:
        here, devices, foreign, own = state
        torch.default_generator.set_state(here)
        for generator, its in zip(torch.cuda.default_generators if devices else (), devices, strict=False):
            generator.set_state(its)
        if foreign is not None:
            random.setstate(foreign[0])
            np.random.set_state(foreign[1])
        for generator, its in own:
            _ways(generator)[1](generator, its)

    def learn(self, before: State, after: State) -> None:
        """Note whether a run between two complete states used Python's or numpy's generator."""
        (a, x), (b, y) = before[2], after[2]
        self.foreign |= a != b or x[2:] != y[2:] or bool((x[1] != y[1]).any())


def _ways(generator: Any) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    return next(ways for kind, ways in _OWN.items() if isinstance(generator, kind))


class Stream:
    """The random numbers of one particle. Its first run is recorded; in every further one the generators are, at the
    start and around every site, as they were then: whatever else the program draws (dropout, a datum) comes out the
    same, and a site that is drawn again has the noise it had."""

    def __init__(self, generators: Generators, buffers: Any):
        self.generators, self.buffers = generators, buffers  # what the modules' buffers held before the first run
        self.start = generators.state()
        self._around: dict[tuple[str, str], tuple[State, State | None]] = {}

    def before(self, site: tuple[str, str]) -> None:
        known = self._around.get(site)
        if known is None:
            self._around[site] = (self.generators.state(), None)
        else:
            self.generators.restore(known[0])

    def after(self, site: tuple[str, str]) -> None:
        before, known = self._around[site]
        if known is None:
            self._around[site] = (before, self.generators.state())
        else:
            self.generators.restore(known)


class SideBySide(TorchDispatchMode):
    """Alternatives along the first axis of what is drawn share their random numbers, as they would one after another.

    Every operation that draws is run once for each of them, from the same state of the generators. What has their axis
    is told by its size: ``unclear`` are shapes that may have come by it otherwise.
    """

    def __init__(self, count: int, depth: int, generators: Generators):
        super().__init__()
        self.count, self.depth, self.generators = count, depth, generators
        self.unclear: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        whole = next((a for a in (*args, *kwargs.values()) if self._wide(a)), None)
        if whole is None:
            return func(*args, **kwargs)
        shape = tuple(whole.shape if isinstance(whole, torch.Tensor) else whole)
        if shape[0] != self.count or len(shape) < self.depth:
            self.unclear.add(shape)
        state, parts = self.generators.state(), []
        for i in range(self.count):
            self.generators.restore(state)
            part = partial(self._part, i)
            parts.append(func(*map(part, args), **{k: part(v) for k, v in kwargs.items()}))
        if func._schema.is_mutable:
            return args[0]  # written through its parts
        return torch.cat(parts)

    def _wide(self, x: Any) -> bool:
        shape = x.shape if isinstance(x, torch.Tensor) else x
        sizes = isinstance(shape, (list, tuple)) and bool(shape) and isinstance(shape[0], int)
        return sizes and shape[0] % self.count == 0

    def _part(self, i: int, x: Any) -> Any:
        if not self._wide(x):
            return x
        if isinstance(x, torch.Tensor):
            return x.chunk(self.count)[i]
        return [x[0] // self.count, *x[1:]]
