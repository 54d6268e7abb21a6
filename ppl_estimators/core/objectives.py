"""What is maximised: what an objective says to the engine, and those that are a sum of cost terms.

The cost of site i at a value v is what the objective makes of the cost terms there: for a sum, the downstream cost
R_i(v); for a function of the particles' log weights see `core.bounds`. So any estimator serves any objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, ClassVar, NamedTuple, Protocol

from .errors import EstimatorError
from .estimator import Estimator
from .keep import Initial, Keeps, Kept
from .ops import Array, Ops
from .site import Costs, Draw, Local, Plate, Site, Term
from .spec import Spec

#: what state of the objective is kept under, as that of a site is under its name
NAME = "$objective"

#: the downstream costs of some sites, from cost terms
Credited = Callable[[Sequence[Term]], Mapping[str, Array]]


class Elsewhere(Protocol):
    """What one particle says of sites at other values: from the ``terms`` that these move, ``[*plates]`` for each.
    ``beside``: plates of alternatives side by side."""

    def __call__(
        self, terms: Sequence[Term], sites: Sequence[Site], credited: Credited, beside: frozenset[Plate] = ...
    ) -> dict[str, Array]: ...


class Weighted(NamedTuple):
    """What the particles say of one group of sites at the drawn value and others, ``[1 + A, K, *plates]``, and the
    weights with which a sum over these values is an unbiased estimate of the mean."""

    weights: Array
    values: Array


class Locally(Protocol):
    """The local surrogate of one site in all particles."""

    def __call__(self, estimator: Estimator, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local: ...


class Objective(Spec):
    """``collect``, ``drawn`` and ``elsewhere`` run once per particle, ``combine`` once over all of them (axis 0)."""

    #: does -log q keep its own gradient, as no cost of mean zero?
    keeps_score: ClassVar[bool] = False
    #: do values carry a gradient, and costs count?
    moves: ClassVar[bool] = True
    #: does log p of a latent site count otherwise than that of what is observed?
    weighs_apart: ClassVar[bool] = False

    def check(self, site: Site, estimator: Estimator, particles: int) -> None:
        """Raise `EstimatorError` where objective and estimator do not go together."""

    def keeps(self) -> Keeps:
        """State between the steps, if any."""
        return Keeps()

    def analytic(self, site: str) -> bool:
        """Is KL(q ‖ p) of this site wanted in closed form, in place of log p − log q?"""
        return False

    def names(self) -> Sequence[str]:
        """Sites that it was told of, by name or pattern."""
        return ()

    def joint(self, particles: int) -> int:
        """How many of so many particles it is a function of at once: each by itself, if it is their mean."""
        return particles

    def dreams(self) -> float:
        """The weight of log q at the model's own draws, if the guide learns from them."""
        return 0.0

    def after(self, past: Mapping[str, Array]) -> dict[str, Array]:
        """What it keeps after a step."""
        return dict(past)

    def weighed(
        self, ops: Ops, terms: Sequence[Term], latent: Container[str], past: Mapping[str, Array]
    ) -> Sequence[Term]:
        """The cost terms as they count; ``latent`` holds the latent sites of the guide."""
        return terms

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        raise NotImplementedError

    def scale(self, terms: Sequence[Term]) -> float:
        """What multiplies the objective: the N/B of subsampled plates, where it cannot stay inside the terms."""
        return 1.0

    def drawn(self, ops: Ops, terms: Sequence[Term], sites: Sequence[Site], credited: Credited) -> Mapping[str, Array]:
        """What one particle says of the sites at the drawn values, ``[*plates]`` for each."""
        raise NotImplementedError

    def elsewhere(
        self, ops: Ops, terms: Sequence[Term], moved: Sequence[Site], alone: frozenset[str], credited: Credited
    ) -> Elsewhere:
        """The same where the sites ``moved`` take other values; ``alone`` names those of which each plate element does
        so by itself. ``terms`` are those at the drawn values, constants unless derivatives are wanted."""
        raise NotImplementedError

    def combine(
        self, ops: Ops, collected: Array, scale: float, held: Array | None = None, averages: Sequence[Weighted] = ()
    ) -> tuple[Array, Locally]:
        """The objective (a scalar whose gradient is the explicit part), and what makes costs and a surrogate of what
        the particles say of a site. If the objective ``keeps_score``, ``held`` is the same with the values held fixed
        of sites that leave out the score part of -log q, if there are any, and ``averages`` are what the particles say
        of values over which the explicit part is averaged."""
        raise NotImplementedError


class Additive(Objective):
    """The sum of the cost terms, averaged over particles."""

    def joint(self, particles: int) -> int:
        return 1

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        return total(ops, terms)

    def drawn(self, ops: Ops, terms: Sequence[Term], sites: Sequence[Site], credited: Credited) -> Mapping[str, Array]:
        return credited(terms)

    def elsewhere(
        self, ops: Ops, terms: Sequence[Term], moved: Sequence[Site], alone: frozenset[str], credited: Credited
    ) -> Elsewhere:
        return lambda terms, sites, credited, beside=frozenset(): dict(credited(terms))

    def combine(
        self, ops: Ops, collected: Array, scale: float, held: Array | None = None, averages: Sequence[Weighted] = ()
    ) -> tuple[Array, Locally]:
        return ops.mean(collected), lambda estimator, *found: estimator.local(ops, *found)


