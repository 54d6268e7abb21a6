"""The local expectation of a few random elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core import lanes
from ..core.estimator import Array, Costs, Draw, Estimator, Kept, Local, Moves, Noise, Ops, Site
from ..core.families import BERNOULLI, possible


@dataclass(frozen=True, eq=False, repr=False)
class BitFlip(Estimator):
    """Flip m of D dependent elements, chosen at random, one at a time (bitflip-1 for m = 1).

    Approximates  ∇_a E_{b ~ Bernoulli(σ(a))}[f(b)]
    With          D/m · 1[i chosen] p_i q_i (f(b_{i:=1}) − f(b_{i:=0})),   p = σ(a), q = 1 − p
    Requires      Bernoulli sites; nothing of f. 1 + m evaluations for any number D of dependent elements. Unbiased.
    For           late in training, most elements nearly decided
    Not for       probabilities near ½: DisARM()

    ``m``: elements per step and plate element, drawn afresh without replacement; with m ≥ D it is Enumerate().
    Elements that a plate makes independent are flipped side by side, each its own choice. Its second moment falls
    with p² as p nears 0, DisARM's only with p: prefer it late, when most elements are nearly decided. At p = ½ nothing
    is gained (for a sum of equal effects the two agree there); UGC() takes the better for each element.

    >>> BitFlip(m=2)
    BitFlip(2)

    Reference: Kunes, Yin, Land, Haviv, Pe'er & Tavaré (2022), "Gradient Estimation for Binary Latent Variables via
    Gradient Variance Clipping", arXiv:2208.06124. It flips one element; more of them are ours.
    """

    m: int = 1

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI,)

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"BitFlip(m) flips m elements: m must be an integer, 1 or more, got {self.m!r}.")

    def alternatives(self, site: Site) -> Moves:
        return Moves(min(self.m, site.lanes))

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"value": Noise("value"), "u": Noise("uniform", (*site.batch_shape, *site.event_shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return Draw(noise["value"], {"u": noise["u"]})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return ops.where(self._chosen(ops, site, draw, index), 1 - draw.value, draw.value)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a, b, m = site.logits, draw.value, self.alternatives(site).count
        difference = ops.zeros_like(a)
        for j in range(m):
            change = site.spread(ops, costs.alternatives[j] - costs.value)
            difference = ops.where(self._chosen(ops, site, draw, j), change, difference)
        weight = ops.sigmoid(a) * ops.sigmoid(-a)
        gradient = site.lanes / m * (1 - 2 * b) * possible(ops, weight, weight * difference)
        return Local(ops.stop_gradient(gradient) * a)

    @staticmethod
    def _chosen(ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """Is an element the one that evaluation ``index`` flips? In the shape of the value."""
        order = ops.argsort(site.features(ops, draw.extra["u"]), axis=-1)  # [*lead, *plates, D]
        return lanes.numbers(ops, site, order) == site.spread(ops, order[..., index])
