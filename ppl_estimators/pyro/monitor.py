"""What `GradientMonitor` needs of Pyro: moments of gradients, met by hooks on the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.overrides import _get_current_function_mode

from ..core.errors import EstimatorError
from ..measure.gradients import check_sites, kept_by_estimators
from ..measure.watch import Moment, Snapshot, Watcher, flat_sites, place, through_values
from .dependencies import StopParameters
from .distributions import unwrapped
from .elbo import EstimatorELBO
from .gradients import aliased
from .hook import Wrapped
from .run import execute, terms_of

Array = torch.Tensor

#: shapes of one site whose moments are kept apart
SHAPES = 4


def watch(thing: Any, monitor: Watcher) -> tuple[Any, Callable[..., None]]:
    """A copy of an `SVI` whose steps are watched; of a guide, one whose sites are. And what ends a step."""
    record = Record(monitor)
    if not isinstance(thing, SVI):
        return WatchedGuide(thing, record), record.close
    watched = copy.copy(thing)
    watched.__class__ = type(f"Watched{type(thing).__name__}", (_Watched, type(thing)), {})
    watched.record, watched.watched = record, thing
    watched.guide = WatchedGuide(thing.guide, record)
    watched.optim = _Optim(thing.optim, record)
    return watched, record.close


def arrived() -> None:
    """Nothing is on its way."""


class _Watched:
    """Mixed into the class of the user's `SVI`."""

    record: Record
    watched: SVI
    looked = False
    # of the `SVI`
    model: Any
    loss: Any

    def step(self, *args: Any, **kwargs: Any) -> Any:
        record = self.record
        if not self.looked:
            record.monitor.begin(self.model, self.watched.guide, args, kwargs)
        loss = super().step(*args, **kwargs)  # type: ignore[misc]
        value = sum(loss) if isinstance(loss, tuple) else loss
        elbo = getattr(self.loss, "__self__", None)  # an `ELBO` is held by its bound method
        if not self.looked:
            self.looked = True
            check_sites(["some"], record.taken)
            for site, terms in _flat_sites(elbo, self.model, self.watched.guide, args, kwargs).items():
                record.monitor.flat(site, terms)
        record.close(value, record.taken)
        return loss


