"""What the estimators share that draw a category by coin flips, and another by their mirror images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..core import splits
from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Kept, Local, Noise, Ops, Site
from ..core.families import CATEGORICAL, ONEHOT, encoded


class SplitDraw(Estimator):
    """Base: z from the bits of u, z̃ from those of 1 − u, one for each of C − 1 splits; DisARM over the splits."""

    families: ClassVar[tuple[str, ...] | None] = (CATEGORICAL, ONEHOT)

    #: of the categories: "descending" (likeliest first), "ascending" or "given"
    order: str

    @staticmethod
    def divide(categories: int) -> splits.Splits:
        return splits.sticks(categories)

    def alternatives(self, site: Site) -> Draws:
        return Draws(1)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", (*site.logits.shape[:-1], site.categories - 1))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        order = splits.ordering(ops, site.logits, self.order)
        return splits.antithetic(ops, site, self.divide(site.categories), order, noise["u"])

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return encoded(ops, site.family, draw.extra["z_tilde"], site.logits)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        return splits.disarm(ops, site, self.divide(site.categories), draw, costs)