@dataclass(frozen=True, eq=False, repr=False)
class EvidenceLowerBound(Additive):
    """E_q[log p(x, z) − log q(z)], averaged over particles. The default.

    >>> EvidenceLowerBound()
    EvidenceLowerBound()
    """


@dataclass(frozen=True, eq=False, repr=False)
class Dreamt(Additive):
    """``weight`` E_p[log q(z | x)], of a program that is turned round: the model draws, the guide is held against it.

    The gradient at held values; of log p nothing counts.
    """

    weight: float

    moves: ClassVar[bool] = False

    def collect(self, ops: Ops, terms: Sequence[Term]) -> Array:
        likely = total(ops, [t for t in terms if t.side == "model"])
        return self.weight * ops.where(ops.isfinite(likely), likely, ops.zeros_like(likely))


def check_dreams(guide: Callable[..., Any]) -> None:
    """Can the guide be told what the model dreams?"""
    written = getattr(guide, "guide", guide)  # without the hook
    taken = signature(getattr(written, "forward", written)).parameters  # a module's
    if "observations" not in taken and all(p.kind is not p.VAR_KEYWORD for p in taken.values()):
        raise EstimatorError(
            "WakeSleep(sleep_phi=...) calls the guide with observations={site: value}, the data that the model dreams, "
            "and the guide takes no such argument. Give it one, observations=None, and read the data there when it is "
            "given; or leave out sleep_phi."
        )


def turned(
    model: Callable[..., Any], guide: Callable[..., Any], dreaming: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A program whose guide is the model, all its sites drawn, and whose model is the guide, which is called with
    ``observations`` besides; ``dreaming`` a model notes these."""
    observations: dict[str, Array] = {}

    def told(*args: Any, **kwargs: Any) -> Any:
        return guide(*args, **{**kwargs, "observations": observations})

    return told, dreaming(model, observations)


@dataclass(frozen=True, eq=False, repr=False)
class KLAnnealed(Additive):
    """The ELBO with a weight on its KL part: E_q[log p(x | z) + β (log p(z) − log q(z))].

    ``weight`` is β, a number or a function of the number of steps taken (0 at the first). It multiplies log p and −log
    q of every latent site of the guide; observed sites and factors count in full. At β < 1 the loss is no bound.

    The number of steps is state. In Pyro it is kept in the parameter store, as ``"$objective$state.steps"``. In NumPyro
    the guide has to declare it, so that `SVI` carries it along: ``with_estimators(guide, objective=objective)``.
    Evaluating the loss alone counts no step.

    >>> KLAnnealed(0.5)
    KLAnnealed(0.5)

    Reference: Bowman et al. (2016), "Generating Sentences from a Continuous Space", arXiv:1511.06349; Higgins et al.
    (2017), "beta-VAE" [higgins2017beta].
    """

    weight: float | Callable[[Array], Array]

    weighs_apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.weight) and not 0 <= self.weight < math.inf:
            raise ValueError(f"KLAnnealed(weight) needs a number of 0 or more, or a function, got {self.weight!r}.")

    def keeps(self) -> Keeps:
        return Keeps(state={"steps": Initial()} if callable(self.weight) else {})

    def after(self, past: Mapping[str, Array]) -> dict[str, Array]:
        return {k: n + 1 for k, n in past.items()}

    def weighed(
        self, ops: Ops, terms: Sequence[Term], latent: Container[str], past: Mapping[str, Array]
    ) -> Sequence[Term]:
        beta = self.weight(past["steps"]) if callable(self.weight) else self.weight

        def is_latent(t: Term) -> bool:
            return t.site in latent or any(p.values and p.name == t.site for p in t.plates)  # drawn, or enumerated

        return [replace(t, value=beta * t.value) if is_latent(t) else t for t in terms]


@dataclass(frozen=True, eq=False, repr=False)
class AnalyticKL(Additive):
    """The ELBO with log p(z) − log q(z) of some sites in closed form: −KL(q(z | parents) ‖ p(z | parents)).

    ``sites``: names or glob patterns; every latent site of the guide without any. A site asks for itself, under the
    ELBO or `KLAnnealed`, with ``infer={"kl": "analytic"}``. The term is a function of the site's parents: its own draw
    has no part in it, nor in the noise. All other costs are drawn as ever, and any estimator may run at the site.

    A site needs a divergence that is registered (`torch.distributions.kl`, `numpyro.distributions.kl`), and a law in
    the model that depends on nothing that the guide draws below it.

    >>> AnalyticKL("w", "z_*")
    AnalyticKL("w", "z_*")

    Reference: Kingma & Welling (2014), "Auto-Encoding Variational Bayes", arXiv:1312.6114.
    """

    sites: tuple[str, ...] = ()

    def __init__(self, *sites: str):
        for s in sites:
            if not isinstance(s, str):
                raise TypeError(f"AnalyticKL(...) takes names or patterns of sites, got {s!r}.")
        object.__setattr__(self, "sites", sites)

    def __repr__(self) -> str:
        return "AnalyticKL(" + ", ".join(f'"{s}"' for s in self.sites) + ")"

    def names(self) -> Sequence[str]:
        return self.sites

    def analytic(self, site: str) -> bool:
        return not self.sites or any(fnmatchcase(site, s) for s in self.sites)


def total(ops: Ops, terms: Sequence[Term]) -> Array:
    """Every term summed over all its elements."""
    return ops.total([t.value for t in terms])
