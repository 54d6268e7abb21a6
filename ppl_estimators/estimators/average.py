"""The mean of several estimators of one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.estimator import Estimator
from ..core.keep import Initial, Kept, Network, prefixed, strip
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .several import Several, declared


@dataclass(frozen=True, eq=False, repr=False)
class Average(Several):
    """The mean of the local gradients of several estimators, each with a draw of its own.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          1/n Σ_j g_j,   g_j the estimate of estimator j
    Requires      what its parts require, none of them pathwise. The evaluations of all parts. Unbiased if they are.

    The draws are independent given what is upstream; what is downstream shares its noise. To average one estimator
    with itself use `Repeat`; for weights that lower the variance use `Combine`.

    >>> from ppl_estimators import DisARM, Reinforce
    >>> Average((DisARM(), Reinforce()))
    Average((DisARM(), Reinforce()))

    Reference: Owen (2013), "Monte Carlo theory, methods and examples", chapter 8.
    """

    estimators: tuple[Estimator, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "estimators", tuple(self.estimators))
        if len(self.estimators) < 2:
            raise ValueError(f"{name}(estimators) needs two or more, got {len(self.estimators)}.")
        for e in self.estimators:
            if not isinstance(e, Estimator):
                raise TypeError(f"{name}(estimators) takes estimators, got {e!r}.")

    @property
    def parts(self) -> tuple[Estimator, ...]:
        return self.estimators

    def check(self, site: Site, particles: int) -> None:
        self.check_parts(site, particles)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return declared(self.parts, "given", args, kwargs)

    def parameters(self, site: Site) -> dict[str, Initial]:
        return declared(self.parts, "parameters", site)

    def networks(self, site: Site, given: Mapping[str, Array]) -> dict[str, Network]:
        found = [prefixed(f"{j}_", p.networks(site, strip(f"{j}_", given))) for j, p in enumerate(self.parts)]
        return {k: v for networks in found for k, v in networks.items()}

    def state(self, site: Site) -> dict[str, Initial]:
        return declared(self.parts, "state", site)

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        locals_ = self.part_locals(ops, site, draw, costs, kept)
        surrogate = sum(ops.sum(local.surrogate) for local in locals_) / len(self.parts)
        return Local(surrogate, *self.trained(ops, locals_))

    def part_locals(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> list[Local]:
        return [
            p.local(ops, self.part_site(site, draw, j), self.part_draw(draw, j), c, self.part_kept(kept, j))
            for j, (p, c) in enumerate(zip(self.parts, self.part_costs(site, costs), strict=True))
        ]

    @staticmethod
    def trained(ops: Ops, locals_: list[Local]) -> tuple[Array | None, dict[str, Array]]:
        """The parts' auxiliary objectives added, and their states under their prefixes."""
        auxiliary = [ops.sum(local.auxiliary) for local in locals_ if local.auxiliary is not None]
        state = {k: x for j, local in enumerate(locals_) for k, x in prefixed(f"{j}_", local.state).items()}
        return (sum(auxiliary) if auxiliary else None), state
