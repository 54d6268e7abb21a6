"""A network trained to predict the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import site_error
from ...core.estimator import Array, Ops, Site
from ...core.keep import Keeps, Kept, Network, predict
from .base import Baseline


@dataclass(frozen=True, eq=False, repr=False)
class Learned(Baseline):
    """A network C_ψ(x), trained by least squares on the downstream cost: minimise (f − C_ψ(x))².

    For           one particle, amortised guides
    Not for       several particles: LeaveOneOut() needs no training

    ``inputs``: what it sees. None: the site's own distribution parameters, a function of its parents only. An array
    ``[*plates, ...]``; or a function of the guide's arguments that returns one. In a NumPyro `scan` that of the step
    where the site names it itself, from outside ``[steps, *plates, ...]``. Inputs are constants: no gradient flows into
    them. They must not depend on the site's own draw.

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

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise ValueError(f"Learned(hidden=...) needs a positive integer, got {self.hidden!r}.")

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        if self.inputs is None:
            return {}
        return {"inputs": self.inputs(*args, **kwargs) if callable(self.inputs) else self.inputs}

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        site = site.opened
        if "inputs" in given:
            width = math.prod(given["inputs"].shape[site.nesting :])
        else:
            width = sum(site.feature_count(p) for p in site.parameters)
            if not width:
                raise site_error(
                    site.name,
                    f"Learned() sees the parameters of the distribution, and {site.distribution} shows none",
                    "Pass what it is to see, Learned(inputs=lambda *args: ...) of the guide's arguments, or use "
                    "MovingAverage().",
                )
        return Keeps(networks={"baseline": Network(width, self.hidden, self.network)})

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return ops.stop_gradient(self._forward(ops, site, cost, kept)) * site.subsampling

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        target = ops.stop_gradient(cost / site.subsampling)
        return (target - self._forward(ops, site, cost, kept)) ** 2, {}

    def _forward(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        """C_psi(x), summed over elements that a cost couples: [K, *plates]."""
        whole = site.opened
        if "inputs" in kept.given:
            x = self._rows(ops, whole, kept.given["inputs"], cost.shape[0])
        else:
            x = ops.concat([whole.features(ops, p) for p in site.parameters], axis=-1)
        return site.to_plates(ops, predict(site.name, kept.networks["baseline"], ops.stop_gradient(x)))

    @staticmethod
    def _rows(ops: Ops, site: Site, x: Array, count: int) -> Array:
        """``x [*plates, ...]``, with the particles first where it was computed in each, as one row for each plate
        element: ``[1 or count, 1s or sizes, F]``."""
        outer = len(site.batch_shape) - site.nesting
        wanted = site.plate_shape[outer:]

        def split(lead: int) -> Array | None:
            sizes = tuple(x.shape[lead : lead + site.nesting])
            if not fits_each(sizes, wanted) or (lead and count % x.shape[0]):
                return None
            features = math.prod(x.shape[lead + site.nesting :])
            return ops.reshape(x, (*(x.shape[:1] if lead else (1,)), *(1,) * outer, *sizes, features))

        rows = next((r for r in map(split, (1, 0)[x.ndim == 0 :]) if r is not None), None)
        if rows is None:
            raise site_error(
                site.name,
                f"Learned(inputs=...) got the shape {tuple(x.shape)}, the particles first, where the plates have "
                f"{wanted}",
                "Give one row of features for each plate element: the sizes of the plates, then whatever there is.",
            )
        return for_each_draw(ops, rows, count)


@dataclass(frozen=True, eq=False, repr=False)
class Given(Baseline):
    """A baseline that the guide computed itself, trained by least squares on the downstream cost.

    For           a baseline that the guide computes

    ``value``: an array ``[*plates]``, or a function of the guide's arguments that returns one. Its gradient must lead
    only to the baseline's own parameters (stop it at anything else), and it must not depend on the site's own draw.
    Pyro's ``infer={"baseline": {"baseline_value": ...}}`` means this.
    """

    value: Any

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return {"value": self.value(*args, **kwargs) if callable(self.value) else self.value}

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return ops.stop_gradient(self._value(ops, site, cost, kept))

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        return (ops.stop_gradient(cost) - self._value(ops, site, cost, kept)) ** 2, {}

    @staticmethod
    def _value(ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        """``[1 or K, *plates or 1s]``, summed over elements that a cost couples; axes count from the right, and a last
        one of size 1 may follow."""
        x, wanted, count = kept.given["value"], site.opened.plate_shape, cost.shape[0]

        def aligned(lead: int, last: int) -> Array | None:
            own = tuple(x.shape[lead : x.ndim - last])
            missing = len(wanted) - len(own)
            if missing < 0 or not fits_each(own, wanted[missing:]) or (lead and count % x.shape[0]):
                return None
            return ops.reshape(x, (*(x.shape[:1] if lead else (1,)), *(1,) * missing, *own))

        last = (0, 1) if x.ndim and x.shape[-1] == 1 else (0,)
        tried = (aligned(lead, cut) for cut in last for lead in (1, 0) if lead + cut <= x.ndim)
        value = next((v for v in tried if v is not None), None)
        if value is None:
            raise site_error(
                site.name,
                f"Given(value) got the shape {tuple(x.shape)}, the particles first, where the plates have {wanted}",
                f"Give one number for each plate element, {wanted}, or one for all, ().",
            )
        return for_each_draw(ops, site.to_plates(ops, value), count)


def fits_each(sizes: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(sizes) == len(wanted) and all(n in (1, w) for n, w in zip(sizes, wanted, strict=True))


def for_each_draw(ops: Ops, x: Array, count: int) -> Array:
    """``x [K, ...]`` for as many draws as there are: those of a composition come one after another, K of each."""
    repeats = 1 if x.shape[0] == 1 else count // x.shape[0]
    return ops.concat([x] * repeats, axis=0) if repeats > 1 else x
