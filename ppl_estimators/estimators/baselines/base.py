"""The contract of a baseline, and sums of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...core.errors import site_error
from ...core.estimator import Array, Control, Estimator, Measure, Ops, Site
from ...core.keep import Keeps, Kept, prefixed, strip
from ...core.particles import of_the_others
from ...core.spec import Spec


@dataclass(frozen=True)
class Baselined:
    """``value`` is broadcastable to the cost ``[K, *plates]`` and independent of the site's own draw;
    ``auxiliary`` is minimised over the baseline's parameters; ``state`` replaces the old one."""

    value: Array
    auxiliary: Array | None = None
    state: Mapping[str, Array] = field(default_factory=dict)


class Baseline(Spec):
    """A function of the past, of other samples, or of what is upstream: never of the draw it is subtracted from."""

    def check(self, site: Site, particles: int) -> None:
        """Raise `EstimatorError` where the baseline cannot work."""

    #: is it a weighted mean of the other particles' costs (and so linear in them)?
    from_particles: ClassVar[bool] = False
    #: what it is to the objective
    control: ClassVar[Control] = Control.OWN
    #: what it wants known of the draw under the site's law
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays that the spec itself brings along, given the guide's arguments."""
        return {}

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return Keeps()

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        """The baseline for ``cost [K, *plates]``: from state before this step, or from the other particles."""
        raise NotImplementedError

    def fit(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> tuple[Array | None, Mapping[str, Array]]:
        """Auxiliary objective and new state, given the cost that this baseline should explain."""
        return None, {}

    def evaluate(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Baselined:
        value = self.predict(ops, site, cost, kept)
        if not _fits(value.shape, cost.shape):  # broadcast, it would count the site's gradient several times
            raise site_error(
                site.name,
                f"the baseline {self!r} predicts the shape {tuple(value.shape)} for costs {tuple(cost.shape)}",
                "Predict one number for each particle and plate element, or 1 along an axis for all.",
            )
        return Baselined(value, *self.fit(ops, site, cost, kept))

    def __add__(self, other: Baseline) -> Sum:
        if not isinstance(other, Baseline):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    @property
    def parts(self) -> tuple[Baseline, ...]:
        return (self,)


class OfTheOthers(Baseline):
    """The mean cost of the other particles."""

    from_particles: ClassVar[bool] = True

    def check(self, site: Site, particles: int) -> None:
        if particles < 2:
            raise site_error(
                site.name,
                f"{type(self).__name__} needs at least two particles, got num_particles={particles}",
                "Pass EstimatorELBO(..., num_particles=2) or more, or use Reinforce(MovingAverage()).",
            )

    def predict(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Array:
        return of_the_others(ops, cost)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Baseline):
    """Several baselines added: each predicts, and is fitted to, what the parts before it leave over.

    ``MovingAverage() + Learned()`` is the baseline of neural variational inference (NVIL): a running average and a
    network for what remains. Written with ``+``.
    """

    terms: tuple[Baseline, ...]

    @property
    def from_particles(self) -> bool:  # type: ignore[override]
        return any(part.from_particles for part in self.terms)

    @property
    def measures(self) -> frozenset[Measure]:  # type: ignore[override]
        return frozenset().union(*(part.measures for part in self.terms))

    @property
    def parts(self) -> tuple[Baseline, ...]:
        return self.terms

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    def check(self, site: Site, particles: int) -> None:
        for part in self.terms:
            part.check(site, particles)
        shared = [part for part in self.terms if part.from_particles]
        if len(shared) > 1:
            raise site_error(
                site.name,
                f"{self!r}: both {shared[0]!r} and {shared[1]!r} are means of the other particles' costs, and what the "
                "first leaves of the others' costs has seen this particle's",
                "Keep one of them.",
            )

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        found = Keeps()
        for i, p in enumerate(self.terms):
            found |= p.keeps(site, strip(f"{i}_", given)).under(f"{i}_")
        return found

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return {k: v for i, p in enumerate(self.terms) for k, v in prefixed(f"{i}_", p.given(args, kwargs)).items()}

    def evaluate(self, ops: Ops, site: Site, cost: Array, kept: Kept) -> Baselined:
        total, auxiliary = None, None
        state: dict[str, Array] = {}
        for i, part in enumerate(self.terms):
            mine = part.evaluate(ops, site, ops.stop_gradient(cost), kept.sub(f"{i}_"))
            cost = cost - mine.value
            total = mine.value if total is None else total + mine.value
            if mine.auxiliary is not None:
                auxiliary = mine.auxiliary if auxiliary is None else auxiliary + mine.auxiliary
            state |= prefixed(f"{i}_", mine.state)
        return Baselined(total, auxiliary, state)


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Does ``shape`` broadcast to ``wanted``, and leave it as it is?"""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(n in (1, w) for n, w in pairs)


class WithBaseline(Estimator):
    """An estimator that subtracts a baseline from its learning signal, in its attribute ``baseline``."""

    baseline: Baseline | None

    #: what it wants known beside what the baseline does
    own_measures: ClassVar[frozenset[Measure]] = frozenset()

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return self.baseline is not None and self.baseline.from_particles

    @property
    def measures(self) -> frozenset[Measure]:  # type: ignore[override]
        return self.own_measures | (frozenset() if self.baseline is None else self.baseline.measures)

    def __post_init__(self) -> None:
        if self.baseline is not None and not isinstance(self.baseline, Baseline):
            raise TypeError(
                f"{type(self).__name__}(baseline=...) takes a baseline such as LeaveOneOut() or MovingAverage(), "
                f"got {self.baseline!r}."
            )

    def check(self, site: Site, particles: int) -> None:
        if self.baseline is not None:
            self.baseline.check(site, particles)
        super().check(site, particles)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return self.baseline.given(args, kwargs) if self.baseline else {}

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return self.baseline.keeps(site, given) if self.baseline else Keeps()

    def subtract(
        self, ops: Ops, site: Site, signal: Array, kept: Kept
    ) -> tuple[Array, Array | None, Mapping[str, Array]]:
        """``signal [K, *plates]`` less the baseline, as a constant; its auxiliary objective; its new state."""
        if self.baseline is None:
            return ops.stop_gradient(signal), None, {}
        b = self.baseline.evaluate(ops, site, signal, kept)
        return ops.stop_gradient(signal - b.value), b.auxiliary, b.state


_LEVEL = "level_"


class WithLevel(WithBaseline):
    """An estimator with a control variate of its own, whose baseline takes the level that this leaves over."""

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        return prefixed(_LEVEL, super().given(args, kwargs))

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        return super().keeps(site, strip(_LEVEL, given)).under(_LEVEL)

    def level(self, ops: Ops, site: Site, rest: Array, kept: Kept) -> Baselined:
        """Of what the control variate leaves over, ``rest [K, *plates]``."""
        if self.baseline is None:
            return Baselined(ops.zeros_like(rest))
        found = self.baseline.evaluate(ops, site, ops.stop_gradient(rest), kept.sub(_LEVEL))
        return Baselined(found.value, found.auxiliary, prefixed(_LEVEL, found.state))
