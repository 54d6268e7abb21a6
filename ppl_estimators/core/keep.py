"""What an estimator keeps between steps: parameters and networks that are trained, state that is updated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import site_error
from .ops import Array, Ops


@dataclass(frozen=True)
class Initial:
    """An array at the start: ``value`` plus ``spread`` times standard normal noise."""

    shape: tuple[int, ...] = ()
    value: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Network:
    """A network from ``features`` numbers to one; ``module`` is the user's own, None for the default."""

    features: int
    hidden: int = 32
    module: Any = None

    def parameters(self) -> dict[str, Initial]:
        """The default: one hidden tanh layer, its output weights zero, so that it starts as the constant 0."""
        return {
            "w1": Initial((self.features, self.hidden), spread=self.features**-0.5),
            "b1": Initial((self.hidden,)),
            "w2": Initial((self.hidden, 1)),
            "b2": Initial((1,)),
        }


def mlp(ops: Ops, weights: Mapping[str, Array], x: Array) -> Array:
    """The default network: ``x [..., F]`` to ``[..., 1]``."""
    return ops.matmul(ops.tanh(ops.matmul(x, weights["w1"]) + weights["b1"]), weights["w2"]) + weights["b2"]


def predict(site: str, network: Callable[[Array], Array], x: Array) -> Array:
    """One number for each row of ``x [..., F]``: networks may answer ``[...]`` (Pyro's habit) or ``[..., 1]``."""
    y, rows = network(x), tuple(x.shape[:-1])
    if tuple(y.shape) == rows:
        return y
    if tuple(y.shape) == (*rows, 1):
        return y[..., 0]
    raise site_error(
        site,
        f"its network returned the shape {tuple(y.shape)} for inputs {tuple(x.shape)}",
        f"Return {rows} or {(*rows, 1)}: one number for each plate element.",
    )


@dataclass(frozen=True)
class Hooked:
    """What a guide hook tells of one site: the hook's mapping, what it asks for there, and what holds what it keeps."""

    estimators: Mapping[str, Any]
    requested: Any
    keeper: Any = None


@dataclass(frozen=True)
class Keeps:
    """What is declared: parameters and networks, trained by the user's optimiser on `Local.auxiliary`, and state,
    updated once a step and never differentiated."""

    parameters: Mapping[str, Initial] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)
    state: Mapping[str, Initial] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.parameters or self.networks or self.state)

    def __or__(self, other: Keeps) -> Keeps:
        return Keeps(
            {**self.parameters, **other.parameters}, {**self.networks, **other.networks}, {**self.state, **other.state}
        )

    def under(self, prefix: str) -> Keeps:
        """With every label behind ``prefix``; `Kept.sub` takes it off again."""
        return Keeps(*(prefixed(prefix, d) for d in (self.parameters, self.networks, self.state)))


@dataclass(frozen=True)
class Kept:
    """What was declared, with its present values."""

    parameters: Mapping[str, Array] = field(default_factory=dict)
    networks: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)
    state: Mapping[str, Array] = field(default_factory=dict)
    given: Mapping[str, Array] = field(default_factory=dict)  # arrays that the user's spec brought along

    def sub(self, prefix: str) -> Kept:
        """The part that ``prefixed(prefix, ...)`` declared."""
        return Kept(*(strip(prefix, d) for d in (self.parameters, self.networks, self.state, self.given)))


def prefixed(prefix: str, declared: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{k}": v for k, v in declared.items()}


def strip(prefix: str, d: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in d.items() if k.startswith(prefix)}


def guarded(ops: Ops, old: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
    """``new``, unless anything in it is not finite: then all of ``old``. One bad step poisons nothing."""
    finite = None
    for x in new.values():
        ok = ops.all(ops.isfinite(x))
        finite = ok if finite is None else finite & ok
    return {k: ops.where(finite, ops.stop_gradient(new[k]), old[k]) for k in new} if new else {}
