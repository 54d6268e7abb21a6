"""One estimator with several draws at a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.estimator import Estimator
from ..core.keep import Initial, Kept, Network
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Local, Site
from .several import Several


@dataclass(frozen=True, eq=False, repr=False)
class Repeat(Several):
    """Several independent draws at this site only, for any score-function estimator.

    Approximates  ∇_λ E_{z ~ q_λ}[f(z)]
    With          1/n Σ_j g(z_j),   z_j drawn independently given what is upstream; downstream shares its noise
    Requires      what ``estimator`` requires. n times its evaluations. Unbiased if it is.

    The repeats are to the estimator what particles are: ``Repeat(4, Reinforce(LeaveOneOut()))`` is leave-one-out with
    four draws of this site and one particle. Cheaper than particles if only the part of the program downstream of the
    site is dear to evaluate again, and it spends the draws where the noise is.

    >>> from ppl_estimators import DisARM
    >>> Repeat(2, DisARM())
    Repeat(2, DisARM())

    Reference: Titsias & Lázaro-Gredilla (2015), "Local Expectation Gradients for Black Box Variational Inference",
    arXiv:1503.01494.
    """

    n: int
    estimator: Estimator

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 2:
            raise ValueError(f"{type(self).__name__}(n) needs an integer of 2 or more, got {self.n!r}.")
        _check_estimator(self, self.estimator)

    @property
    def parts(self) -> tuple[Estimator, ...]:
        return (self.estimator,) * self.n

    def check(self, site: Site, particles: int) -> None:
        self.check_parts(site, particles * len(self.parts))

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.estimator.given(args, kwargs)

    def parameters(self, site: Site) -> dict[str, Initial]:
        return self.estimator.parameters(site)

    def networks(self, site: Site, given: Mapping[str, Array]) -> dict[str, Network]:
        return self.estimator.networks(site, given)

    def state(self, site: Site) -> dict[str, Initial]:
        return self.estimator.state(site)

    def part_kept(self, kept: Kept, j: int) -> Kept:
        return kept

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        """The estimator's own, with n·K draws where there are K particles."""
        n = len(self.parts)

        def tile(x: Any) -> Any:
            return ops.concat([x] * n, axis=0) if hasattr(x, "shape") and x.ndim else x

        draws, parts = [self.part_draw(draw, j) for j in range(n)], self.part_costs(site, costs)
        many = replace(
            site,
            scale=tile(site.scale),
            logits=tile(site.logits),
            named={k: tile(x) for k, x in site.named.items()},
            log_q=ops.concat([draw.extra[f"{j}_log_q"] for j in range(n)], axis=0) if self.score else None,
        )
        together = Draw(
            ops.concat([d.value for d in draws], axis=0),
            {k: ops.concat([d.extra[k] for d in draws], axis=0) for k in draws[0].extra if k != "log_q"},
        )
        stacked = {
            k: None if getattr(parts[0], k) is None else ops.concat([getattr(c, k) for c in parts], axis=1)
            for k in ("alternatives", "relaxed", "relaxed_slope")
        }
        cost = Costs(ops.concat([c.value for c in parts], axis=0), **stacked)
        given = {k: tile(x) for k, x in kept.given.items()}
        local = self.estimator.local(ops, many, together, cost, replace(kept, given=given))
        auxiliary = None if local.auxiliary is None else ops.sum(local.auxiliary) / n
        return Local(ops.sum(local.surrogate) / n, auxiliary, local.state)


def _check_estimator(spec: Estimator, estimator: Any) -> None:
    if not isinstance(estimator, Estimator):
        raise TypeError(f"{type(spec).__name__} takes an estimator such as DisARM(), got {estimator!r}.")
