"""Gradient draws of any ELBO of Pyro, ours or stock, at a point of the parameters; nothing is changed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.constraint_registry import transform_to

from ..core.errors import EstimatorError
from ..core.plan import Plan
from ..measure.gradients import (
    Chunks,
    GradientDraws,
    Progress,
    check_names,
    check_program,
    check_shape,
    check_sites,
    kept_by_estimators,
)
from .elbo import EstimatorELBO
from .look import untouched
from .memory import Memory
from .randomness import Minibatch

Array = torch.Tensor


class Gradients(GradientDraws):
    """Draws of the gradient of ``elbo``, in the unconstrained space that `SVI` optimises.

    ``params``: values by name, in the parameters' own (constrained) space, as from ``pyro.param(name)``; those left
    out are the parameter store's at the time of each draw, or if the guide has not run yet as ``seed`` makes them.
    What estimators train ("z$...") is held at its value and left out of the gradients.

    A draw is a function of ``(seed, index)``. Nothing is changed: no parameter, no store, no state, no random state,
    no ``.grad``.

    ``sites``: the latent sites of the guide in order; ``names``: the parameters; ``shapes``: theirs; ``subsampled``:
    the plates of which a draw sees some elements.

    Raises `EstimatorError` for unknown parameters, a guide without latent sites, a program without parameters.
    """

    def __init__(
        self,
        elbo: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        mutable_state: None = None,
        seed: int = 0,
    ):
        check_program(elbo, model, guide)
        if mutable_state is not None:
            raise EstimatorError(
                "mutable_state is NumPyro's; Pyro holds it in modules and the parameter store. Leave it out."
            )
        self.elbo = _own(elbo)
        self.model, self.guide = model, guide
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        self._extra: dict[str, Any] = {"params": {}, "constraints": {}}  # declared by the program, not in the store
        self._values: dict[str, Array] = {}
        look = _Look()
        with self._apart(seed, 0):
            with look, torch.no_grad():
                guide(*self.args, **self.kwargs)
        self.sites = look.latents
        check_sites(self.sites, ["not yet known"])
        elements: dict[str, np.ndarray] = {}
        with self._apart(seed, 0), _minibatch([seed, 0], elements):
            _, _, parameters = self._run(guide)
            now = pyro.get_param_store().get_state()
        self.subsampled = list(elements)
        present = pyro.get_param_store()
        for part in self._extra:
            self._extra[part] = {n: v for n, v in now[part].items() if n not in present}
        self.names = [n for n in parameters if not kept_by_estimators(n, self.sites)]
        check_sites(self.sites, self.names)
        self.shapes = {n: tuple(parameters[n].shape) for n in self.names}
        self.size = sum(int(np.prod(s)) for s in self.shapes.values())
        if params:
            self._set(params, now, parameters)

    def _set(self, params: Mapping[str, Any], now: Mapping[str, Any], parameters: Mapping[str, Array]) -> None:
        check_names(params, self.names)
        for name, value in params.items():
            like = parameters[name]
            transform = transform_to(now["constraints"].get(name, constraints.real))
            value = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
            check_shape(name, tuple(value.shape), tuple(transform(like.detach()).shape))
            self._values[name] = transform.inv(value).clone()

    @contextmanager
    def _apart(self, seed: int, index: int) -> Iterator[None]:
        """The parameters at this point, a seeded generator; afterwards all is as before."""
        with untouched(self._extra):
            with torch.no_grad():
                for name, value in self._values.items():
                    pyro.get_param_store()._params[name].copy_(value)
            pyro.set_rng_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
            yield

    # ---- one gradient -------------------------------------------------------------------------------------------

    def _run(self, guide: Callable[..., Any]) -> tuple[float, Array | None, dict[str, Array]]:
        """The loss, a tensor whose gradient is the estimate (None where the ELBO has run backward itself), and the
        unconstrained parameters behind it."""
        given = (self.model, guide, *self.args)
        whose = type(self.elbo).loss_and_grads  # what `SVI` calls: a subclass that changes it is asked in no other way
        with torch.enable_grad(), poutine.trace(param_only=True) as trace:
            if whose is EstimatorELBO.loss_and_grads:
                surrogate = self.elbo._differentiable(self.model, guide, self.args, self.kwargs, standalone=False)[0]
                loss = surrogate.item()
            elif whose is TraceGraph_ELBO.loss_and_grads:
                elbo, surrogate = self.elbo._loss_and_surrogate_loss(self.model, guide, self.args, self.kwargs)
                loss = -torch_item(elbo)
            elif whose.__module__.startswith("pyro.") and hasattr(self.elbo, "differentiable_loss"):
                surrogate = self.elbo.differentiable_loss(*given, **self.kwargs)
                loss = surrogate.item()
            else:
                for p in pyro.get_param_store()._params.values():
                    p.grad = None
                loss, surrogate = self.elbo.loss_and_grads(*given, **self.kwargs), None
        parameters = {n: site["value"].unconstrained() for n, site in trace.trace.nodes.items() if "value" in site}
        return loss, surrogate, {n: p for n, p in parameters.items() if p.requires_grad}

    def _gradient(self, surrogate: Array | None, parameters: Mapping[str, Array], again: bool = False) -> dict:
        """By name; ``again``: the graph will be asked again."""
        found: dict[str, Array | None] = {n: p.grad for n, p in parameters.items()}
        if surrogate is not None:
            names = [n for n in self.names if n in parameters]
            found = {}
            if surrogate.requires_grad:
                inputs = [parameters[n] for n in names]
                slopes = torch.autograd.grad(surrogate, inputs, allow_unused=True, retain_graph=again)
                found = dict(zip(names, slopes, strict=True))
        gradient = {n: torch.zeros(self.shapes[n]) if (g := found.get(n)) is None else g for n in self.names}
        return {n: g.detach().cpu().numpy().copy() for n, g in gradient.items()}

    def moved(self, away: Mapping[str, np.ndarray]) -> Gradients:
        """The same ``away`` from here, in the unconstrained space, by name."""
        other = copy.copy(self)
        with self._apart(0, 0):
            here = pyro.get_param_store().get_state()["params"]
            other._values = {n: here[n].detach() + torch.as_tensor(x).to(here[n]) for n, x in away.items()}
        return other

    # ---- draws --------------------------------------------------------------------------------------------------

    def draw(self, seed: int = 0, index: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradient by parameter."""
        with self._apart(seed, index):
            loss, surrogate, parameters = self._run(self.guide)
            return float(loss), self._gradient(surrogate, parameters)

    def _parts(self, seed: int, index: int) -> tuple[float, dict[str, np.ndarray]]:
        gates = dict.fromkeys(self.sites, False)
        with self._apart(seed, index):
            loss, surrogate, parameters = self._run(_through_gates(gates, self.guide))
            if surrogate is None:
                raise EstimatorError(
                    f"{type(self.elbo).__name__} runs backward itself, so its gradient has no parts. "
                    "Ask for parameters only, or use EstimatorELBO."
                )
            upto = [self._gradient(surrogate, parameters, again=True)]
            for site in self.sites:
                gates[site] = True
                upto.append(self._gradient(surrogate, parameters, again=True))
        stacked = {n: np.stack([h[n] for h in upto]) for n in self.names}
        return float(loss), {n: np.concatenate([h[:1], np.diff(h, axis=0)]) for n, h in stacked.items()}

    def _twice(self, seed: int, index: int) -> tuple[list[float], dict[str, np.ndarray]]:
        """Two losses and gradients, ``[2, ...]``, of one minibatch."""
        with _minibatch([seed, index], {}):
            both = [self.draw(seed, 2 * index + i) for i in range(2)]
        return [loss for loss, _ in both], {n: np.stack([g[n] for _, g in both]) for n in self.names}

    def _chunks(self, kind: str, num_draws: int, seed: int, progress: Progress | None = None, start: int = 0) -> Chunks:
        """One after another, each a chunk of one."""
        one: Any = {"total": self.draw, "parts": self._parts, "pairs": self._twice}[kind]
        for done in range(num_draws):
            loss, gradient = one(seed, start + done)
            yield np.array([loss]), {n: g[None] for n, g in gradient.items()}
            if progress is not None:
                progress(done + 1)

    def plan(self) -> Plan | None:
        """Which estimator runs where; None for a stock ELBO."""
        return self.elbo.memory.last if isinstance(self.elbo, EstimatorELBO) else None

    @property
    def has_parts(self) -> bool:
        """An ELBO that runs backward itself leaves no graph to ask."""
        whose = type(self.elbo).loss_and_grads
        ours = whose in (EstimatorELBO.loss_and_grads, TraceGraph_ELBO.loss_and_grads)
        return ours or (whose.__module__.startswith("pyro.") and hasattr(self.elbo, "differentiable_loss"))

    def chunk(self, kind: str = "total") -> int:
        """How many draws are held at once."""
        return 1

    def seconds(self, steps: int) -> list[float]:
        """The time of each of some steps: loss and gradient, no optimiser."""
        times = []
        with self._apart(0, 0):
            for _ in range(steps):
                start = time.perf_counter()
                _, surrogate, parameters = self._run(self.guide)
                self._gradient(surrogate, parameters)
                times.append(time.perf_counter() - start)
        return times


