"""Augment-REINFORCE-swap-merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Kept, Local, Noise, Ops, Site
from ..core.families import CATEGORICAL, ONEHOT, encoded


@dataclass(frozen=True, eq=False, repr=False)
class ARSM(Estimator):
    """Augment-REINFORCE-swap-merge for categorical sites.

    Approximates  ∂/∂φ_m E_{z ~ softmax(φ)}[f(z)]
    With          Σ_j (f(z^{m↔j}) − 1/C Σ_{m'} f(z^{m'↔j})) (1/C − π_j),   π ~ Dirichlet(1, ..., 1),
                  z = argmin_c (log π_c − φ_c), and z^{m↔j} the same with π_m and π_j exchanged
    Requires      Categorical or OneHotCategorical sites; nothing of f. 1 + C(C − 1)/2 evaluations. Unbiased.
    Not advised   for comparison; LeaveOneOut() is less noisy at this price

    Not recommended: at as many evaluations LeaveOneOut() has less variance, also in the paper that improves on ARSM
    (arXiv:2106.08056), and for a single element Enumerate() is exact with fewer. ARSM is here to compare with.
    Dependent elements, and sites that do not depend on each other, are swapped together.

    >>> ARSM()
    ARSM()

    Reference: Yin, Yue & Zhou (2019), "ARSM: Augment-REINFORCE-Swap-Merge Estimator for Gradient Backpropagation
    Through Categorical Variables", arXiv:1905.01413.
    """

    families: ClassVar[tuple[str, ...] | None] = (CATEGORICAL, ONEHOT)

    def alternatives(self, site: Site) -> Draws:
        return Draws(len(_swaps(site.categories)))

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", tuple(site.logits.shape))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        e, a = -ops.log(noise["u"]), site.logits  # exponential; π = e / Σ e
        place = ops.indices(site.categories, e)
        swapped = []
        for m, j in _swaps(site.categories):
            exchanged = ops.where(place == j, e[..., m : m + 1], e)
            exchanged = ops.where(place == m, e[..., j : j + 1], exchanged)
            swapped.append(ops.argmin(ops.log(exchanged) - a, axis=-1))
        z = encoded(ops, site.family, ops.argmin(ops.log(e) - a, axis=-1), a)
        pi = e / ops.sum(e, axis=-1, keepdims=True)
        return Draw(z, {"pi": pi, "swapped": ops.stack(swapped, axis=-1)})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return encoded(ops, site.family, draw.extra["swapped"][..., index], site.logits)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        c = site.categories
        swapped = {pair: costs.alternatives[i] for i, pair in enumerate(_swaps(c))}
        gradient = ops.zeros_like(site.logits)
        for j in range(c):
            pairs = [(min(m, j), max(m, j)) for m in range(c)]
            f = ops.stack([site.spread(ops, swapped.get(pair, costs.value)) for pair in pairs], axis=-1)
            weight = 1 / c - draw.extra["pi"][..., j : j + 1]
            gradient = gradient + (f - ops.mean(f, axis=-1, keepdims=True)) * weight
        return Local(ops.stop_gradient(gradient) * site.logits)


def _swaps(c: int) -> list[tuple[int, int]]:
    return [(m, j) for j in range(c) for m in range(j)]
