"""Every public estimator and baseline in one table, with what a user wants to know before choosing.

`ENTRIES` is what `ppl-estimators list`, `docs/estimators.md`, the README's table and `citation` show. Whatever a class
declares or answers (bias, sites, extra evaluations, what it keeps) is asked of the class; a row holds only the rest.

To add an estimator, add a row here, its paper to `references.bib` and its derivation to `docs/derivations.md`, and
run `python docs/make_estimators.py`. Importing this module imports neither torch nor jax.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from ppl_estimators import (
    ARM,
    ARMS,
    ARSM,
    LAX,
    NVIL,
    REBAR,
    RELAX,
    UGC,
    Antithetic,
    Average,
    BitFlip,
    Combine,
    Constant,
    ControlVariate,
    CoupledImportance,
    DeltaMethod,
    DisARM,
    DisARMStickBreaking,
    DisARMTree,
    DoubleControlVariate,
    Enumerate,
    EstimatorError,
    GappedStraightThrough,
    GeneralizedPathwise,
    Given,
    GumbelSoftmax,
    GumbelStraightThrough,
    ImplicitPathwise,
    ImportanceSampled,
    ImportanceWeighted,
    Learned,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    MuProp,
    OptimalConstant,
    Pathwise,
    RaoGumbel,
    Reinforce,
    ReinMax,
    RejectionPathwise,
    RELAXWithModel,
    Renyi,
    Repeat,
    SmoothedTriple,
    Stein,
    StickingTheLanding,
    StochasticTriple,
    StraightThrough,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
)
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


@dataclass(frozen=True)
class Entry:
    """One row. ``evaluations`` is a formula: of D, the dependent elements of a site, C, its categories, A (see
    `LEGEND`), and the spec's own arguments; a test evaluates it and compares with what the class asks for.

    ``beside`` is what runs more often than the formula says. ``sites``, ``model`` and ``keeps`` are derived where they
    are None. ``use`` says in a few words what the row is for, and is empty where it is not recommended; ``avoid`` says
    when not to, and what instead.
    """

    example: Estimator
    kind: Kind
    evaluations: str
    use: str
    avoid: str = ""
    papers: tuple[str, ...] = ()
    beside: str = ""
    sites: str | None = None
    model: str | None = None
    keeps: str | None = None
    aliases: tuple[str, ...] = ()
    common: bool = False  # in the README's short table

    @property
    def call(self) -> str:
        """What to write."""
        return repr(self.example)

    @property
    def subject(self) -> Spec:
        """What the row is about: the last part of a baseline, where the estimator only carries one."""
        if isinstance(self.example, Reinforce) and self.example.baseline is not None:
            return self.example.baseline.parts[-1]
        return self.example

    @property
    def name(self) -> str:
        return type(self.subject).__name__

    @property
    def docstring(self) -> str:
        return inspect.getdoc(type(self.subject)) or ""

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
    except EstimatorError:
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
    Entry(
        Reinforce(LeaveOneOut()),
        Kind.score,
        "1",
        use="several particles; the default there",
        avoid="nearly decided elements, where it can be noisier than no baseline: DisARM() or Enumerate()",
        papers=("kool2019buy", "richter2020vargrad"),
        aliases=("VarGrad",),
        common=True,
    ),
    Entry(
        Reinforce(MovingAverage()),
        Kind.score,
        "1",
        use="one particle, cheap",
        avoid="costs that differ much from datum to datum: add Learned()",
        common=True,
    ),
    Entry(
        Reinforce(MovingAverage() + Learned()),
        Kind.score,
        "1",
        use="one particle, amortised guides",
        avoid="several particles: LeaveOneOut() needs no training",
        papers=("mnih2014neural",),
        common=True,
    ),
    Entry(
        Reinforce(OptimalConstant()),
        Kind.score,
        "1",
        use="eight particles or more",
        avoid="few particles: LeaveOneOut() has less variance",
        papers=("greensmith2004variance", "ranganath2014black"),
    ),
    Entry(
        Reinforce(Given(prediction)),
        Kind.score,
        "1",
        use="a baseline that the guide computes",
        keeps="what the guide declares",
    ),
    Entry(Reinforce(Constant(-12.5)), Kind.score, "1", use="a cost whose level you know"),
    Entry(
        ControlVariate(h, mean),
        Kind.score,
        "1",
        use="when you know a function like the cost, and its mean",
        papers=("paisley2012variational",),
        model="a function of known mean",
    ),
    Entry(
        ImportanceSampled(Reinforce(MovingAverage())),
        Kind.score,
        "2",
        use="single elements, or plates of them, with wide tails",
        avoid="many dependent elements: the weights lose their edge",
        papers=("ruiz2016overdispersed",),
    ),
    Entry(
        NVIL(),
        Kind.score,
        "1",
        use="to repeat the paper: unit-variance learning signals",
        avoid="several sites, or plain SGD: it rescales a site's gradient",
        papers=("mnih2014neural",),
    ),
    Entry(
        Reinforce(),
        Kind.score,
        "1",
        use="",
        avoid="for comparison; any baseline has less variance",
        papers=("williams1992simple", "ranganath2014black"),
    ),
    Entry(
        Enumerate(),
        Kind.discrete,
        "1 + D·(C − 1)",
        use="small supports; exact for a single site",
        avoid="many dependent elements: DisARM() or LeaveOneOut()",
        papers=("titsias2015local",),
        common=True,
    ),
    Entry(
        RELAX(),
        Kind.discrete,
        "1",
        use="a black box that you can afford to run once",
        avoid="two evaluations are affordable: LeaveOneOut() usually wins",
        papers=("grathwohl2018backpropagation",),
    ),
    Entry(
        RELAXWithModel(),
        Kind.discrete,
        "3",
        use="smooth models",
        avoid="costs at relaxed values that say little of those at 0 and 1",
        papers=("grathwohl2018backpropagation",),
    ),
    Entry(
        REBAR(),
        Kind.discrete,
        "3",
        use="smooth models; measure first",
        avoid="costs at relaxed values that say little of those at 0 and 1",
        papers=("tucker2017rebar",),
    ),
    Entry(
        DoubleControlVariate(),
        Kind.discrete,
        "2",
        use="several particles, and slopes that resemble differences",
        avoid="probabilities near ½, where it is LeaveOneOut() at a higher price",
        papers=("titsias2022double",),
    ),
    Entry(
        MuProp(),
        Kind.discrete,
        "2",
        use="",
        avoid="for comparison; superseded by DisARM() and LeaveOneOut()",
        papers=("gu2016muprop",),
    ),
    Entry(
        DisARM(),
        Kind.bernoulli,
        "2",
        use="one particle, many bits; the default there",
        avoid="several particles: LeaveOneOut() is cheaper",
        papers=("dong2020disarm", "yin2020probabilistic"),
        common=True,
    ),
    Entry(
        ARMS(4),
        Kind.bernoulli,
        "n",
        use="n evaluations, broad posteriors",
        avoid="probabilities near 0 or 1: LeaveOneOut() is as good",
        papers=("dimitriev2021arms",),
    ),
    Entry(
        UGC(),
        Kind.bernoulli,
        "3",
        use="some elements nearly decided, others not",
        avoid="broad posteriors: DisARM() needs one evaluation less",
        papers=("kunes2022gradient",),
    ),
    Entry(
        BitFlip(2),
        Kind.bernoulli,
        "1 + m",
        use="late in training, most elements nearly decided",
        avoid="probabilities near ½: DisARM()",
        papers=("kunes2022gradient",),
    ),
    Entry(
        Stein(),
        Kind.bernoulli,
        "2",
        use="two or three particles, a model with a useful slope",
        avoid="slopes at 0 and 1 that say little of the cost",
        papers=("shi2022gradient",),
    ),
    Entry(
        ARM(),
        Kind.bernoulli,
        "2",
        use="",
        avoid="for comparison; DisARM() is never noisier",
        papers=("yin2019arm",),
    ),
    Entry(
        UnorderedSet(3),
        Kind.categorical,
        "1 + D·(k − 1)",
        use="too many categories for Enumerate()",
        avoid="several dependent elements: compare with LeaveOneOut()",
        papers=("kool2020estimating",),
        common=True,
    ),
    Entry(
        SumAndSample(2),
        Kind.categorical,
        "1 + D·k",
        use="a few likely categories, many unlikely ones",
        avoid="categories of like probability: UnorderedSet()",
        papers=("liu2019rao",),
    ),
    Entry(
        DisARMStickBreaking(),
        Kind.categorical,
        "2",
        use="two evaluations, however many elements",
        avoid="a single element: Enumerate() or UnorderedSet()",
        papers=("dong2021coupled",),
    ),
    Entry(
        DisARMTree(),
        Kind.categorical,
        "2",
        use="the same, many categories of like probability",
        papers=("dong2021coupled",),
    ),
    Entry(
        CoupledImportance(),
        Kind.categorical,
        "2",
        use="two evaluations, categories of like probability",
        avoid="one category much likelier than the rest: DisARMTree()",
        papers=("dong2021coupled",),
    ),
    Entry(
        ARSM(),
        Kind.categorical,
        "1 + C·(C − 1)/2",
        use="",
        avoid="for comparison; LeaveOneOut() is less noisy at this price",
        papers=("yin2019arsm",),
    ),
    Entry(
        StochasticTriple(),
        Kind.counts,
        "2",
        use="counts: Poisson, binomial, geometric",
        avoid="few elements and evaluations to spare: SumAroundMode()",
        papers=("arya2022automatic",),
        common=True,
    ),
    Entry(
        SumAroundMode(8),
        Kind.counts,
        "1 + D·k",
        use="a count with few likely values",
        avoid="many elements, a spread-out law: StochasticTriple()",
        papers=("liu2019rao",),
    ),
    Entry(
        MeasureValued(),
        Kind.counts,
        "1 + A·D",
        use="few parameters, a cost without a useful slope",
        avoid="many elements, each of which costs evaluations",
        papers=("heidergott2000measure", "mohamed2020monte"),
    ),
    Entry(
        Pathwise(),
        Kind.continuous,
        "1",
        use="the default for continuous sites",
        avoid="models with jumps in z: Reinforce(LeaveOneOut())",
        papers=("kingma2014autoencoding", "rezende2014stochastic"),
        common=True,
    ),
    Entry(
        StickingTheLanding(),
        Kind.continuous,
        "1",
        use="guides that can reach the posterior",
        avoid="early training, where it can be noisier than Pathwise()",
        papers=("roeder2017sticking",),
        beside="guide twice",
        common=True,
    ),
    Entry(
        ImplicitPathwise(),
        Kind.continuous,
        "1",
        use="mixtures and truncated distributions",
        avoid="sites with a sampler of their own: Pathwise()",
        papers=("figurnov2018implicit",),
        sites="with a cdf",
    ),
    Entry(
        LAX(),
        Kind.continuous,
        "1",
        use="a black box that you can afford to run once",
        avoid="models with a useful slope: Pathwise()",
        papers=("grathwohl2018backpropagation",),
    ),
    Entry(
        DeltaMethod(),
        Kind.continuous,
        "3",
        use="Normal sites with hard decisions downstream",
        avoid="models with a useful slope: Pathwise()",
        papers=("paisley2012variational",),
    ),
    Entry(
        RejectionPathwise(),
        Kind.continuous,
        "1",
        use="",
        avoid="for comparison; Pathwise() is less noisy",
        papers=("naesseth2017reparameterization",),
    ),
    Entry(
        GeneralizedPathwise(),
        Kind.continuous,
        "1",
        use="",
        avoid="for comparison; Pathwise() is less noisy",
        papers=("ruiz2016generalized",),
    ),
    Entry(
        ReinMax(),
        Kind.biased,
        "1",
        use="one evaluation, nothing to tune; biased, the best of those",
        avoid="when the optimum itself matters",
        papers=("liu2023bridging",),
        common=True,
    ),
    Entry(
        RaoGumbel(),
        Kind.biased,
        "1",
        use="low temperatures; wherever you would use Gumbel straight-through",
        avoid="when the optimum itself matters",
        papers=("paulus2021rao",),
    ),
    Entry(
        GumbelSoftmax(),
        Kind.biased,
        "1",
        use="models that are smooth between 0 and 1",
        avoid="models that must see values that can occur",
        papers=("jang2017categorical", "maddison2017concrete"),
        model="gradient at relaxed values",
    ),
    Entry(
        GappedStraightThrough(),
        Kind.biased,
        "1",
        use="where you would tune a temperature anyway",
        avoid="when the optimum itself matters",
        papers=("fan2022training",),
    ),
    Entry(
        GumbelStraightThrough(),
        Kind.biased,
        "1",
        use="",
        avoid="RaoGumbel() has the same mean and less variance",
        papers=("jang2017categorical",),
    ),
    Entry(
        StraightThrough(),
        Kind.biased,
        "1",
        use="",
        avoid="ReinMax() costs the same and is exact for quadratic costs",
        papers=("bengio2013estimating",),
    ),
    Entry(
        SmoothedTriple(),
        Kind.biased,
        "1",
        use="large counts, smooth costs",
        avoid="small counts: StochasticTriple() has no bias",
        papers=("arya2022automatic",),
    ),
    Entry(
        Repeat(2, DisARM()),
        Kind.composition,
        "n times its part's",
        use="draws at one noisy site instead of particles",
        avoid="sites whose downstream is most of the program: particles",
        papers=("titsias2015local",),
        sites="its part's",
        model="what its part needs",
        keeps="what its part keeps",
    ),
    Entry(
        Antithetic(Reinforce(MovingAverage())),
        Kind.composition,
        "twice its part's",
        use="estimates that are monotone in the noise",
        avoid="Bernoulli sites: DisARM()",
        papers=("wu2019differentiable",),
        model="what its part needs",
        keeps="what its part keeps",
    ),
    Entry(
        Average((DisARM(), Reinforce())),
        Kind.composition,
        "those of its parts",
        use="several estimators of like noise",
        papers=("owen2013monte",),
        sites="its parts'",
        model="what its parts need",
        keeps="what its parts keep",
    ),
    Entry(
        Combine((DisARM(), RELAX())),
        Kind.composition,
        "those of its parts",
        use="parts whose errors differ",
        avoid="a good part beside a noisy one: take the good one",
        papers=("geffner2018using",),
        sites="Bernoulli, categorical",
        model="what its parts need",
        keeps="averages, what its parts keep",
    ),
)

#: the papers behind the objectives, which are no rows
OBJECTIVES: dict[type[Spec], tuple[str, ...]] = {
    Renyi: ("li2016renyi", "mnih2016variational"),
    ImportanceWeighted: ("burda2016importance", "mnih2016variational"),
}

LEGEND = (
    "Evaluations are runs of model and guide per step and particle; a slope is one that is differentiated in z. D is "
    "the number of dependent elements of a site, C of categories; A is 1, for categories C − 1, for a Normal 3; other "
    "letters are the estimator's own arguments. Categorical sites are integers or one-hot, location and scale families "
    "Normal, Laplace, Logistic, Gumbel and Cauchy."
)


def papers_of(spec: Spec) -> tuple[str, ...]:
    """BibTeX keys of the papers behind the class of a spec; none for a class of the user's."""
    keys = {type(entry.subject): entry.papers for entry in ENTRIES} | OBJECTIVES
    return keys.get(type(spec), ())


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
