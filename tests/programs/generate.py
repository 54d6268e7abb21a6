"""A program from a seed."""

from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np

from ppl_estimators.core.estimator import Estimator

from .build import estimator
from .description import PLATES, SUPPORT, Axes, Factor, Latent, Observed, Parents, Program, Under
from .oracle import states

Random = np.random.Generator

#: a program with more states than this is thrown away
STATES = 4_000

BASELINES = (
    "", "Constant(-1.5)", "LeaveOneOut()", "MovingAverage(0.8)", "OptimalConstant()", "OptimalConstant(PastSteps(0.8))",
    "Learned(hidden=3)", "MovingAverage(0.8) + Learned(hidden=3)", "LeaveOneOut() + Learned(hidden=3)",
)  # fmt: skip
ANY = (
    *(f"Reinforce({b})" for b in BASELINES), "VarGrad()", "MeasureValued()",
)  # fmt: skip
WITH_MEAN = (  # of families with a mean that is a number
    "ControlVariate(double, double_mean, 0.7)", "ControlVariate(double, double_mean)",
    "ControlVariate(double, double_mean, PastSteps(0.8))",
    "ControlVariate(double, double_mean, -0.4, baseline=MovingAverage(0.8))",
)  # fmt: skip
DISCRETE = (
    "Enumerate()", "StochasticTriple()", "RELAX(hidden=3)", "RELAXWithModel(hidden=3)", "REBAR()", "MuProp()",
    "MuProp(MovingAverage(0.8))", "DoubleControlVariate(-0.5)",
)  # fmt: skip
BERNOULLI = (
    "DisARM()", "DisARM()", "ARM()", "ARMS(3)", "ARMS(4)", "BitFlip()", "BitFlip(2)", "UGC()", "Stein(hidden=3)",
    "RELAX(hidden=3, baseline=None)", "REBAR(0.7)",
)  # fmt: skip
CATEGORICAL = (
    "SumAndSample(1)", "SumAndSample(2)", "UnorderedSet(2)", "UnorderedSet(3)", "DisARMStickBreaking()",
    "DisARMStickBreaking('ascending')", "DisARMTree()", "CoupledImportance()", "ARSM()",
)  # fmt: skip
COUNTS = ("StochasticTriple()", "SumAroundMode(2)", "SumAroundMode(8)", "MeasureValued()")
NORMAL = ("Pathwise()", "Pathwise()", "StickingTheLanding()", "ImplicitPathwise()", "LAX(hidden=3)", "DeltaMethod()",
          "DeltaMethod(PastSteps(0.8))", "EvolutionStrategy()")  # fmt: skip
#: what an unbiased estimator needs that no site here has
ELSEWHERE = {
    "DoublyReparameterized": "bounds",
    "GeneralizedPathwise": "gamma sites",
    "RejectionPathwise": "gamma sites",
}
FAMILIES = {"bernoulli": 0.5, "categorical": 0.11, "onehot": 0.13, "binomial": 0.06, "poisson": 0.04, "normal": 0.16}
POOLS = {
    "bernoulli": DISCRETE + BERNOULLI,
    "categorical": DISCRETE + CATEGORICAL,
    "onehot": DISCRETE + CATEGORICAL,
    "binomial": COUNTS,
    "poisson": COUNTS,
    "normal": NORMAL,
}


def single(rng: Random, family: str) -> str:
    general = ANY if family in ("categorical", "onehot") else ANY + WITH_MEAN
    return str(rng.choice(POOLS[family] if rng.random() < 0.65 else general))


COMPOSITIONS = ("Repeat", "Average", "Combine", "Antithetic", "ImportanceSampled")


def composition(rng: Random, family: str, depth: int = 0) -> str:
    """A composition that can be constructed."""
    while True:
        parts = [
            composition(rng, family, depth + 1) if depth < 1 and rng.random() < 0.25 else single(rng, family)
            for _ in range(2)
        ]
        kind = str(rng.choice(COMPOSITIONS))
        if kind == "Repeat":
            code = f"Repeat({rng.integers(2, 4)}, {parts[0]})"
        elif kind in ("Average", "Combine"):
            code = f"{kind}(({parts[0]}, {parts[1]}))"
        elif kind == "Antithetic":
            code = f"Antithetic({parts[0]})"
        else:
            code = f"ImportanceSampled(Reinforce({rng.choice(BASELINES)}))"
        try:
            estimator(code)
        except (TypeError, ValueError):  # what an estimator refuses to be made of
            continue
        return code


