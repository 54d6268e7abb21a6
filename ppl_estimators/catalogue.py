"""Every public estimator and baseline in one table, with what a user wants to know before choosing.

`ENTRIES` is what `ppl-estimators list`, `docs/estimators.md` and the README's table show. What a class declares or
answers (bias, sites, extra evaluations, what it keeps) is asked of the class; what it is for, what it is not for, and
its papers are read from its docstring. A row holds only the rest.

To add an estimator, add a row here, its paper to `references.bib` and its derivation to `docs/derivations.md`, and
run `python docs/make_estimators.py`. Importing this module imports neither torch nor jax.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import ppl_estimators as our
from ppl_estimators.citations import papers_of
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.core.families import (
    CATEGORICAL,
    CONTINUOUS,
    COUNTS,
    DIRICHLET,
    DISCRETE,
    LOCATION_SCALE,
    NAMES,
    ONEHOT,
)
from ppl_estimators.core.keep import Keeps
from ppl_estimators.core.site import Site
from ppl_estimators.core.spec import Spec
from ppl_estimators.estimators.baselines.base import Baseline

FAMILIES = (*DISCRETE, *COUNTS, *CONTINUOUS)


class Kind(StrEnum):
    """The groups of the table, in its order."""

    score = "score function"
    discrete = "Bernoulli and categorical sites"
    bernoulli = "Bernoulli sites"
    categorical = "categorical sites"
    counts = "counts, and differences of laws"
    continuous = "continuous sites"
    biased = "biased"
    composition = "compositions"

    @property
    def page(self) -> str:
        """Of the documentation, below `docs`."""
        return f"estimators/{re.sub(r'[^a-z]+', '-', self.value.lower())}.md"


@dataclass(frozen=True)
class Entry:
    """One row. ``evaluations`` is a formula: of D, the dependent elements of a site, C, its categories, A (see
    `LEGEND`), and the spec's own arguments; a test evaluates it and compares with what the class asks for.

    ``beside`` is what runs more often than the formula says. ``sites``, ``model`` and ``keeps`` are derived where they
    are None.
    """

    spec: Spec  # an estimator, or a baseline for `Reinforce`
    kind: Kind
    evaluations: str
    _: KW_ONLY
    beside: str = ""
    sites: str | None = None
    model: str | None = None
    keeps: str | None = None
    aliases: tuple[str, ...] = ()
    common: bool = False  # in the README's short table

    @cached_property
    def example(self) -> Estimator:
        return self.spec if isinstance(self.spec, Estimator) else our.Reinforce(self.spec)  # type: ignore[arg-type]

    @property
    def call(self) -> str:
        """What to write."""
        return repr(self.example)

    @property
    def subject(self) -> Spec:
        """What the row is about: of a sum of baselines the last one."""
        return self.spec.parts[-1] if isinstance(self.spec, Baseline) else self.spec

    @property
    def name(self) -> str:
        return type(self.subject).__name__

    @property
    def docstring(self) -> str:
        return inspect.getdoc(type(self.subject)) or ""

    @property
    def use(self) -> str:
        """What it is for, in a few words; empty where it is not recommended."""
        return said(self.docstring, "For")

    @property
    def avoid(self) -> str:
        """When not to use it, and what instead."""
        return said(self.docstring, "Not for") or said(self.docstring, "Not advised")

    @property
    def papers(self) -> tuple[str, ...]:
        """BibTeX keys."""
        return papers_of(type(self.subject))

    @property
    def unbiased(self) -> bool:
        return self.example.unbiased

    @cached_property
    def families(self) -> tuple[str, ...]:
        """The families whose sites it accepts: those at which its `check` raises nothing."""
        return tuple(family for family in FAMILIES if _accepts(self.example, family))

    @property
    def particles(self) -> int:
        """The fewest particles it works with."""
        return next(k for k in range(1, 10) if _accepts(self.example, self.families[0], k))

    @property
    def differentiated(self) -> int:
        """How many of its evaluations are differentiated, beside the gradient of the model's own parameters."""
        return self.example.relaxations(site_of(self.families[0])).count

    @property
    def shown_sites(self) -> str:
        if self.sites is not None:
            return self.sites
        whole = {
            FAMILIES: "any",
            (*DISCRETE, *COUNTS): "discrete",
            tuple(CONTINUOUS): "reparameterisable",
            LOCATION_SCALE: "location and scale",
        }
        one_hot = {ONEHOT: "" if CATEGORICAL in self.families else "one-hot"}
        words = [{**NAMES, CATEGORICAL: "categorical", **one_hot}[family] for family in self.families]
        return whole.get(self.families) or ", ".join(filter(None, words))

    @property
    def shown_evaluations(self) -> str:
        slopes = "1 slope" if self.differentiated == 1 else f"{self.differentiated} slopes"
        return ", ".join(filter(None, [self.evaluations, slopes if self.differentiated else "", self.beside]))

    @property
    def shown_model(self) -> str:
        """What it asks of the model."""
        if self.model is not None:
            return self.model
        if self.differentiated:
            where = {"relaxed": "at relaxed values", "mean": "at the means", "drawn": "in z", "redrawn": "in z"}
            return f"gradient {where[self.example.relaxations(site_of(self.families[0])).downstream]}"
        return "gradient in z" if self.example.value.moves else "nothing"

    @property
    def kept(self) -> Keeps:
        """What it keeps at a site of its first family."""
        return self.example.keeps(site_of(self.families[0]), {})

    @property
    def shown_keeps(self) -> str:
        """What the guide hook declares for it."""
        if self.keeps is not None:
            return self.keeps
        words = [name.removeprefix("log_") for name in self.kept.parameters]
        networks = len(self.kept.networks)
        words += [] if not networks else ["a network"] if networks == 1 else [f"{networks} networks"]
        return ", ".join([*words, *(["averages"] if self.kept.state else [])]) or "–"

    @property
    def shown_use(self) -> str:
        return self.use or f"not recommended: {self.avoid}"

    def facts(self) -> dict[str, Any]:
        """The row as plain values."""
        return {
            "estimator": self.call,
            "name": self.name,
            "kind": self.kind.value,
            "unbiased": self.unbiased,
            "sites": self.shown_sites,
            "families": list(self.families),
            "evaluations": self.shown_evaluations,
            "needs_of_the_model": self.shown_model,
            "keeps": self.shown_keeps,
            "fewest_particles": self.particles,
            "recommended": bool(self.use),
            "use": self.use,
            "avoid": self.avoid,
            "papers": list(self.papers),
        }


