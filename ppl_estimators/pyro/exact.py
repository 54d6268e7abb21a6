"""The exact loss and its gradient of a small Pyro program, by running it once for every state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints, transform_to

from ..core.enumeration import Unplaced
from ..core.errors import EstimatorError
from ..core.ops import Ops
from ..core.plan import to_sum
from ..measure.choices import Rule, rule_of
from ..measure.states import (
    Asked,
    Count,
    Exact,
    check_budget,
    check_finite,
    check_latents,
    collected,
    largest_change,
    minibatches_of,
)
from .dependencies import Holdings, Provenance
from .distributions import family, log_q, unwrapped
from .enumeration import Layout
from .look import untouched
from .ops import OPS
from .run import Message, Traces, execute, terms_of
from .survey import dependencies

Array = torch.Tensor

_DEEP = 12  # more dimensions than the plates of a small program have


def exact(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    asked: Asked,
) -> Exact:
    """Sum over states; the parameter store, ``.grad`` and the random state stay as they are."""
    program = _Program(model, guide, args, dict(kwargs), dict(params or {}), asked)
    with untouched(), torch.enable_grad():
        return program.sum()


class Point:
    """Moves parameters to the constrained values ``params`` as soon as the program has declared them."""

    def __init__(self, params: Mapping[str, Any]):
        self.params = params
        self.moved: set[str] = set()

    def settled(self, run: Callable[[], Any]) -> Any:
        """What ``run()`` returns, with all of them in place."""
        while True:
            result = run()
            if not self.move():
                return result

    def move(self) -> bool:
        store, before = pyro.get_param_store(), set(self.moved)
        for name, unconstrained in store.named_parameters():
            if name not in self.params or name in before:
                continue
            value = torch.as_tensor(self.params[name]).detach().to(unconstrained)
            if value.shape != store[name].shape:
                raise EstimatorError(
                    f"params: '{name}' has shape {tuple(value.shape)}, the program's is {tuple(store[name].shape)}."
                )
            with torch.no_grad():
                unconstrained.copy_(transform_to(store._constraints[name]).inv(value))
            self.moved.add(name)
        return self.moved != before

    def check(self) -> None:
        names = set(pyro.get_param_store().keys())
        if unknown := sorted(self.params.keys() - names):
            raise EstimatorError(f"params: the program declares no parameter {unknown}. There are: {sorted(names)}.")

    def values(self) -> dict[str, Array]:
        store = pyro.get_param_store()
        return {n: store[n].detach().clone() for n in store.keys() if "$state." not in n}


class _Unmarked(Messenger):
    """Nothing is enumerated. `infer_config` would write into the user's dictionary."""

    def _pyro_sample(self, msg: Message) -> None:
        msg["infer"] = {**msg["infer"], "enumerate": None}


