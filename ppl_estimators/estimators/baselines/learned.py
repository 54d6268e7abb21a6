"""A network trained to predict the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...core.keep import Kept, Network, predict
from ...core.ops import Array, Ops
from ...core.site import Site
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class Learned(Baseline):
    """A network C_ψ(x), trained by least squares on the downstream cost: minimise (f − C_ψ(x))².

    ``inputs``: what it sees. None: the site's own distribution parameters, a function of its parents only. An array
    ``[*plates, ...]``; or a function of the guide's arguments that returns one. Inputs are constants: no gradient
    flows into them. They must not depend on the site's own draw.

    ``network``: None for one tanh layer of ``hidden`` units that starts at 0; else a `torch.nn.Module` (Pyro), or a
    flax, nnx or equinox module (NumPyro), from ``[..., F]`` to ``[..., 1]``.

    The target is the cost without the N/B of subsampling, so that the network does not see the
    batch size; the prediction is multiplied by it. Its parameters are trained by your optimiser.

    >>> Learned(hidden=64)
    Learned(hidden=64)

    Reference: Mnih & Gregor (2014), "Neural Variational Inference and Learning in Belief Networks", arXiv:1402.0030.
    """

    network: Any = None
    inputs: Any = None
    hidden: int = field(default=32, kw_only=True)

    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise ValueError(f"Learned(hidden=...) needs a positive integer, got {self.hidden!r}.")

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        if self.inputs is None:
            return {}
        return {"inputs": self.inputs(*args, **kwargs) if callable(self.inputs) else self.inputs}

    def networks(self, site: Site, given: Mapping[str, Array]) -> dict[str, Network]:
        if "inputs" in given:
            width = math.prod(given["inputs"].shape[site.nesting :])
        else:
            width = sum(site.feature_count(p) for p in site.parameters)
        return {"baseline": Network(width, self.hidden, self.network)}

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return ops.stop_gradient(self._forward(ops, site, kept)) * site.subsampling

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        target = ops.stop_gradient(cost / site.subsampling)
        return (target - self._forward(ops, site, kept)) ** 2, {}

    def _forward(self, ops: Ops, site: Site, kept: Kept) -> Array:
        """C_psi(x): [K, *plates]."""
        if "inputs" in kept.given:
            x = site.rows(ops, kept.given["inputs"])
        else:
            x = ops.concat([site.features(ops, p) for p in site.parameters], axis=-1)
        return predict(site.name, kept.networks["baseline"], ops.stop_gradient(x))


@dataclass(frozen=True, eq=False, repr=False)
class Given(Baseline):
    """A baseline that the guide computed itself, trained by least squares on the downstream cost.

    ``value``: an array ``[*plates]``, or a function of the guide's arguments that returns one. Its gradient must lead
    only to the baseline's own parameters (stop it at anything else), and it must not depend on the site's own draw.
    Pyro's ``infer={"baseline": {"baseline_value": ...}}`` means this.
    """

    value: Any

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return {"value": self.value(*args, **kwargs) if callable(self.value) else self.value}

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return ops.stop_gradient(self._value(ops, site, kept))

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        return (ops.stop_gradient(cost) - self._value(ops, site, kept)) ** 2, {}

    @staticmethod
    def _value(ops: Ops, site: Site, kept: Kept) -> Array:
        return ops.sum(site.rows(ops, kept.given["value"]), axis=-1)