def said(docstring: str, label: str) -> str:
    """What follows ``label`` on a line of the head of a docstring."""
    found = re.search(rf"^{label} {{2,}}(\S.*)$", docstring, re.MULTILINE)
    return found[1] if found else ""


# ---- asking a class --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """An array of which only the shape is looked at."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def site_of(family: str, elements: int = 1, categories: int = 3) -> Site:
    """A site with no arrays in it, to ask an estimator what it would do there."""
    event = {1: ()}.get(elements, (elements,))
    axis = (categories,) if family in (CATEGORICAL, ONEHOT) else ()
    names = ("logits",) if family in DISCRETE else {**COUNTS, **CONTINUOUS}[family]
    arrays = {name: _Shape((*event, *axis)) for name in names}
    continuous = family in CONTINUOUS
    law = SimpleNamespace(discrete=not continuous, event_shape=(3,) * (family == DIRICHLET), slope=lambda value: value)
    return Site(
        "z",
        NAMES[family],
        family,
        batch_shape=(),
        event_shape=(*event, *(axis if family == ONEHOT else ())),
        plates=frozenset(),
        reparameterised=continuous,
        logits=arrays.get("logits"),
        named=arrays,
        law=law,
    )


def _accepts(estimator: Estimator, family: str, particles: int = 100) -> bool:
    try:
        estimator.check(site_of(family), particles)
    except our.EstimatorError:
        return False
    return True


# ---- the rows --------------------------------------------------------------------------------------------------------


def h(value: Any) -> Any:
    """Stands for the user's function in ``ControlVariate(h, mean)``."""
    raise NotImplementedError


def mean(distribution: Any) -> Any:
    """Stands for the mean of `h`."""
    raise NotImplementedError


def prediction(*args: Any) -> Any:
    """Stands for the user's function in ``Given(prediction)``."""
    raise NotImplementedError