class _Program:
    depends_on: Mapping[tuple[str, str], frozenset[str]] = {}

    def __init__(self, model: Any, guide: Any, args: Any, kwargs: Any, params: Any, asked: Asked):
        self.asked, self.objective, self.joint = asked, asked.objective, asked.joint
        # what the guide marks is summed over here like all the rest; what only the model has is one term
        self.model, self.guide, self.args, self.kwargs = model, _Unmarked()(guide), args, kwargs
        self.summing = False
        self.observes = isinstance(getattr(guide, "guide", guide), GuideMessenger)
        self.point = Point(params)

    # ---- one run --------------------------------------------------------------------------------------------------

    def run(self, path: list[list[int]], nodes: int, subsamples: dict[str, Array]) -> tuple[Traces, Array]:
        """The run whose i-th latent site takes choice ``path[i][0]`` (0 beyond the end, where the path grows), and
        the logarithm of its weight."""
        index, weights, counts, discrete = 0, list[Array](), list[Count](), list[bool]()

        def draw(msg: Message) -> Array:
            nonlocal index
            rule = rule_of(LAWS, msg["name"], msg["fn"], nodes)
            counts.append(Count(msg["name"], rule.size, math.prod(rule.elements)))
            discrete.append(rule.discrete)
            if index == len(path):
                path.append([0, counts[-1].states])
            digits = _digits(rule, path[index][0])
            value = rule.value(msg["fn"], digits)
            log_weight = rule.weigh(msg["fn"], digits, value)
            index += 1
            weights.append(log_weight if self.objective.moves else log_weight.detach())
            return value if self.objective.moves else value.detach()

        try:
            traces = execute(
                self.model, self.guide, self.args, self.kwargs, draw=draw, subsamples=subsamples,
                observes=self.observes, layout=Layout(_DEEP, to_sum) if self.summing else None,
            )  # fmt: skip
        except Unplaced:
            self.summing = True
            return self.run(path, nodes, subsamples)
        self.counts, self.continuous = counts, not all(discrete)
        return traces, sum(weights, torch.zeros(()))

    # ---- all runs -------------------------------------------------------------------------------------------------

    def sum(self) -> Exact:
        subsamples: dict[str, Array] = {}
        with torch.no_grad():
            self.look_at_guide()
            traces, _ = self.point.settled(lambda: self.run([], self.asked.nodes, subsamples))
        self.point.check()
        if self.objective.keeps_score:
            self.depends_on = self.dependencies()
        batches = minibatches_of(_subsampled(traces), self.asked.minibatches)
        check_budget(self.counts, {n: len(b) for n, b in batches.items()}, self.asked.max_states, self.joint)
        continuous = self.continuous
        value, gradient, states = self.enumerate(self.asked.nodes, batches)
        error = 0.0
        if continuous:
            _, other, _ = self.enumerate(self.asked.coarser.nodes, batches)
            error = largest_change(gradient, other)
        return Exact(value, gradient, self.point.values(), states, error, tuple(traces.latents()))

    def dependencies(self) -> dict[tuple[str, str], frozenset[str]]:
        """The latent sites behind each cost term of the first run."""
        holdings = Holdings()

        def drawn(msg: Message) -> Array:
            rule = rule_of(LAWS, msg["name"], msg["fn"], self.asked.nodes)
            return rule.value(msg["fn"], _digits(rule, 0))

        while True:
            with Provenance(holdings) as follow:
                program = self.model, self.guide, self.args, self.kwargs
                traces = execute(*program, draw=drawn, subsamples={}, observes=self.observes, provenance=follow)
            if not follow.stale():
                return {k: follow.names(d) for k, d in dependencies(traces).items()}

    def look_at_guide(self) -> None:
        traces = execute(
            None, self.guide, self.args, self.kwargs, draw=lambda m: m["fn"](), subsamples={}, observes=self.observes
        )
        check_latents(traces.latents(), "pyro")

    def enumerate(self, nodes: int, batches: Mapping[str, Any]) -> tuple[float, dict[str, np.ndarray], int]:
        loss, states = 0.0, 0
        gradient: dict[str, Array] = {}
        share = 1 / math.prod(len(b) for b in batches.values())
        for chosen in product(*batches.values()):
            path: list[list[int]] = []
            found: list[tuple[Array, Array]] = []
            before = states
            while True:
                subsamples = {n: torch.as_tensor(b) for n, b in zip(batches, chosen, strict=True)}
                traces, log_weight = self.point.settled(partial(self.run, path, nodes, subsamples))
                if log_weight > -math.inf:
                    found.append((log_weight, self.collected(traces)))
                if self.joint == 1 and found:
                    loss += self.add([found.pop()], share, gradient)
                states += 1
                if states > self.asked.max_states:
                    raise EstimatorError(
                        f"exact_gradient met more than max_states = {self.asked.max_states:,} states: the program's "
                        "branches have more than its first run shows. Pass a larger max_states=."
                    )
                while path and path[-1][0] == path[-1][1] - 1:
                    path.pop()
                if not path:
                    break
                path[-1][0] += 1
            states = before + (states - before) ** self.joint
            if found:
                loss += self.add(found, share, gradient)
        named = dict(pyro.get_param_store().named_parameters())
        zero = {n: torch.zeros_like(p) for n, p in named.items() if p.requires_grad and "$state." not in n}
        return loss, {n: gradient.get(n, z).detach().cpu().numpy() for n, z in zero.items()}, states

    def collected(self, traces: Traces) -> Array:
        """What the objective has of one state."""
        everything = frozenset(traces.latents())
        terms = terms_of(traces, {**dict.fromkeys(traces.own_terms(), everything), **self.depends_on})
        check_finite(OPS, terms, traces.latents())
        self.scale = self.objective.scale(terms)
        return collected(OPS, self.objective, terms, everything)

    def add(self, found: Sequence[tuple[Array, Array]], share: float, gradient: dict[str, Array]) -> float:
        """−weight · objective, over all tuples of states; its derivatives go into ``gradient``."""
        loss = torch.zeros(())
        for log_weights, states in (zip(*several, strict=True) for several in product(found, repeat=self.joint)):
            value, _ = self.objective.combine(OPS, torch.stack(states), self.scale)
            loss = loss - share * torch.stack(log_weights).sum().exp() * value
        named = {n: p for n, p in pyro.get_param_store().named_parameters() if p.requires_grad and "$state." not in n}
        if loss.requires_grad and named:
            slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for name, g in zip(named, slopes, strict=True):
                if g is not None:
                    gradient[name] = gradient[name] + g if name in gradient else g
        return float(loss.detach())


def _subsampled(traces: Traces) -> dict[str, tuple[int, int]]:
    """``{plate: (size, subsample size)}`` of the plates that drew their indices."""
    messages = [*traces.guide.values(), *traces.model.values()]
    full = {f.name: f.full_size or f.size for m in messages for f in m["cond_indep_stack"]}
    return {n: (full[n], len(index)) for n, index in traces.subsamples.items() if n in full}


def _digits(rule: Rule, choice: int) -> Array:
    """The choice of every element at joint choice number ``choice``."""
    digits = np.array([choice // rule.size**i % rule.size for i in range(math.prod(rule.elements))], dtype=int)
    return torch.as_tensor(digits.reshape(rule.elements))


class _Laws:
    """What `choices.Laws` asks of Pyro."""

    ops: Ops = OPS
    delta, normal, multivariate = dist.Delta, td.Normal, td.MultivariateNormal
    mixture, transformed = td.MixtureSameFamily, td.TransformedDistribution
    still = (constraints.real, constraints.real_vector, constraints.positive, constraints.unit_interval)
    unwrapped, family, log_q = staticmethod(unwrapped), staticmethod(family), staticmethod(log_q)

    def values(self, base: Any) -> Array | None:
        if not getattr(base, "has_enumerate_support", False):
            return None
        return base.enumerate_support(expand=False).reshape(-1, *base.event_shape)

    def sampled(self, values: Array, fn: Any) -> Array:
        return values

    def only(self, fn: Any) -> Array:
        return fn()

    def array(self, numbers: np.ndarray, base: Any) -> Array:
        like = next(v for v in vars(base).values() if torch.is_tensor(v) and v.is_floating_point())
        return torch.as_tensor(numbers).to(like)

    def mixing(self, base: Any) -> Array:
        return base.mixture_distribution.logits

    def fixed(self, value: Array) -> Array:
        return value.detach().clone()


LAWS = _Laws()
