"""What the compositions share: several draws at one site, each evaluated in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ..core.errors import site_error
from ..core.estimator import Estimator, Noise
from ..core.keep import Kept, prefixed, strip
from ..core.ops import Array, Ops
from ..core.site import Costs, Draw, Site
from .baselines.optimal_constant import OptimalConstant
from .control_variate import ControlVariate


class Several(Estimator):
    """Draw j is that of ``parts[j]``, with noise of its own. The run uses the first; the others, and the
    counterfactual values of all of them, are alternatives."""

    instead: ClassVar[str] = "Use Pathwise() with several particles"

    @property
    def parts(self) -> Sequence[Estimator]:
        raise NotImplementedError

    # ---- facts: what the parts have in common -----------------------------------------------------------------------

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return all(p.unbiased for p in self.parts)

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return all(p.shared or not p.lanewise for p in self.parts)

    @property
    def lanewise(self) -> bool:  # type: ignore[override]
        return any(p.lanewise for p in self.parts)

    @property
    def downstream(self) -> str:  # type: ignore[override]
        return next((p.downstream for p in self.parts if p.downstream != "relaxed"), "relaxed")

    @property
    def score(self) -> bool:  # type: ignore[override]
        return any(p.score for p in self.parts)

    @property
    def keeps(self) -> bool:
        return any(p.keeps for p in self.parts)

    def check_parts(self, site: Site, particles: int) -> None:
        name = type(self).__name__
        for p in self.parts:
            if p.pathwise or isinstance(p, ControlVariate) or site.time:
                where = "inside a scan" if site.time else f"with {p!r}"
                raise site_error(
                    site.name,
                    f"{name} evaluates several draws of a score-function estimator, which it cannot {where}",
                    self.instead + ", or Reinforce(LeaveOneOut()).",
                )
            baseline = getattr(p, "baseline", None)
            if baseline is not None and any(isinstance(b, OptimalConstant) for b in baseline.parts):
                raise site_error(
                    site.name, f"{name} has no score norm for {p!r}", "Use MovingAverage() or LeaveOneOut() there."
                )
            p.check(site, particles)
        modes = {p.downstream for p in self.parts if p.relaxations(site)}
        if len(modes) > 1:
            raise site_error(
                site.name,
                f"{self!r}: its parts want different things of the sites downstream while they relax this one",
                "Combine estimators that relax alike, such as REBAR() and RELAX(model_term=True).",
            )

    # ---- noise in, values out ---------------------------------------------------------------------------------------

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {k: n for j, p in enumerate(self.parts) for k, n in prefixed(f"{j}_", p.noise(site)).items()}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        draws = [p.draw(ops, site, strip(f"{j}_", noise)) for j, p in enumerate(self.parts)]
        extra = {k: x for j, d in enumerate(draws) for k, x in prefixed(f"{j}_", {"value": d.value, **d.extra}).items()}
        return Draw(draws[0].value, extra)

    @staticmethod
    def part_draw(draw: Draw, j: int) -> Draw:
        extra = strip(f"{j}_", draw.extra)
        return Draw(extra.pop("value"), extra)

    def scored(self, draw: Draw) -> dict[str, Array]:
        if not self.score:
            return {}
        return {f"{j}_log_q": draw.extra[f"{j}_value"] for j in range(len(self.parts))}

    def _offsets(self, site: Site) -> list[int]:
        """Where the evaluations of each part begin, the drawn value being number 0."""
        starts = [0]
        for p in self.parts:
            starts.append(starts[-1] + 1 + p.alternatives(site))
        return starts

    def alternatives(self, site: Site) -> int:
        return self._offsets(site)[-1] - 1

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        number, value = ops.asarray(index) + 1, draw.value

        def pick(condition: Array, x: Array, y: Array) -> Array:
            return ops.where(ops.like(condition, y) > 0, x, y)  # on the device of the values

        for j, (p, start) in enumerate(zip(self.parts, self._offsets(site), strict=False)):
            mine, count = self.part_draw(draw, j), p.alternatives(site)
            value = pick(number == start, mine.value, value)
            if count:
                inside = number - start - 1
                other = p.alternative(ops, site, mine, ops.clip(inside, 0, count - 1))
                value = pick((inside >= 0) & (inside < count), other, value)
        return value

    def relaxations(self, site: Site) -> int:
        return sum(p.relaxations(site) for p in self.parts)

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        j, index = self._part_relaxed(site, index)
        return self.parts[j].relaxed(ops, site, self.part_draw(draw, j), index, self.part_kept(kept, j))

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        j, index = self._part_relaxed(site, index)
        return self.parts[j].downstream_temperature(ops, site, index, self.part_kept(kept, j))

    def _part_relaxed(self, site: Site, index: int) -> tuple[int, int]:
        """Which part asks for relaxed value number ``index``, and which of its own that is."""
        for j, p in enumerate(self.parts):
            if index < p.relaxations(site):
                return j, index
            index -= p.relaxations(site)
        raise IndexError(index)

    def part_kept(self, kept: Kept, j: int) -> Kept:
        return kept.sub(f"{j}_")

    # ---- what each part sees ----------------------------------------------------------------------------------------

    def part_costs(self, site: Site, costs: Costs) -> list[Costs]:
        starts, m, found = self._offsets(site), 0, []
        for j, p in enumerate(self.parts):
            first, count = starts[j], p.alternatives(site)
            value = costs.value if first == 0 else costs.alternatives[first - 1]
            own = costs.alternatives[first : first + count] if count else None
            n = p.relaxations(site)
            soft = (costs.relaxed[m : m + n], costs.relaxed_slope[m : m + n]) if n else (None, None)
            m += n
            found.append(Costs(value, own, *soft))
        return found

    def part_site(self, site: Site, draw: Draw, j: int) -> Site:
        return replace(site, log_q=draw.extra[f"{j}_log_q"]) if self.score else site


def declared(parts: Sequence[Estimator], what: str, *args: Any) -> dict[str, Any]:
    """What the parts declare, under the prefix of their number."""
    return {k: v for j, p in enumerate(parts) for k, v in prefixed(f"{j}_", getattr(p, what)(*args)).items()}