def an_estimator(rng: Random, family: str) -> str | None:
    """None: the default. Whether it suits the site is for its `check` to say."""
    x = rng.random()
    return None if x < 0.1 else composition(rng, family) if x < 0.35 else single(rng, family)


def generate(seed: int) -> Program:
    rng = np.random.default_rng([2026, seed])
    while True:
        program = _program(rng)
        if states(program) <= STATES:
            return program


def _program(rng: Random) -> Program:
    layout = tuple(str(a) for a in rng.permutation(["a", "b", "u"])[: rng.choice(4, p=[0.1, 0.35, 0.4, 0.15])])
    reverse = bool(rng.random() < 0.4)
    latents: list[Latent] = []
    for index in range(rng.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.35, 0.3])):
        family = str(
            rng.choice(
                list(FAMILIES),
                p=list(FAMILIES.values()),
            )
        )
        axes = _axes(rng, layout, event=0.15)
        latents.append(
            Latent(
                f"z{index}",
                family,
                axes,
                guide=_parents(rng, latents, 0.6),
                under_guide=_under(rng, axes, layout),
                tied=tuple(a for a in axes if a in "ab" and rng.random() < 0.2),
                shared=bool(rng.random() < 0.2),
                auxiliary=bool(rng.random() < 0.1),
                estimator=an_estimator(rng, family),
            )
        )
    both = [z for z in latents if not z.auxiliary]
    for index, z in enumerate(latents):
        if not z.auxiliary:
            number = int(z.name[1:])
            before = [x for x in both if (int(x.name[1:]) > number) == reverse and x is not z]
            # handlers of both sides agree as a rule, but need not
            under = z.under_guide if rng.random() < 0.7 else _under(rng, z.axes, layout)
            latents[index] = replace(z, model=_parents(rng, before, 0.5), under_model=under)
    observed = []
    for index in range(rng.integers(1, 3)):
        axes = _axes(rng, layout, event=0.1)
        observed.append(
            Observed(
                f"x{index}",
                axes,
                _parents(rng, both, 0.7),
                _under(rng, axes, layout),
                learned=bool(rng.random() < 0.4),
                shared=bool(rng.random() < 0.2),
            )
        )
    factors = []
    if rng.random() < 0.3:
        side = "guide" if rng.random() < 0.4 else "model"
        parents = _parents(rng, latents if side == "guide" else both, 0.6)
        factors = [Factor("f0", _axes(rng, layout, event=0.0), parents, side)]
    plates = [a for a in layout if a in PLATES]
    particles = int(rng.choice([1, 2, 3, 5], p=[0.6, 0.15, 0.15, 0.1]))
    return Program(
        tuple(latents), tuple(observed), tuple(factors), layout, reverse,
        reverse_plates=bool(rng.random() < 0.5),
        nested=bool(rng.random() < 0.5),
        particles=particles,
        vectorized=bool(rng.random() < 0.7),
        average_model=bool(rng.random() < 0.15),
        subsampled=str(rng.choice(plates)) if plates and rng.random() < 0.2 else None,
    )  # fmt: skip


def with_sums(seed: int, drawn: bool = True) -> Program:
    """A program some of whose sites take all their values at once: marked in the guide, or in the model only; all of
    its sites unless some are ``drawn``."""
    rng = np.random.default_rng([2027, seed, drawn])
    while True:
        program = _program(rng)
        if not drawn:
            program = _countable(rng, program)
        program = _marked(rng, program, 0.25 if drawn else 0.0)
        if program is not None and states(program) <= STATES:
            return program


def _countable(rng: Random, program: Program) -> Program:
    """Every site one that can be summed over."""
    latents = tuple(
        replace(
            z,
            family=z.family if z.family in SUPPORT else str(rng.choice(["bernoulli", "categorical"])),
            axes=axes,
            auxiliary=False,
            under_guide=_under(rng, axes, axes),
            under_model=_under(rng, axes, axes),
        )
        for z in program.latents
        for axes in [tuple(a for a in z.axes if a in PLATES)]
    )
    return replace(program, latents=latents, average_model=False)