def _own(elbo: Any) -> Any:
    """Ours keeps plans and networks by name: a copy, so that the caller's stays as it is."""
    if not isinstance(elbo, EstimatorELBO):
        return elbo
    mine = copy.copy(elbo)
    mine.memory = Memory()
    mine.keeper = copy.copy(elbo.keeper)
    mine.keeper._parameters, mine.keeper._modules = dict(elbo.keeper._parameters), dict(elbo.keeper._modules)
    return mine


class _Look(Messenger):
    """Notes the latent sites of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and msg["name"] not in self.latents:
            self.latents.append(msg["name"])


def _minibatch(seed: list[int], seen: dict[str, np.ndarray]) -> Minibatch:
    """Plates that subsample see the elements that the seed and their name say."""

    def elements(plate: str, size: int, some: int) -> np.ndarray:
        if plate not in seen:
            seen[plate] = np.random.default_rng([*seed, *plate.encode()]).permutation(size)[:some]
        return seen[plate]

    return Minibatch(elements)


class _Gates(Messenger):
    """Lets gradients into the distributions of the guide's sites only while their gate is open."""

    def __init__(self, gates: Mapping[str, bool]):
        super().__init__()
        self.gates = gates

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.gates and not msg["is_observed"]:
            site = msg["name"]
            msg["fn"] = aliased(msg["fn"], lambda _: lambda slope: slope * float(self.gates[site]))