class _Optim:
    """The user's optimiser, which shows what it is given."""

    def __init__(self, inner: Any, record: Record):
        self.inner, self.record = inner, record

    def __call__(self, params: Iterable[Array], *args: Any, **kwargs: Any) -> Any:
        store = pyro.get_param_store()
        self.record.taken = {str(store.param_name(p)): p for p in params}
        self.record.take()
        return self.inner(params, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Running:
    """Exponential averages of a vector in parts, and of its square."""

    def __init__(self, parts: list[Array]):
        self.count, self.square = 0, 0.0
        self.means = [torch.zeros_like(x) for x in parts]

    def add(self, parts: list[Array], square: float, decay: float) -> None:
        self.count += 1
        self.square += (1 - decay) * (square - self.square)
        for mean, x in zip(self.means, parts, strict=True):
            mean.lerp_(x, 1 - decay)

    def moment(self, kind: str, name: str) -> Moment:
        return Moment(kind, name, self.count, _square(self.means), self.square)


class Record:
    """The running averages of one training run."""

    def __init__(self, monitor: Watcher):
        self.monitor = monitor
        self.step, self.skipped, self.finite, self.loss = 0, 0, 0, 0.0
        self.taken: dict[str, Array] = {}
        self.vectors: dict[str, list[Array]] = {}
        self.slopes: dict[str, list[Array | None]] = {}
        self.sites: dict[str, dict[Any, Running]] = {}
        self.parameters: dict[str, Running] = {}

    def visit(self, site: str, fn: Any) -> Any:
        """The distribution, its differentiable arrays on watch. Several visits in a step add up."""
        mine, at = self.slopes.setdefault(site, []), 0

        def hook_of(alias: Array) -> Callable[[Array], None]:
            nonlocal at
            index, at = at, at + 1
            if index == len(mine):
                mine.append(None)
            repeated = [d for d, stride in enumerate(alias.stride()) if stride == 0 and alias.shape[d] > 1]

            def met(slope: Array) -> None:
                slope = slope.sum(repeated, keepdim=True) if repeated else slope
                before = mine[index]
                mine[index] = slope.detach() if before is None or before.shape != slope.shape else before + slope

            return met

        return aliased(fn, hook_of)

    def take(self) -> None:
        """The gradients, before the optimiser sees them."""
        sites = self.slopes
        self.vectors = {
            n: [p.grad.detach().clone()]
            for n, p in self.taken.items()
            if p.grad is not None and not kept_by_estimators(n, sites)
        }

    def close(self, loss: float | Array, parameters: Mapping[str, Array]) -> None:
        """A step is over."""
        loss = loss.item() if isinstance(loss, torch.Tensor) else loss
        if not self.vectors:
            self.taken = dict(parameters)
            self.take()
        monitor = self.monitor
        self.step += 1
        slopes = {n: [x for x in parts if x is not None] for n, parts in self.slopes.items()}
        for seen in self.slopes.values():
            seen.clear()
        own = [(n, parts, _square(parts)) for n, parts in self.vectors.items()]
        local = [(n, parts, _square(parts)) for n, parts in slopes.items() if parts]
        self.vectors, self.taken = {}, {}
        if np.isfinite(loss + sum(s for _, _, s in own + local)):
            self.finite += 1
            self.loss += (1 - monitor.decay) * (loss - self.loss)
            for n, parts, square in own:
                self.parameters.setdefault(n, Running(parts)).add(parts, square, monitor.decay)
            for n, mine, square in local:
                self._site(n, mine).add(mine, square, monitor.decay)
        else:
            self.skipped += 1
        if self.step % monitor.every == 0:
            monitor.receive(self._snapshot())

    def _site(self, name: str, parts: list[Array]) -> Running:
        """A site whose shape differs from step to step has moments for each shape."""
        shapes = self.sites.setdefault(name, {})
        key = tuple(x.shape for x in parts)
        if key not in shapes:
            if len(shapes) == SHAPES:
                del shapes[min(shapes, key=lambda k: shapes[k].count)]
            shapes[key] = Running(parts)
        return shapes[key]

    def _snapshot(self) -> Snapshot:
        found = [r.moment("parameter", n) for n, r in self.parameters.items()]
        for n, shapes in self.sites.items():
            found.append(max(shapes.values(), key=lambda r: r.count).moment("site", n))
        whole = 1 - self.monitor.decay**self.finite
        return Snapshot(self.step, self.skipped, self.loss / whole if whole else float("nan"), tuple(found))


class WatchedGuide(Wrapped):
    """A guide whose sites are on watch."""

    def __init__(self, guide: Callable[..., Any], record: Record):
        super().__init__(guide)
        self.record = record

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Sites(self.record):
            return self.guide(*args, **kwargs)


class _Sites(Messenger):
    """Puts the distributions of latent sites on watch."""

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not torch.is_grad_enabled():
            return
        if not isinstance(_get_current_function_mode(), StopParameters):  # its slopes train what estimators keep
            msg["fn"] = self.record.visit(msg["name"], msg["fn"])


def _flat_sites(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> dict[str, list[str]]:
    """See `watch.flat_sites`."""
    pathwise = None
    if isinstance(elbo, EstimatorELBO) and elbo.memory.last is not None:
        pathwise = through_values(elbo.memory.last)
    subsamples: dict[str, Array] = {}

    def run(values: Mapping[str, Array]) -> Any:
        def draw(msg: Any) -> Array:
            return values[msg["name"]] if msg["name"] in values else msg["fn"](*msg["args"], **msg["kwargs"])

        return execute(model, guide, args, kwargs, draw=draw, subsamples=subsamples)

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            traces = run({})
        except EstimatorError:  # a guide that runs the model, or whatever the loss will say itself
            return {}
        latents = {n: m for n, m in traces.latents().items() if not isinstance(unwrapped(m["fn"]), Delta)}
        drawn = {n: m["value"].detach() for n, m in latents.items()}

        def probe(name: str, i: int) -> dict[str, tuple[float, float]]:
            value = latents[name]["fn"].sample().detach().requires_grad_()
            heights = {place(t): t.value.sum() for t in terms_of(run({**drawn, name: value}), {})}
            return {t: (h.item(), _slope(h, value)) for t, h in heights.items()}

        return flat_sites(pathwise, latents, probe)


def _slope(height: Array, value: Array) -> float:
    if not height.requires_grad:
        return 0.0
    (slope,) = torch.autograd.grad(height, value, retain_graph=True, allow_unused=True)
    return 0.0 if slope is None else float(slope.abs().max())


def _square(parts: Iterable[Array]) -> float:
    return float(sum(torch.sum(x * x).item() for x in parts))