def _marked(rng: Random, program: Program, drawn: float) -> Program | None:
    """``program`` with marks where there is a sum; None if there is none, or no datum."""
    latents = []
    for z in program.latents:
        countable = z.family in SUPPORT and not z.auxiliary and set(z.axes) <= set(PLATES)
        x = rng.random()
        mark = None if not countable or x < drawn else "guide" if x < 0.6 else "model" if x < 0.9 else "named"
        latents.append(replace(z, mark=mark, **({"estimator": None} if mark else {})))
    if not any(z.mark for z in latents):
        return None
    gone = {z.name for z in latents if z.summed}
    scale = float(rng.choice([1.0, 2.5]))

    def under(u: Under) -> Under:
        """A sum has one scale, so the model has."""
        return replace(u, scale=scale if scale != 1 else None) if gone else u

    held: dict[str, frozenset[str]] = {}  # the plates in which a value has another meaning for each element
    for i, z in enumerate(latents):
        guide = {p: c for p, c in z.guide.items() if p not in gone and held[p] <= {*z.axes}}
        held[z.name] = frozenset().union(z.axes if z.mark else (), *(held[p] for p in guide))
        latents[i] = replace(z, guide={} if z.summed else guide, shared=z.shared and not z.summed)

    def seen(parents: Parents, axes: Axes) -> Parents:
        return {p: c for p, c in parents.items() if held[p] <= {*axes}}

    latents = [replace(z, model=seen(z.model, z.axes), under_model=under(z.under_model)) for z in latents]
    observed = [replace(x, parents=seen(x.parents, x.axes), under=under(x.under)) for x in program.observed]
    factors = [replace(f, parents=seen(f.parents, f.axes)) for f in program.factors]
    factors = [f for f in factors if f.side == "guide" or not gone or scale == 1]
    factors = [f for f in factors if f.side == "model" or not gone & f.parents.keys()]
    if not any(z.name in x.parents for z in latents if z.mark for x in (*observed, *factors)):
        return None
    program = replace(program, latents=tuple(latents), observed=tuple(observed), factors=tuple(factors))
    return program if _summable(program, held) else None


def _summable(program: Program, held: dict[str, frozenset[str]]) -> bool:
    """Is no sum one over all combinations of values in all elements of a plate? What sites that are summed together
    share must tell their plates apart, and hold those of values that the guide enumerates."""
    blocks: list[tuple[set[str], set[frozenset[str]]]] = []  # summed sites; plates of each factor
    values: list[frozenset[str]] = []
    factors = [(z.name, z.axes, z.model) for z in program.latents if not z.auxiliary]
    factors += [(x.name, x.axes, x.parents) for x in program.observed]
    factors += [(f.name, f.axes, f.parents) for f in program.factors if f.side == "model"]
    summed = {z.name: frozenset(z.axes) for z in program.latents if z.summed}
    for name, axes, parents in factors:
        seen = {name, *parents}
        names, plates = seen & summed.keys(), {frozenset(axes) & {*PLATES}}
        over = frozenset().union(*(held.get(n, frozenset()) for n in seen - summed.keys()))
        if not names:
            continue
        apart = []
        for block, value in zip(blocks, values, strict=True):
            if block[0] & names:
                names, plates, over = names | block[0], plates | block[1], over | value
            else:
                apart.append((block, value))
        blocks, values = [b for b, _ in apart] + [(names, plates)], [v for _, v in apart] + [over]
    return all(over <= summed[n] for (names, _), over in zip(blocks, values, strict=True) for n in names) and not any(
        a - b and b - a for names, _ in blocks for a in map(summed.get, names) for b in map(summed.get, names)
    )


def _axes(rng: Random, layout: Axes, event: float) -> Axes:
    axes = [a for a in layout if rng.random() < (0.35 if a == "u" else 0.55)]
    return (*axes, "e") if rng.random() < event else tuple(axes)


def _parents(rng: Random, sites: list[Latent], chance: float) -> Parents:
    return {
        z.name: round(float(rng.uniform(0.3, 1.0) * rng.choice([-1, 1])), 1) for z in sites if rng.random() < chance
    }


def _under(rng: Random, axes: Axes, layout: Axes) -> Under:
    """Masks lie within the site, scales may be wider."""
    scale: float | Axes | None = None
    mask: bool | Axes | None = None
    own = tuple(a for a in axes if a != "e")
    x, y = rng.random(), rng.random()
    if x < 0.1:
        scale = 2.5
    elif x < 0.25:
        scale = tuple(a for a in (own if rng.random() < 0.8 else layout) if rng.random() < 0.7) or None
    if y < 0.15:
        mask = tuple(a for a in own if rng.random() < 0.7) or bool(rng.random() < 0.5)
    return Under(scale, mask)


def parts(code: str) -> tuple[str, ...]:
    """The estimators that a composition is made of, as code."""
    spec = estimator(code)
    return tuple(
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(estimator(ast.unparse(node)), Estimator)
        and estimator(ast.unparse(node)) != spec
    )  # fmt: skip
