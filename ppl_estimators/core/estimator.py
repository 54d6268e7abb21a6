"""The contract of an estimator: noise in, value out; costs in, surrogate out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from .errors import site_error
from .families import CATEGORICAL, NAMES, ONEHOT
from .keep import Initial, Keeps, Kept
from .ops import Array, Ops
from .site import Costs, Draw, Local, Site
from .spec import Spec

#: what an estimator is written in
__all__ = [
    "OWN_VALUE", "Array", "Control", "Costs", "Draw", "Draws", "Estimator", "Initial", "Keeps", "Kept", "Local",
    "Measure", "Moves", "Noise", "Ops", "Relaxations", "Site", "Value",
]  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """What an estimator asks for to draw with. The shape begins with that of the site's batch.

    ``law`` is "uniform" on (0, 1), "normal", "log gamma" (the logarithm of a gamma of ``concentration`` and unit
    rate), "poisson" (of rate ``concentration``), "value" (a draw from the site's own distribution; the shape is then
    the site's), or "state" (no noise, but the present value of what the estimator keeps under this label).
    """

    law: str
    shape: tuple[int, ...] = ()
    concentration: Any = None


class Value(Enum):
    """How a value is made, and with it what -log q is differentiated in."""

    #: a plain draw, which carries no gradient: -log q is held fixed (its own gradient has mean zero)
    PLAIN = "plain"
    #: the library's own reparameterised draw: -log q in full
    LIBRARY = "library"
    #: a differentiable draw of the estimator's own: -log q in full
    OWN = "own"
    #: the same, but the value carries only a part of the gradient, and `Estimator.local` has the rest
    PARTIAL = "partial"
    #: a discrete draw with a made-up derivative: -log q through the value only
    HARD = "hard"

    @property
    def moves(self) -> bool:
        """Does the value carry a gradient?"""
        return self is not Value.PLAIN

    @property
    def whole(self) -> bool:
        """Does it carry all of the gradient?"""
        return self not in (Value.PLAIN, Value.PARTIAL)

    @property
    def library(self) -> bool:
        """Is it the library's own draw?"""
        return self is Value.LIBRARY


@dataclass(frozen=True)
class Draws:
    """``count`` values that have the site's own law given its parents, each by itself, as the drawn one has. So they
    may be taken together with those of sites that don't depend on this one, and all of them weigh alike."""

    count: int = 0

    own_law: ClassVar[bool] = True
    weights: ClassVar[None] = None


@dataclass(frozen=True)
class Moves:
    """``count`` values of another law: single elements that move while the others stand still. The site takes them
    alone, and plates that a cost couples count as dimensions of dependent elements ("lanes"): elements move side by
    side only where no cost sees two of them.

    ``weights(ops, site, draw)``, of the drawn value and of these, ``[1 + A, *plates]``: Σ_a w_a f(value_a) is an
    unbiased estimate of E[f] for any f. None where there are no such weights."""

    count: int
    weights: Callable[[Ops, Site, Draw], Array] | None = None

    own_law: ClassVar[bool] = False


@dataclass(frozen=True)
class Relaxations:
    """``count`` relaxed values. ``downstream`` is what discrete sites downstream do meanwhile: "relaxed" too, at the
    temperature that the estimator keeps (so that the cost is smooth); "mean", at their probabilities; "redrawn", from
    the same noise; "drawn", as in the run (the relaxed value then is the drawn one)."""

    count: int = 0
    downstream: str = "relaxed"


class Measure(Enum):
    """What an estimator wants known under a site's law."""

    LOG_Q = "log q"  # `Site.log_q`, and of the other values that `Estimator.scored` names
    SCORE_NORM = "norm of the score"  # `Site.score_norm`
    FUNCTIONS = "functions"  # `Estimator.measured`


class Control(Enum):
    """What holds the variance of a score function down."""

    NOTHING = "nothing"
    #: the mean of the other particles' costs and nothing else: for an objective of several particles, the objective of
    #: the others
    OTHERS = "others"
    #: the same, but for such an objective it is that of all, with the geometric mean of the others in its own place
    GEOMETRIC = "geometric"
    #: anything else
    OWN = "own"

    @property
    def of_others(self) -> bool:
        """Is it a mean of other particles and nothing else?"""
        return self in (Control.OTHERS, Control.GEOMETRIC)


OWN_VALUE: Mapping[str, Noise] = {"value": Noise("value")}


class Estimator(Spec):
    """An unbiased (or openly biased) estimator of one site's local gradient.

    A subclass states facts as class attributes, and overrides the methods it needs; the order of parts in a file is
    the order below. Arrays are as documented in `Site`, `Draw` and `Costs`.
    """

    #: is the expectation the exact gradient?
    unbiased: ClassVar[bool] = True
    #: families it supports; None for every distribution
    families: ClassVar[tuple[str, ...] | None] = None
    #: how the value is made
    value: ClassVar[Value] = Value.PLAIN
    #: is -log q differentiated through the value only, every parameter of the guide held fixed? A bound of several
    #: particles puts what this leaves out into the weights of the value's path
    sticks: ClassVar[bool] = False
    #: what it wants known of the drawn value under the site's own law
    measures: ClassVar[frozenset[Measure]] = frozenset()
    #: does it compare draws with one another, of which there must be two then, and independent?
    compares: ClassVar[bool] = False
    #: what is subtracted from the cost
    control: ClassVar[Control] = Control.OWN
    #: named for a site that only the model has: does that ask for the sum over its values?
    sums: ClassVar[bool] = False
    #: what to use instead, for the error that `check` raises: see `advice`
    instead: ClassVar[str] = "Use Pathwise() if the distribution is reparameterisable, or Reinforce(LeaveOneOut())"

    # ---- facts that depend on the site --------------------------------------------------------------------------

    def check(self, site: Site, particles: int) -> None:
        """Raise `EstimatorError` where the estimator cannot work."""
        name = type(self).__name__
        if self.families is not None and site.family not in self.families:
            wanted = " or ".join(NAMES[f] for f in self.families)
            raise site_error(
                site.name, f"{name} needs a {wanted} site, got {site.distribution}", self.advice(site, particles)
            )
        if self.compares and particles < 2:
            raise site_error(
                site.name,
                f"{name} compares particles and needs at least 2, got num_particles={particles}",
                "Pass EstimatorELBO(..., num_particles=2) or more.",
            )
        if site.time and self.relaxations(site).count:
            raise site_error(
                site.name,
                f"{name} differentiates the cost in all values of a site at once, but the steps of a scan, each with "
                "a cost of its own, may be each other's parents",
                "Use RELAX() or DisARM() here, or Reinforce(LeaveOneOut()) with several particles.",
            )

    def advice(self, site: Site, particles: int) -> str:
        """The fix for a site that the estimator does not suit, such that it works when typed."""
        several = "" if particles > 1 else " with num_particles=2 or more"
        one_hot = site.family == CATEGORICAL and ONEHOT in (self.families or ())
        where = " In NumPyro OneHotCategorical is that of ppl_estimators.numpyro." if one_hot else ""
        return f"{self.instead}{several}.{where}"

    def alternatives(self, site: Site) -> Draws | Moves:
        """Counterfactual values per step at which the cost is evaluated (beside the drawn one)."""
        return Draws()

    def relaxations(self, site: Site) -> Relaxations:
        """Relaxed values per step at which the cost is evaluated and differentiated."""
        return Relaxations()

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays that the spec itself brings along (inputs of a baseline), given the guide's arguments."""
        return {}

    def keeps(self, site: Site, given: Mapping[str, Array]) -> Keeps:
        """What it keeps between the steps."""
        return Keeps()

    # ---- noise in, value out ------------------------------------------------------------------------------------

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return OWN_VALUE

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        """Differentiable in the site's parameters unless ``value`` is plain; not used for the library's own draw."""
        return Draw(noise["value"])

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        """The counterfactual value number ``index`` (an integer array of shape ``()``)."""
        raise NotImplementedError

    def relaxed(self, ops: Ops, site: Site, draw: Draw, index: int, kept: Kept) -> Array:
        """The relaxed value number ``index``, differentiable in ``kept``."""
        raise NotImplementedError

    def measured(self, value: Array, distribution: Any) -> Mapping[str, Array]:
        """Functions of the drawn value and the library's own distribution object, for ``Draw.extra``."""
        return {}

    def scored(self, draw: Draw) -> Mapping[str, Array]:
        """Values other than the drawn one whose log q it wants (``[*batch]``, in ``Draw.extra`` under these labels)."""
        return {}

    def downstream_temperature(self, ops: Ops, site: Site, index: int, kept: Kept) -> Array | None:
        """Of the discrete sites downstream, while relaxed value number ``index`` is evaluated; None for their means."""
        return None

    # ---- costs in, surrogate out --------------------------------------------------------------------------------

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        """A value that carries the whole gradient needs none."""
        raise NotImplementedError

    # ---- derived ------------------------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        """Is `local` asked? Where the value carries the whole gradient there may be none."""
        return type(self).local is not Estimator.local
