"""What the engine asks of a library, and what they hand each other: nothing else of Pyro or NumPyro is known to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from . import averaging
from .averaging import Average
from .estimator import Estimator, Noise
from .keep import Keeps, Kept
from .objectives import Weighted
from .ops import Array, Ops
from .plan import Group, Plan, Settings
from .posterior import Tables, Uniform
from .site import Draw, Site, Term

#: a library's own record of a site: "name", "fn" (its distribution), "value", "infer"
Message = Any
#: the value of a latent site, from its message
DrawValue = Callable[[Message], Array]
#: values of some sites, by name
Values = Mapping[str, Array]


class Traces(Protocol):
    """The messages of one run of guide and model, by site name in order of appearance."""

    @property
    def guide(self) -> Mapping[str, Message]: ...

    @property
    def model(self) -> Mapping[str, Message]: ...

    @property
    def asked(self) -> Mapping[str, Mapping[str, Any]]:
        """What latent sites of the model ask for in their infer, see `plan.words`."""

    def latents(self) -> Mapping[str, Message]: ...


class Library(Protocol):
    """What a library does for one evaluation of the loss: model, guide and their arguments are its own affair. What
    returns something here does where no program is compiled, and none has scans."""

    ops: Ops
    settings: Settings
    #: how data are passed in, and how estimators that keep something are chosen, as a user writes it
    passing: str
    choosing: str

    @property
    def compiled(self) -> CompiledLibrary | None:
        """Itself where a step is compiled, so that every copy of the program in it has a price."""

    def plan(self, traces: Any = None) -> Plan:
        """The plan of the structure that a run had; without one, of that which is expected."""

    # ---- one run ------------------------------------------------------------------------------------------------

    def run(
        self, draw: DrawValue, source: Any, *, first: bool = False, constants: bool = False, wide: Any = None,
        above: Any = None,
    ) -> Traces:  # fmt: skip
        """Run guide and model. ``source`` is the randomness of a particle: every run with it draws the same numbers
        wherever ``draw`` does not decide otherwise; its ``first`` run is the particle itself. ``constants``: nothing
        leads back to the program's parameters. ``wide``: an axis of alternatives to run along, see `each`. ``above``:
        a run whose guide does the same, but for the values that ``draw`` gives."""

    def guide_again(self, traces: Any, source: Any) -> Traces:
        """The guide on the values of a run, its parameters constants."""

    def dream(self, source: Any) -> Traces:
        """The program turned round: the model draws all its sites, observed ones too, and the guide is run on that. In
        the traces the model is the guide, and the guide the model."""

    def given(self, msg: Message, asked: Estimator) -> Values:
        """The arrays that the spec of a site brings along, as this run of the guide made it."""

    def terms(
        self, traces: Any, plan: Plan, relaxed: frozenset[str], *, only: frozenset[str] | None = None,
        first: bool = False,
    ) -> list[Term]:  # fmt: skip
        """The cost terms, scaled and masked; ``relaxed`` names the sites whose values are relaxed or carry a gradient
        that a discrete log probability would drop, ``only`` restricts to terms that depend on one of these sites."""

    def tables(self, traces: Any) -> Tables:
        """What the posterior of enumerated values is made of."""

    def uniform(self, source: Any) -> Uniform:
        """Noise of a particle beside that of its runs."""

    def moved(self, run: Run, sites: Sequence[str], pattern: Any) -> Mapping[tuple[str, str], Array]:
        """The cost terms of a further run, by side and site, in which ``sites`` take other values, in the elements of a
        pattern (`verify.Along`, or the number of one, see `verify.elements`); all others keep those of ``run``."""

    def cut(self, run: Run) -> Mapping[str, tuple[str, str]]:
        """Of `Plan.differentiated`, sites with which a term moves that has no derivative in their value, and that
        term; as far as it wasn't said when the program was traced."""

    def leading(self, run: Run) -> list[str]:
        """Of `Plan.differentiated`, sites from whose values a derivative leads to something to learn."""

    def tilted(self, run: Run, sites: Sequence[str], step: float, number: int) -> Mapping[tuple[str, str], Any]:
        """Of every cost term, the `verify.Height` where the values of ``sites`` lie a step along line ``number``; with
        its slope at step 0."""

    def check(self, run: Run) -> None:
        """Whether what is known of the program from a particle's first run is true, where that may be in doubt."""

    # ---- one site -----------------------------------------------------------------------------------------------

    def estimator(self, plan: Plan, msg: Message) -> Estimator:
        """The estimator of a site, also of one that the plan does not know."""

    def requested(self, msg: Message) -> Estimator | None:
        """What the hook or the site itself asks for."""

    def view(self, plan: Plan, msg: Message, wide: Any = None) -> Site:
        """The site's facts, in the plan's plates, and its arrays."""

    def own(self, msg: Message) -> Array:
        """The library's own draw, reparameterised where there is a way."""

    def value(self, source: Any, msg: Message, number: int) -> Array:
        """A plain draw from the site's distribution, the ``number``-th of its noise."""

    def again(self, msg: Message, first: Message, *, constants: bool) -> Array:
        """The value that the site had in the first run."""

    def part(self, msg: Message, x: Array) -> Array:
        """Of an array of a whole site, that of a message: all of it, or of a scan that of the step."""
        return x

    def step(self, msg: Message, noise: Values) -> bool:
        """Is the message that of one step of a scan, or of a branch, of which nothing but the value gets out? Then
        ``noise`` does too, and that of all steps is the "noise" of the site's message."""
        return False

    def sampled(self, msg: Message, value: Array) -> Array:
        """``value`` in the type that the site's own sampler returns."""
        return value

    def noise(self, source: Any, msg: Message, site: Site, label: str, noise: Noise, number: int) -> Array:
        """Noise number ``number`` that the site's estimator asks for."""

    def state(self, site: Site, estimator: Estimator, label: str) -> Array:
        """What the estimator keeps as state under ``label``."""

    def keep(self, site: Site, estimator: Estimator, given: Values, like: Array) -> Kept:
        """Declare what the estimator keeps; its present values."""

    def unlike(self, ours: Message, theirs: Message) -> bool | Array:
        """Is a site scaled or masked in the guide otherwise than in the model? An array where values are not known, or
        not to be waited for."""

    def divergence(self, ours: Message, theirs: Message) -> Array:
        """KL(q ‖ p) of a site of the guide from that of the model, scaled and masked; `NotImplementedError` where no
        closed form is known."""

    def past(self, declared: Keeps) -> Values:
        """The present state of the objective."""

    def log_q(self, msg: Message, value: Array) -> Array: ...

    def score_norm(self, site: Site, msg: Message, value: Array) -> Array: ...

    def arrays(self, site: Site) -> dict[str, Any]:
        """What differs between particles."""

    def zero(self, site: Site | None = None) -> Array:
        """A cost of zero, ``[*plates]`` of the site."""

    def differentiating(self, yes: bool) -> AbstractContextManager[Any]:
        """Whether what is computed inside needs derivatives."""

    # ---- many evaluations ---------------------------------------------------------------------------------------

    def each(
        self, evaluate: Callable[..., Any], values: Callable[[Any], Values], group: Group, run: Run,
        differentiable: bool,
    ) -> tuple[dict[str, Array], dict[averaging.Key, Array]]:  # fmt: skip
        """``evaluate(values(i))`` for each alternative of the group, stacked ``[A, ...]``, some side by side."""

    def slopes(
        self, total: Callable[[Values], tuple[Array, Values]], values: Values
    ) -> tuple[Mapping[str, Array], Values]:
        """The derivatives of ``total(values)[0]`` in each value, differentiable again, and ``total(values)[1]``."""

    def particles(self, one: Callable[[Any], tuple[dict[str, Any], Run]], count: int | None = None) -> Joined:
        """``one(source)`` for every particle, of which there are ``count`` or as many as the plan wants."""


