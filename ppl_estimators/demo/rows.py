"""What is compared: one row of the table for each ELBO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ppl_estimators import DisARM, Learned, LeaveOneOut, MovingAverage, Pathwise, Reinforce, RELAXWithModel


@dataclass(frozen=True)
class Row:
    """One way to train. `stock` names an ELBO of the library itself; otherwise it is `EstimatorELBO`."""

    label: str
    estimators: Mapping[str, Any] = field(default_factory=dict)
    num_particles: int = 1
    stock: str | None = None

    @property
    def needs_hook(self) -> bool:
        """May an estimator keep something, which the guide must declare?"""
        return bool(self.estimators)


def ours(binary: Any, num_particles: int = 1) -> Row:
    """`binary` at both layers of binary latents, the pathwise estimator at the continuous one."""
    label = repr(binary) + (f", {num_particles} particles" if num_particles > 1 else "")
    return Row(label, {"top": binary, "low": binary, "style": Pathwise()}, num_particles)


def stock(name: str) -> Row:
    """The library's own ELBO of that name."""
    return Row(f"{name} (stock)", stock=name)


#: Every row's gradient variance is measured at the parameters that this row ends with.
REFERENCE = ours(DisARM())

OURS = (
    ours(Reinforce()),
    ours(Reinforce(MovingAverage())),
    ours(Reinforce(MovingAverage() + Learned())),
    ours(Reinforce(LeaveOneOut()), num_particles=2),
    REFERENCE,
    ours(RELAXWithModel()),
)

ROWS: Mapping[str, tuple[Row, ...]] = {
    "numpyro": (stock("TraceGraph_ELBO"), *OURS),
    "pyro": (stock("Trace_ELBO"), stock("TraceGraph_ELBO"), *OURS),
}
