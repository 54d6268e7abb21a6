"""What the estimators share that differentiate −log q through the value only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..core.densities import check_density, check_ends
from ..core.estimator import Array, Costs, Draw, Estimator, Keeps, Kept, Local, Noise, Ops, Site, Value
from .library_draw import LibraryDraw
from .pathwise import Pathwise


class WithoutScore(LibraryDraw):
    """Base: draws as ``estimator`` does, by default as the library."""

    sticks: ClassVar[bool] = True

    estimator: Estimator | None

    def __post_init__(self) -> None:
        if not self.drawn.value.whole:
            raise ValueError(
                f"{type(self).__name__}(estimator) needs an estimator whose value carries the whole gradient, such as "
                f"ImplicitPathwise() or GumbelSoftmax(), got {self.estimator!r}."
            )

    @property
    def drawn(self) -> Estimator:
        return self.estimator or Pathwise()

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.drawn.unbiased

    @property
    def families(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return self.drawn.families

    @property
    def value(self) -> Value:  # type: ignore[override]
        return self.drawn.value

    @property
    def asked(self) -> bool:
        return self.drawn.asked

    def check(self, site: Site, particles: int) -> None:
        if self.estimator is None:
            super().check(site, particles)
        else:
            self.estimator.check(site, particles)
        check_ends(site)
        check_density(site)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.drawn.given(args, kwargs)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.drawn.keeps(site, given)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return self.drawn.noise(site)

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return self.drawn.draw(ops, site, noise)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        return self.drawn.local(ops, site, draw, costs, kept)