class CompiledLibrary(Library, Protocol):
    """What one copy of the program that serves many evaluations asks beside."""

    def either(self, condition: Array, new: Array, old: Array, msg: Message, first: Message) -> Array:
        """``new``, just drawn at the site, where ``condition`` holds, else ``old``, the value of the first run."""

    def mapped(self, one: Callable[[Any], dict[str, Array]], jobs: Any) -> dict[str, Array]:
        """``one`` of every job, stacked, some side by side. ``jobs`` holds lists, an entry for each job."""

    def rows(self, x: Array, rows: Sequence[int]) -> Array: ...


class Joined(NamedTuple):
    """What all particles found. In ``arrays`` the particles come first, or behind the alternatives; ``count`` is how
    many there were."""

    arrays: dict[str, Any]
    sites: Mapping[str, Site]
    estimators: Mapping[str, Estimator]
    kept: Mapping[str, Kept]  # without what the user's specs bring along
    count: int  # type: ignore[assignment]  # instead of a tuple's own


@dataclass
class Run:
    """One particle's run of guide and model, and what is found from it."""

    source: Any
    plan: Plan
    traces: Any = None
    draws: dict[str, Draw] = field(default_factory=dict)
    noise: dict[str, dict[str, Array]] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)  # those with a surrogate of their own
    terms: list[Term] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    averages: list[Average] = field(default_factory=list)
    weighted: list[Weighted] = field(default_factory=list)
    past: Values = field(default_factory=dict)  # what the objective keeps
