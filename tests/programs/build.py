"""A program in Pyro and in NumPyro: model and guide as a user would write them, one text for both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

import ppl_estimators

from .description import (
    CATEGORIES,
    SIZES,
    TRIALS,
    Axes,
    Latent,
    Observed,
    Parents,
    Program,
    Under,
    batch,
    datum,
    masks,
    natural_shape,
    parameters,
    prior,
    scales,
    shaped,
    start,
)  # fmt: skip

Array = Any


def double(value: Array) -> Array:
    """A control variate, ..."""
    return 1.3 * value


def double_mean(distribution: Any) -> Array:
    """... and its mean; ..."""
    return 1.3 * distribution.mean


def double_sum(value: Array) -> Array:
    """... the same for a site whose event they sum over."""
    return 1.3 * value.sum(-1)


def double_sum_mean(distribution: Any) -> Array:
    return 1.3 * distribution.mean.sum(-1)


def estimator(code: str, event: bool = False) -> Any:
    """The estimator that ``code`` makes, at a site with or without an event dimension."""
    names = {n: vars(ppl_estimators)[n] for n in ppl_estimators.__all__}
    names |= {"double": double_sum, "double_mean": double_sum_mean} if event else {
        "double": double, "double_mean": double_mean
    }  # fmt: skip
    return eval(code, names)


def estimators(program: Program) -> dict[str, Any]:
    return {z.name: estimator(z.estimator, "e" in z.axes) for z in program.latents if z.estimator is not None}


def named(program: Program) -> dict[str, Any]:
    """Sites that the guide does not know of."""
    return {z.name: estimator("Enumerate()") for z in program.latents if z.mark == "named"}


class InPyro:
    """``minibatch``: of the subsampled plate; where it is not set, the library draws one."""

    minibatch: tuple[int, ...] = ()

    def __init__(self) -> None:
        import pyro
        import pyro.distributions as dist
        import torch
        from pyro import poutine

        self.dist, self.exp, self.tanh = dist, torch.exp, torch.tanh
        self.scale = lambda scale: poutine.scale(scale=scale)
        self.mask = lambda mask: poutine.mask(mask=mask)
        self.sample, self._pyro, self._torch = pyro.sample, pyro, torch
        self.one_hot = dist.OneHotCategorical

    def array(self, x: Any) -> Array:
        return self._torch.as_tensor(np.array(x))

    def number(self, x: Array) -> Array:
        return x.to(self._torch.get_default_dtype())

    def param(self, name: str, value: np.ndarray) -> Array:
        return self._pyro.param(name, lambda: self.array(value).clone())

    def plate(self, name: str, size: int, dim: int, part: int | None) -> Any:
        if part is not None and self.minibatch:
            return self._pyro.plate(name, size, subsample=self._torch.tensor(self.minibatch), dim=dim)
        return self._pyro.plate(name, size, subsample_size=part, dim=dim)

    def take(self, x: Array, plate: Any, dim: int) -> Array:
        return x.index_select(dim, plate.indices)

    def factor(self, name: str, value: Array, side: str) -> None:
        # reparameterised: its gradient is that of its value
        self._pyro.factor(name, value, **({"has_rsample": True} if side == "guide" else {}))


class InNumPyro:
    def __init__(self) -> None:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        from numpyro import handlers

        from ppl_estimators.numpyro import OneHotCategorical

        self.dist, self.exp, self.tanh, self.array, self._take = dist, jnp.exp, jnp.tanh, jnp.asarray, jnp.take
        self.scale = lambda scale: handlers.scale(scale=scale)
        self.mask = lambda mask: handlers.mask(mask=mask)
        self.sample, self._numpyro = numpyro.sample, numpyro
        self.one_hot = OneHotCategorical

    def number(self, x: Array) -> Array:
        return x.astype(float)

    def param(self, name: str, value: np.ndarray) -> Array:
        return self._numpyro.param(name, self.array(value))

    def plate(self, name: str, size: int, dim: int, part: int | None) -> Any:
        return self._numpyro.plate(name, size, subsample_size=part, dim=dim)

    def take(self, x: Array, plate: Any, dim: int) -> Array:
        return self._take(x, plate._indices, dim)

    def factor(self, name: str, value: Array, side: str) -> None:
        self._numpyro.factor(name, value)


Language = InPyro | InNumPyro


def build(program: Program, language: Language) -> tuple[Callable[[], None], Callable[[], None]]:
    """Model and guide."""

    def guide() -> None:
        with _Run(program, language) as run:
            for z in program.latents:
                if z.summed:
                    continue
                natural = run.combined(z.guide, z.axes, run.param(f"q_{z.name}"), z.family)
                if z.shared:
                    natural = run.moved(natural, z.family, run.like(run.param("shared"), z.axes))
                spread = run.exp_param(f"s_{z.name}") if z.family == "normal" else None
                infer = {"is_auxiliary": True} if z.auxiliary else {"enumerate": "parallel"} if z.mark else {}
                run.latent(z, run.law(z, natural, spread), z.under_guide, infer)
            run.factors("guide")

    def model() -> None:
        with _Run(program, language) as run:
            for z in program.latents[::-1] if program.reverse_model else program.latents:
                if not z.auxiliary:
                    categories = CATEGORIES if z.family in ("categorical", "onehot") else 0
                    own = run.param(f"p_{z.name}") if z.summed else run.everywhere(prior(z.name, categories), z)
                    natural = run.combined(z.model, z.axes, own, z.family)
                    infer = {"enumerate": "parallel"} if z.mark in ("guide", "model") else {}
                    run.latent(z, run.law(z, natural, None), z.under_model, infer)
            run.factors("model")
            for x in program.observed:
                run.observed(x)

    return model, guide


class _Run:
    """One run of one side: its plates, and the values drawn so far."""

    def __init__(self, program: Program, language: Language):
        self.program, self.language = program, language
        self.values: dict[str, Array] = {}
        self.plates: dict[str, Any] = {}
        self.open: list[tuple[str, Any]] = []

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- arithmetic -----------------------------------------------------------------------------------------------

    def param(self, name: str) -> Array:
        axes, categories = parameters(self.program)[name]
        values = shaped(self.program, start(self.program, name), axes, bool(categories))
        return self.part(self.language.param(name, values), axes, bool(categories))

    def part(self, array: Array, axes: Axes, last: int = 0) -> Array:
        """The elements of ``array [*batch, e, *last]`` that are in the minibatch."""
        plate = self.program.subsampled
        if plate not in axes:
            return array
        return self.language.take(array, self.plate(plate), self.program.dim(plate) - ("e" in axes) - last)

    def exp_param(self, name: str) -> Array:
        return self.language.exp(self.param(name))

    def everywhere(self, value: np.ndarray, site: Latent) -> Array:
        """``value [*categories]`` at each element of a site."""
        event = (SIZES["e"],) if "e" in site.axes else ()
        everywhere = np.broadcast_to(value, (*natural_shape(self.program, site.axes), *event, *value.shape))
        return self.part(self.language.array(everywhere), site.axes, value.ndim)

    def combined(self, parents: Parents, axes: Axes, own: Array, family: str) -> Array:
        natural = own
        for name, coefficient in parents.items():
            natural = self.moved(natural, family, coefficient * self.like(self.values[name], axes, name))
        return natural

    def moved(self, natural: Array, family: str, by: Array) -> Array:
        """The natural parameter, moved by ``by [*batch, *event]``."""
        if family in ("categorical", "onehot"):
            return natural + by[..., None] * self.language.array(np.arange(CATEGORIES) * 1.0)
        return natural + by

    def like(self, value: Array, axes: Axes, name: str | None = None) -> Array:
        """A parent's value as an array for a child with ``axes``."""
        program = self.program
        parent = program.axes_of(name) if name else parameters(program)["shared"][0]
        if name:
            value = self.language.number(value)
            if program.latent(name).family == "onehot":
                value = (value * self.language.array(np.arange(CATEGORIES) * 1.0)).sum(-1)
        if "e" in parent and "e" not in axes:
            value = value.sum(-1)
        elif "e" in axes and "e" not in parent:
            value = value[..., None]
        event = "e" in axes
        for axis in batch(parent):
            if axis not in axes:
                value = value.sum(program.dim(axis) - event, keepdims=True)
        rank = len(natural_shape(program, axes)) + event
        while value.ndim > rank and value.shape[0] == 1:
            value = value[0]
        return value

    # ---- statements -----------------------------------------------------------------------------------------------

    def law(self, z: Latent, natural: Array, spread: Array | None) -> Any:
        dist = self.language.dist
        if z.family == "normal":
            law = dist.Normal(natural, self.language.exp(0 * natural) if spread is None else spread)
        elif z.family == "poisson":
            law = dist.Poisson(self.language.exp(0.5 * natural))
        elif z.family == "binomial":
            law = dist.Binomial(total_count=TRIALS, logits=natural)
        elif z.family == "onehot":
            law = self.language.one_hot(logits=natural)
        else:
            law = {"bernoulli": dist.Bernoulli, "categorical": dist.Categorical}[z.family](logits=natural)
        return law.to_event(1) if "e" in z.axes else law

    def latent(self, z: Latent, law: Any, under: Under, infer: dict[str, Any]) -> None:
        with self.inside(z.axes, under):
            self.values[z.name] = self.language.sample(z.name, law, infer=infer)

    def observed(self, x: Observed) -> None:
        program = self.program
        data = self.part(self.language.array(shaped(program, datum(x.name, x.axes), x.axes)), x.axes)
        mean = self.combined(x.parents, x.axes, self.param(f"p_{x.name}") if x.learned else 0 * data, "normal")
        if x.shared:
            mean = mean + self.like(self.param("shared"), x.axes)
        law = self.language.dist.Normal(mean, self.language.exp(0 * mean))
        with self.inside(x.axes, x.under):
            self.language.sample(x.name, law.to_event(1) if "e" in x.axes else law, obs=data)

    def factors(self, side: str) -> None:
        for f in self.program.factors:
            if f.side == side:
                zero = self.part(self.language.array(np.zeros(natural_shape(self.program, f.axes))), f.axes)
                with self.inside(f.axes, Under()):
                    value = self.language.tanh(self.combined(f.parents, f.axes, zero, "normal"))
                    self.language.factor(f.name, value, side)

    # ---- contexts -------------------------------------------------------------------------------------------------

    def inside(self, axes: Axes, under: Under) -> AbstractContextManager[Any]:
        """In the plates of ``axes``; with ``nested`` those that are open already stay so."""
        wanted = [a for a in self.program.layout[::-1] if a in axes and a != "u"]
        if self.program.reverse_plates:
            wanted = wanted[::-1]
        while self.open and (not self.program.nested or self.open[-1][0] not in wanted):
            self.open.pop()[1].__exit__(None, None, None)
        if any(a not in wanted for a, _ in self.open):
            self.close()
        for a in wanted:
            if a not in dict(self.open):
                self.plate(a).__enter__()
                self.open.append((a, self.plate(a)))
        stack = ExitStack()
        if under.scale is not None:
            stack.enter_context(self.language.scale(self._array(under.scale, scales)))
        if under.mask is not None:
            stack.enter_context(self.language.mask(self._array(under.mask, masks)))
        return stack

    def _array(self, under: Any, made: Callable[[Axes], np.ndarray]) -> Any:
        if not isinstance(under, tuple):
            return under
        return self.part(self.language.array(shaped(self.program, made(under), under)), under)

    def plate(self, axis: str) -> Any:
        if axis not in self.plates:
            part = SIZES[axis] - 1 if axis == self.program.subsampled else None
            self.plates[axis] = self.language.plate(axis, SIZES[axis], self.program.dim(axis), part)
        return self.plates[axis]

    def close(self) -> None:
        while self.open:
            self.open.pop()[1].__exit__(None, None, None)