ENTRIES = (
    Entry(our.LeaveOneOut(), Kind.score, "1", aliases=("VarGrad",), common=True),
    Entry(our.MovingAverage(), Kind.score, "1", common=True),
    Entry(our.MovingAverage() + our.Learned(), Kind.score, "1", common=True),
    Entry(our.OptimalConstant(), Kind.score, "1"),
    Entry(our.VIMCO(), Kind.score, "1"),
    Entry(our.Given(prediction), Kind.score, "1", keeps="what the guide declares"),
    Entry(our.Constant(-12.5), Kind.score, "1"),
    Entry(our.ControlVariate(h, mean), Kind.score, "1", model="a function of known mean"),
    Entry(our.ImportanceSampled(our.Reinforce(our.MovingAverage())), Kind.score, "2"),
    Entry(our.NVIL(), Kind.score, "1"),
    Entry(our.Reinforce(), Kind.score, "1"),
    Entry(our.Enumerate(), Kind.discrete, "1 + D·(C − 1)", common=True),
    Entry(our.RELAX(), Kind.discrete, "1"),
    Entry(our.RELAXWithModel(), Kind.discrete, "3"),
    Entry(our.REBAR(), Kind.discrete, "3"),
    Entry(our.DoubleControlVariate(), Kind.discrete, "2"),
    Entry(our.MuProp(), Kind.discrete, "2"),
    Entry(our.DisARM(), Kind.bernoulli, "2", common=True),
    Entry(our.ARMS(4), Kind.bernoulli, "n"),
    Entry(our.UGC(), Kind.bernoulli, "3"),
    Entry(our.BitFlip(2), Kind.bernoulli, "1 + m"),
    Entry(our.Stein(), Kind.bernoulli, "2"),
    Entry(our.ARM(), Kind.bernoulli, "2"),
    Entry(our.UnorderedSet(3), Kind.categorical, "1 + D·(k − 1)", common=True),
    Entry(our.SumAndSample(2), Kind.categorical, "1 + D·k"),
    Entry(our.DisARMStickBreaking(), Kind.categorical, "2"),
    Entry(our.DisARMTree(), Kind.categorical, "2"),
    Entry(our.CoupledImportance(), Kind.categorical, "2"),
    Entry(our.ARSM(), Kind.categorical, "1 + C·(C − 1)/2"),
    Entry(our.StochasticTriple(), Kind.counts, "2", common=True),
    Entry(our.SumAroundMode(8), Kind.counts, "1 + D·k"),
    Entry(our.MeasureValued(), Kind.counts, "1 + A·D"),
    Entry(our.Pathwise(), Kind.continuous, "1", common=True),
    Entry(our.StickingTheLanding(), Kind.continuous, "1", beside="guide twice", common=True),
    Entry(our.DoublyReparameterized(), Kind.continuous, "1", beside="guide twice, under a bound the model too"),
    Entry(our.ImplicitPathwise(), Kind.continuous, "1", sites="with a cdf"),
    Entry(our.LAX(), Kind.continuous, "1"),
    Entry(our.EvolutionStrategy(), Kind.continuous, "2"),
    Entry(our.DeltaMethod(), Kind.continuous, "3"),
    Entry(our.RejectionPathwise(), Kind.continuous, "1"),
    Entry(our.GeneralizedPathwise(), Kind.continuous, "1"),
    Entry(our.ReinMax(), Kind.biased, "1", common=True),
    Entry(our.RaoGumbel(), Kind.biased, "1"),
    Entry(our.GumbelSoftmax(), Kind.biased, "1", model="gradient at relaxed values"),
    Entry(our.GappedStraightThrough(), Kind.biased, "1"),
    Entry(our.GumbelStraightThrough(), Kind.biased, "1"),
    Entry(our.StraightThrough(), Kind.biased, "1"),
    Entry(our.SmoothedTriple(), Kind.biased, "1"),
    Entry(
        our.Repeat(2, our.DisARM()),
        Kind.composition,
        "n times its part's",
        sites="its part's",
        model="what its part needs",
        keeps="what its part keeps",
    ),
    Entry(
        our.Antithetic(our.Reinforce(our.MovingAverage())),
        Kind.composition,
        "twice its part's",
        model="what its part needs",
        keeps="what its part keeps",
    ),
    Entry(
        our.Average((our.DisARM(), our.Reinforce())),
        Kind.composition,
        "those of its parts",
        sites="its parts'",
        model="what its parts need",
        keeps="what its parts keep",
    ),
    Entry(
        our.Combine((our.DisARM(), our.RELAX())),
        Kind.composition,
        "those of its parts",
        sites="Bernoulli, categorical",
        model="what its parts need",
        keeps="averages, what its parts keep",
    ),
)

LEGEND = (
    "Evaluations are runs of model and guide per step and particle; a slope is one that is differentiated in z. D is "
    "the number of dependent elements of a site, C of categories, A of other values for each element (1; of categories "
    "C − 1, of a Normal 3); other letters are the estimator's own arguments. Categorical sites are integers or "
    "one-hot, location and scale families Normal, Laplace, Logistic, Gumbel and Cauchy."
)


# ---- showing it ------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Entry], str]] = {
    "estimator": lambda entry: f"`{entry.call}`",
    "sites": lambda entry: entry.shown_sites,
    "unbiased": lambda entry: "yes" if entry.unbiased else "no",
    "evaluations": lambda entry: entry.shown_evaluations,
    "needs of the model": lambda entry: entry.shown_model,
    "keeps": lambda entry: entry.shown_keeps,
    "use it": lambda entry: entry.shown_use,
}


def by_kind(entries: Iterable[Entry]) -> dict[Kind, list[Entry]]:
    """The rows under their kinds, in the order of `Kind`; kinds without rows are left out."""
    rows = list(entries)
    found = {kind: [entry for entry in rows if entry.kind is kind] for kind in Kind}
    return {kind: group for kind, group in found.items() if group}


def markdown(entries: Iterable[Entry], columns: dict[str, Callable[[Entry], str]] = COLUMNS) -> str:
    """The table in Markdown, a line in bold before each kind."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind, group in by_kind(entries).items():
        lines.append(f"| **{kind.value}** " + "| " * (len(columns) - 1) + "|")
        lines += [f"| {' | '.join(column(entry) for column in columns.values())} |" for entry in group]
    return "\n".join(lines)
