"""The exact loss and its gradient of a small Pyro program, by running it once for every state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints, transform_to

from ..core import families
from ..core.enumeration import Unplaced
from ..core.errors import EstimatorError
from ..measure import quadrature
from ..measure.states import (
    Asked,
    Count,
    Exact,
    check_budget,
    largest_change,
    minibatches_of,
    not_finite,
    refused,
)
from .dependencies import Holdings, Provenance
from .distributions import family, log_q, unwrapped
from .enumeration import Layout
from .look import untouched
from .ops import OPS
from .run import Message, Traces, dependencies, execute, terms_of

Array = torch.Tensor

_DEEP = 12  # more dimensions than the plates of a small program have

#: supports that no parameter moves
_STILL = (constraints.real, constraints.real_vector, constraints.positive, constraints.unit_interval)


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
        try:
            return program.sum()
        finally:
            program.point.restore()


class Point:
    """Moves parameters to the constrained values ``params`` as soon as the program has declared them."""

    def __init__(self, params: Mapping[str, Any]):
        self.params = params
        self.before: dict[str, tuple[Array, Array]] = {}  # what was moved, and where it was

    def settled(self, run: Callable[[], Any]) -> Any:
        """What ``run()`` returns, with all of them in place."""
        while True:
            result = run()
            if not self.move():
                return result

    def move(self) -> bool:
        store, moved = pyro.get_param_store(), False
        for name, unconstrained in store.named_parameters():
            if name not in self.params or name in self.before:
                continue
            value = torch.as_tensor(self.params[name]).detach().to(unconstrained)
            if value.shape != store[name].shape:
                raise EstimatorError(
                    f"params: '{name}' has shape {tuple(value.shape)}, the program's is {tuple(store[name].shape)}."
                )
            self.before[name] = (unconstrained, unconstrained.detach().clone())
            with torch.no_grad():
                unconstrained.copy_(transform_to(store._constraints[name]).inv(value))
            moved = True
        return moved

    def check(self) -> None:
        names = set(pyro.get_param_store().keys())
        if unknown := sorted(self.params.keys() - names):
            raise EstimatorError(f"params: the program declares no parameter {unknown}. There are: {sorted(names)}.")

    def values(self) -> dict[str, Array]:
        store = pyro.get_param_store()
        return {n: store[n].detach().clone() for n in store.keys() if "$state." not in n}

    def restore(self) -> None:
        with torch.no_grad():
            for unconstrained, value in self.before.values():
                unconstrained.copy_(value)


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
        index, weights, counts = 0, [], []

        def draw(msg: Message) -> Array:
            nonlocal index
            rule = rule_of(msg["name"], msg["fn"], nodes)
            counts.append(Count(msg["name"], rule.size, math.prod(rule.elements)))
            if index == len(path):
                path.append([0, counts[-1].states])
            value, log_weight = rule.take(path[index][0])
            index += 1
            weights.append(log_weight if self.objective.moves else log_weight.detach())
            return value if self.objective.moves else value.detach()

        try:
            traces = execute(
                self.model, self.guide, self.args, self.kwargs, draw=draw, subsamples=subsamples,
                observes=self.observes, layout=Layout(_DEEP, lambda name: False) if self.summing else None,
            )  # fmt: skip
        except Unplaced:
            self.summing = True
            return self.run(path, nodes, subsamples)
        self.counts = counts
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
        continuous = any(not _discrete(m["fn"]) for m in traces.latents().values())
        value, gradient, states = self.enumerate(self.asked.nodes, batches)
        error = 0.0
        if continuous:
            _, other, _ = self.enumerate(self.asked.coarser.nodes, batches)
            error = largest_change(gradient, other)
        return Exact(value, gradient, self.point.values(), states, error, tuple(traces.latents()))

    def dependencies(self) -> dict[tuple[str, str], frozenset[str]]:
        """The latent sites behind each cost term of the first run."""
        holdings, drawn = Holdings(), lambda m: rule_of(m["name"], m["fn"], self.asked.nodes).take(0)[0]
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
        if not traces.latents():
            raise EstimatorError(
                "the guide draws no latent site, so there is nothing to estimate. Give the guide a pyro.sample(...) "
                "statement, or pass model and guide in this order."
            )

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
        for term in terms:
            if not bool(torch.isfinite(term.value).all()):
                values = {n: m["value"].tolist() for n, m in traces.latents().items()}
                raise not_finite(term, term.value.sum().item(), values)
        past = {k: torch.full(v.shape, v.value) for k, v in self.objective.keeps().state.items()}
        self.scale = self.objective.scale(terms)
        return self.objective.collect(OPS, self.objective.weighed(OPS, terms, traces.latents(), past))

    def add(self, found: Sequence[tuple[Array, Array]], share: float, gradient: dict[str, Array]) -> float:
        """−weight · objective, over all tuples of states; its derivatives go into ``gradient``."""
        loss = torch.zeros(())
        for log_weights, collected in (zip(*states, strict=True) for states in product(found, repeat=self.joint)):
            value, _ = self.objective.combine(OPS, torch.stack(collected), self.scale)
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


# ---- what a site's choices are ---------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """``size`` choices for each of ``elements`` (a shape); ``take`` gives value and log weight of a joint choice."""

    elements: tuple[int, ...]
    size: int
    of_digits: Callable[[Array], tuple[Array, Array]]

    def take(self, choice: int) -> tuple[Array, Array]:
        digits = np.array([choice // self.size**i % self.size for i in range(math.prod(self.elements))], dtype=int)
        return self.of_digits(torch.as_tensor(digits.reshape(self.elements)))


def _discrete(fn: Any) -> bool:
    return bool(getattr(unwrapped(fn), "has_enumerate_support", False))


def rule_of(name: str, fn: Any, nodes: int) -> Rule:
    base = unwrapped(fn)
    if isinstance(base, dist.Delta):
        return Rule((), 1, lambda d: (fn(), torch.zeros(())))
    shape = (*fn.batch_shape, *fn.event_shape)
    batch = shape[: len(shape) - len(base.event_shape)]
    if _discrete(fn):
        try:
            support = base.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise _refused(name, base, str(error)) from error
        support = support.reshape(-1, *base.event_shape)

        def discrete(digits: Array) -> tuple[Array, Array]:
            value = support[digits]
            return value, log_q(fn, value).sum()

        return Rule(batch, len(support), discrete)
    noise, size, place = _continuous(name, base, nodes)
    elements = (*batch, *noise[len(base.batch_shape) :])

    def continuous(digits: Array) -> tuple[Array, Array]:
        """The nodes stand still and the density moves, so a cost that jumps has its derivative; where the parameters
        move the support, the nodes move with it."""
        value, log_weight = place(digits)
        value = value.expand(shape)
        if base.support not in _STILL:
            return value, log_weight
        value = value.detach().clone()  # no transform may answer from its cache
        log_density = log_q(fn, value).sum()
        return value, (log_weight - log_density).detach() + log_density

    return Rule(elements, size, continuous)


def _continuous(name: str, base: Any, nodes: int) -> tuple[tuple[int, ...], int, Callable[[Array], Any]]:
    """Shape of the noise, choices per element, and the map from choices to value and log weight."""
    if isinstance(base, td.Normal):
        x, w = map(torch.as_tensor, quadrature.hermite(nodes))
        return base.batch_shape, len(x), lambda d: (base.loc + base.scale * x[d].to(base.loc), w[d].sum().to(base.loc))
    if isinstance(base, td.MultivariateNormal):
        x, w = map(torch.as_tensor, quadrature.hermite(nodes))
        shape = (*base.batch_shape, *base.event_shape)
        return (
            shape,
            len(x),
            lambda d: (
                base.loc + (base.scale_tril @ x[d].to(base.loc)[..., None])[..., 0],
                w[d].sum().to(base.loc),
            ),
        )
    if isinstance(base, td.MixtureSameFamily):
        return _mixture(name, base, nodes)
    if isinstance(base, td.TransformedDistribution):
        inner = unwrapped(base.base_dist)
        noise, size, place = _continuous(name, inner, nodes)
        whole: Any = base.base_dist
        prefix = whole.shape()[: len(whole.shape()) - len(inner.shape())]

        def transformed(digits: Array) -> tuple[Array, Array]:
            value, log_weight = place(digits)
            for transform in base.transforms:
                value = transform(value)
            return value, log_weight

        return (*prefix, *noise), size, transformed
    u, w = map(torch.as_tensor, quadrature.unit(nodes))
    try:
        base.icdf(torch.full((), 0.5))
    except (NotImplementedError, AttributeError) as error:
        raise _refused(name, base, "no quadrature is known for it") from error

    def quantile(digits: Array) -> tuple[Array, Array]:
        like = next(v for v in vars(base).values() if torch.is_tensor(v) and v.is_floating_point())
        info = torch.finfo(like.dtype)
        return base.icdf(u[digits].to(like).clamp(info.tiny, 1 - info.eps)), w[digits].sum().to(like)

    return base.batch_shape, len(u), quantile


def _mixture(name: str, base: Any, nodes: int) -> Any:
    """A component, then its own node."""
    part = unwrapped(base.component_distribution)
    if base.event_shape:
        raise _refused(name, base, "its components are not one-dimensional")
    _, size, place = _continuous(name, part, nodes)
    components = base.mixture_distribution.logits.shape[-1]

    def mixture(digits: Array) -> tuple[Array, Array]:
        k, node = digits // size, digits % size
        wide = (*digits.shape, components)
        log_pi = base.mixture_distribution.logits.log_softmax(-1).expand(wide).gather(-1, k[..., None]).sum()
        values, _ = place(node[..., None].expand(wide))
        _, log_weight = place(node[..., None])
        return values.expand(wide).gather(-1, k[..., None])[..., 0], log_pi + log_weight

    return base.batch_shape, components * size, mixture


def _refused(name: str, base: Any, why: str) -> EstimatorError:
    discrete = getattr(base.support, "is_discrete", False) or family(base) in families.COUNTS
    return refused(name, type(base).__name__, why, discrete)
