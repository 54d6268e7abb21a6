"""What the compositions share: several draws at one site, each evaluated in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..core.errors import site_error
from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Local, Measure, Moves, Noise, Ops, Relaxations, Site
from ..core.keep import Keeps, Kept, prefixed, strip
from ..core.particles import times

#: a part's own draw, and its log q, among what it needs later; no estimator calls anything of its own so
_VALUE, _LOG_Q = "drawn value", "drawn log q"


class Several(Estimator):
    """Draw j is that of ``parts[j]``, with noise of its own. The run uses the first; the others, and the
    counterfactual values of all of them, are alternatives. Whatever a part wants measured is measured for its own
    draws, so parts may be compositions too."""

    instead: ClassVar[str] = "Use Pathwise() with several particles"

    @property
    def parts(self) -> Sequence[Estimator]:
        raise NotImplementedError

    # ---- facts: what the parts have in common -----------------------------------------------------------------------

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return all(p.unbiased for p in self.parts)

    @property
    def families(self) -> tuple[str, ...] | None:  # type: ignore[override]
        known = [p.families for p in self.parts if p.families is not None]
        return tuple(f for f in known[0] if all(f in k for k in known)) if known else None

    @property
    def measures(self) -> frozenset[Measure]:  # type: ignore[override]
        return frozenset().union(*(p.measures for p in self.parts))

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return any(p.compares for p in self.parts)

    def check_parts(self, site: Site, particles: int) -> None:
        name = type(self).__name__
        for p in self.parts:
            if p.value.moves or Measure.FUNCTIONS in p.measures:
                raise site_error(
                    site.name,
                    f"{name} evaluates several draws of a score-function estimator, which it cannot with {p!r}",
                    self.instead + ", or Reinforce(LeaveOneOut()).",
                )
            if Measure.SCORE_NORM in p.measures:
                raise site_error(
                    site.name, f"{name} has no score norm for {p!r}", "Use MovingAverage() or LeaveOneOut() there."
                )
            p.check(site, particles)
        modes = {r.downstream for r in self._relaxations(site) if r.count}
        if len(modes) > 1:
            raise site_error(
                site.name,
                f"{self!r}: its parts want different things of the sites downstream while they relax this one",
                "Combine estimators that relax alike, such as REBAR() and RELAXWithModel().",
            )

    # ---- noise in, values out ---------------------------------------------------------------------------------------

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {k: n for j, p in enumerate(self.parts) for k, n in prefixed(f"{j}_", p.noise(site)).items()}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        return joined([p.draw(ops, site, strip(f"{j}_", noise)) for j, p in enumerate(self.parts)])

    @staticmethod
    def part_draw(draw: Draw, j: int) -> Draw:
        extra = strip(f"{j}_", draw.extra)
        return Draw(extra.pop(_VALUE), extra)

    def scored(self, draw: Draw) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for j, p in enumerate(self.parts):
            if Measure.LOG_Q in p.measures:
                mine = self.part_draw(draw, j)
                found |= prefixed(f"{j}_", {_LOG_Q: mine.value, **p.scored(mine)})
        return found

    def _offsets(self, site: Site) -> list[int]:
        """Where the evaluations of each part begin, the drawn value being number 0."""
        starts = [0]
        for p in self.parts:
            starts.append(starts[-1] + 1 + p.alternatives(site).count)
        return starts

    def alternatives(self, site: Site) -> Draws | Moves:
        count, of_parts = self._offsets(site)[-1] - 1, [p.alternatives(site) for p in self.parts]
        if all(a.own_law for a in of_parts):
            return Draws(count)
        known = all(a.own_law or a.weights is not None for a in of_parts)
        return Moves(count, self.weights if known else None)

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        value = draw.value
        number = ops.indices(1, value)[0] + index + 1  # on the device of the values
        for j, (p, start) in enumerate(zip(self.parts, self._offsets(site), strict=False)):
            mine, count = self.part_draw(draw, j), p.alternatives(site).count
            value = ops.where(number == start, mine.value, value)
            if count:
                inside = number - start - 1
                other = p.alternative(ops, site, mine, ops.clip(inside, 0, count - 1))
                value = ops.where((inside >= 0) & (inside < count), other, value)
        return value

    def weights(self, ops: Ops, site: Site, draw: Draw) -> Array:
        """Those of each part, of its own draw and values, over the number of parts."""
        of_parts = [p.alternatives(site) for p in self.parts]
        known = {j: a.weights(ops, site, self.part_draw(draw, j)) for j, a in enumerate(of_parts) if a.weights}
        one = ops.ones_like(next(iter(known.values()))[:1])
        alike = [ops.concat([one / (1 + a.count)] * (1 + a.count), axis=0) for a in of_parts]
        return ops.concat([known.get(j, alike[j]) for j in range(len(of_parts))], axis=0) / len(of_parts)

    def _relaxations(self, site: Site) -> list[Relaxations]:
        return [p.relaxations(site) for p in self.parts]

    def relaxations(self, site: Site) -> Relaxations:
        asked = [r for r in self._relaxations(site) if r.count]
        return Relaxations(sum(r.count for r in asked), asked[0].downstream) if asked else Relaxations()

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        j, index = self._part_relaxed(site, index)
        return self.parts[j].relaxed(ops, site, self.part_draw(draw, j), index, self.part_kept(kept, j))

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        j, index = self._part_relaxed(site, index)
        return self.parts[j].downstream_temperature(ops, site, index, self.part_kept(kept, j))

    def _part_relaxed(self, site: Site, index: int) -> tuple[int, int]:
        """Which part asks for relaxed value number ``index``, and which of its own that is."""
        for j, r in enumerate(self._relaxations(site)):
            if index < r.count:
                return j, index
            index -= r.count
        raise IndexError(index)

    def part_kept(self, kept: Kept, j: int) -> Kept:
        raise NotImplementedError

    # ---- what each part sees ----------------------------------------------------------------------------------------

    def part_costs(self, site: Site, costs: Costs) -> list[Costs]:
        starts, m, found = self._offsets(site), 0, []
        for j, p in enumerate(self.parts):
            first, count = starts[j], p.alternatives(site).count
            value = costs.value if first == 0 else costs.alternatives[first - 1]
            own = costs.alternatives[first : first + count] if count else None
            n = p.relaxations(site).count
            soft = (costs.relaxed[m : m + n], costs.relaxed_slope[m : m + n]) if n else (None, None)
            m += n
            found.append(Costs(value, own, *soft))
        return found

    def part_site(self, site: Site, draw: Draw, j: int) -> Site:
        return site.filled(log_q=draw.extra.get(f"{j}_{_LOG_Q}"))


class Mixture(Several):
    """Different estimators, each with what it keeps under its own number."""

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
        return _numbered([p.given(args, kwargs) for p in self.parts])

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        found = Keeps()
        for j, p in enumerate(self.parts):
            found |= p.keeps(site, strip(f"{j}_", given)).under(f"{j}_")
        return found

    def part_kept(self, kept: Kept, j: int) -> Kept:
        return kept.sub(f"{j}_")

    def part_locals(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> list[Local]:
        return [
            p.local(ops, self.part_site(site, draw, j), self.part_draw(draw, j), c, self.part_kept(kept, j))
            for j, (p, c) in enumerate(zip(self.parts, self.part_costs(site, costs), strict=True))
        ]

    @staticmethod
    def trained(ops: Ops, locals_: list[Local]) -> tuple[Array | None, dict[str, Array]]:
        """The parts' auxiliary objectives added, and their states under their numbers."""
        auxiliary = [ops.sum(local.auxiliary) for local in locals_ if local.auxiliary is not None]
        return (sum(auxiliary) if auxiliary else None), _numbered([local.state for local in locals_])