def _through_gates(gates: Mapping[str, bool], guide: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Gates(gates):
            return guide(*args, **kwargs)

    return run


def aliased(thing: Any, hook_of: Callable[[Array], Callable[[Array], Any]], done: dict[int, Any] | None = None) -> Any:
    """A copy of a distribution with views of its differentiable tensors; ``hook_of(view)(slope)`` is asked on the way
    back."""
    done = {} if done is None else done
    if id(thing) in done:
        return done[id(thing)]
    if isinstance(thing, torch.Tensor):
        if not thing.requires_grad:
            return thing
        alias = done[id(thing)] = thing.view_as(thing)
        hook = hook_of(alias)
        # an estimator takes slopes of the cost while it runs, to differentiate them again: those pass
        alias.register_hook(lambda slope: slope if torch.is_grad_enabled() else hook(slope))
        return alias
    if isinstance(thing, (Distribution, Transform)) and not isinstance(thing, torch.nn.Module):
        twin = done[id(thing)] = copy.copy(thing)
        for key, value in vars(thing).items():
            if key == "_cached_x_y":
                vars(twin)[key] = (None, None)
            elif key == "_inv":
                vars(twin)[key] = None
            else:
                vars(twin)[key] = aliased(value, hook_of, done)
        return twin
    if isinstance(thing, (list, tuple)) and type(thing) in (list, tuple):
        return type(thing)(aliased(x, hook_of, done) for x in thing)
    return thing
