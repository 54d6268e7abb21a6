"""What the estimators share whose value is a discrete draw with a made-up derivative, or a relaxed draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Estimator, Initial, Keeps, Kept, Local, Noise, Ops, Site, Value
from ..core.families import RELAXABLE, threshold

#: a number, or a function of the number of steps taken, in arithmetic that both libraries' arrays know
Temperature = float | Callable[[Array], Array]


class RelaxedValue(Estimator):
    """Base of biased estimators at Bernoulli and one-hot sites whose value carries a gradient.

    The log probabilities of the site itself, log p and −log q, are taken by their linear extension: right at the
    corners, and differentiable in the value. Where the value is hard, −log q has no slope in the site's parameters.
    """

    unbiased: ClassVar[bool] = False
    value: ClassVar[Value] = Value.HARD
    families: ClassVar[tuple[str, ...] | None] = RELAXABLE
    instead: ClassVar[str] = "Use OneHotCategorical for a categorical, or Reinforce(LeaveOneOut())"

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", tuple(site.logits.shape))}


class Tempered(RelaxedValue):
    """A relaxed value with a temperature, fixed or scheduled. A schedule keeps the number of steps taken."""

    temperature: Temperature

    def __post_init__(self) -> None:
        if not callable(self.temperature) and not self.temperature > 0:
            raise ValueError(
                f"{type(self).__name__}(temperature=...) needs a positive number, or a function of the number of "
                f"steps, got {self.temperature!r}."
            )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return Keeps(state={"steps": Initial()} if callable(self.temperature) else {})

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {**super().noise(site), **({"steps": Noise("state")} if callable(self.temperature) else {})}

    def at(self, noise: Mapping[str, Array]) -> Array | float:
        """The temperature of this step."""
        return self.temperature(noise["steps"]) if callable(self.temperature) else self.temperature

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        """Counts the steps."""
        return Local(ops.zeros_like(costs.value), state={k: n + 1 for k, n in kept.state.items()})


def hard(ops: Ops, site: Site, noise: Mapping[str, Array]) -> Array:
    """The discrete draw, 0 or 1, that the noise gives."""
    return ops.stop_gradient(threshold(ops, site.family, site.logits, noise["u"]))


def with_slope(ops: Ops, value: Array, soft: Array) -> Array:
    """``value`` exactly, with the derivative of ``soft``."""
    return value + (soft - ops.stop_gradient(soft))