class Repeated(Several):
    """One estimator with ``n`` draws in each particle, which are to it what particles are."""

    n: int
    estimator: Estimator

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 2:
            raise ValueError(f"{type(self).__name__}(n) needs an integer of 2 or more, got {self.n!r}.")
        if not isinstance(self.estimator, Estimator):
            raise TypeError(f"{type(self).__name__} takes an estimator such as DisARM(), got {self.estimator!r}.")

    @property
    def parts(self) -> tuple[Estimator, ...]:
        return (self.estimator,) * self.n

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.estimator.given(args, kwargs)

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.estimator.keeps(site, given)

    def part_kept(self, kept: Kept, j: int) -> Kept:
        return kept

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        """The estimator's own, with n·K draws where there are K particles."""
        n, parts = self.n, self.part_costs(site, costs)
        draws = [self.part_draw(draw, j) for j in range(n)]

        def side_by_side(arrays: list[Array | None], axis: int = 0) -> Array | None:
            return None if arrays[0] is None else ops.concat(arrays, axis=axis)

        extra = {k: side_by_side([d.extra[k] for d in draws]) for k in draws[0].extra}
        many = times(ops, site, n, costs.value, extra.pop(_LOG_Q, None))
        cost = Costs(
            side_by_side([c.value for c in parts]),
            side_by_side([c.alternatives for c in parts], 1),
            side_by_side([c.relaxed for c in parts], 1),
            side_by_side([c.relaxed_slope for c in parts], 1),
        )
        local = self.estimator.local(ops, many, Draw(side_by_side([d.value for d in draws]), extra), cost, kept)
        auxiliary = None if local.auxiliary is None else ops.sum(local.auxiliary) / n
        return Local(ops.sum(local.surrogate) / n, auxiliary, local.state)


def joined(draws: Sequence[Draw]) -> Draw:
    """What each part drew, and needs later, under its number."""
    return Draw(draws[0].value, _numbered([{_VALUE: d.value, **d.extra} for d in draws]))


def _numbered(of_parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {k: x for j, mine in enumerate(of_parts) for k, x in prefixed(f"{j}_", mine).items()}
