"""Which estimators each case of the zoo is tried with, the same in both libraries.

`EVERY_STATE`: estimators whose gradient is a function of the drawn state alone. Gradients of the
    states, weighted with their probabilities, must sum to the exact gradient: no statistics.
`EVERY_DRAW`: every single draw is the exact gradient.
`ON_AVERAGE`: the mean of many draws is the exact gradient, within five standard errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from ppl_estimators import (
    ARM,
    ARMS,
    ARSM,
    LAX,
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
    ImportanceSampled,
    Learned,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    MuProp,
    OptimalConstant,
    Pathwise,
    Reinforce,
    RELAXWithModel,
    Repeat,
    Stein,
    StickingTheLanding,
    StochasticTriple,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
)
from ppl_estimators.catalogue import site_of
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.core.families import NORMAL


@dataclass(frozen=True)
class Mix:
    """A choice of estimators; `particles` and `draws` are NumPyro's (Pyro draws many particles).

    `exact` names the parameters whose gradient has no variance at all.
    """

    name: str
    estimators: Mapping[str, Any] | None
    particles: int = 1
    draws: int = 40_000
    hook: bool = False
    exact: tuple[str, ...] = ()


def kept(name: str, estimators: Mapping[str, Any], **options: Any) -> Mix:
    """A mix that keeps parameters or state, and so needs the guide hook."""
    return Mix(name, estimators, hook=True, **options)


LOO = Reinforce(LeaveOneOut())


def double(z: Any) -> Any:
    return 2.0 * z


def double_mean(distribution: Any) -> Any:
    return 2.0 * distribution.mean


AUTO = Mix("auto", None)
PLAIN = Mix("reinforce", {"*": Reinforce()})
CONSTANT = Mix("constant", {"*": Reinforce(Constant(-1.7))})
LEAVE_ONE_OUT = Mix("leave_one_out", {"*": LOO}, particles=3)
DISARM = Mix("disarm", {"*": DisARM()})
ENUMERATE = Mix("enumerate", {"*": Enumerate()})
OPTIMAL = Mix("optimal_constant", {"*": Reinforce(OptimalConstant())}, particles=4)
CONTROL = Mix("control_variate", {"z*": ControlVariate(double, double_mean, 0.7)})
CONTROL_LOO = Mix(
    "control_variate_fitted",
    {"z*": ControlVariate(double, double_mean, baseline=LeaveOneOut())},
    particles=4,
)
NVIL = kept("nvil", {"*": Reinforce(MovingAverage() + Learned(hidden=4))})
REBARS = kept("rebar", {"*": REBAR()})
RELAXES = kept("relax", {"*": RELAX(hidden=4)})
RELAXES_MODEL = kept("relax_model", {"*": RELAXWithModel(hidden=4)})
ARMED = Mix("arm", {"*": ARM()})
ARMS_THREE = Mix("arms", {"*": ARMS(3)})
FLIP = Mix("bit_flip", {"*": BitFlip()})
FLIPS = Mix("bit_flips", {"*": BitFlip(2)})
CLIPPED = Mix("ugc", {"*": UGC()})
BITS = [ARMED, ARMS_THREE, FLIP, CLIPPED]
CATEGORICALS = [
    Mix("sum_and_sample", {"*": SumAndSample(1)}),
    Mix("unordered_set", {"*": UnorderedSet(2)}),
    Mix("stick_breaking", {"*": DisARMStickBreaking()}),
    Mix("tree", {"*": DisARMTree()}),
    Mix("coupled_importance", {"*": CoupledImportance()}),
    Mix("arsm", {"*": ARSM()}),
]

MUPROP = Mix("muprop", {"*": MuProp()})
DOUBLE = kept("double_control_variate", {"*": DoubleControlVariate(-0.5)}, particles=3)
REPEAT = Mix("repeat", {"*": Repeat(3, LOO)})
COMBINE = kept("combine", {"*": Combine((DisARM(), REBAR(), Reinforce(MovingAverage())))})
TRIPLE = Mix("triple", {"*": StochasticTriple()})
WIDER = Mix("importance_sampled", {"*": ImportanceSampled(Reinforce(Constant(-1.5)))})
MEASURE = Mix("measure_valued", {"*": MeasureValued()})
STEIN = kept("stein", {"*": Stein(hidden=4)}, particles=3)

EVERY_STATE: dict[str, list[Mix]] = {
    "single": [PLAIN, CONSTANT, CONTROL],
    "single_zero": [PLAIN, CONSTANT],
    "single_zero_model": [PLAIN],
    "chain": [PLAIN, CONSTANT, CONTROL],
    "chain3": [PLAIN],
    "scaled": [PLAIN],
    "delta": [Mix("reinforce", {"z": Reinforce()})],
    "masked_by_handler": [PLAIN],
    "masked_by_distribution": [PLAIN],
    "undeclared": [PLAIN],
    "event": [PLAIN],
    "auxiliary": [PLAIN],
    "branching": [PLAIN],
    "branching_guide": [PLAIN],
    "switching": [PLAIN],
    "over_time": [PLAIN],
}

#: two particles, leave-one-out: the gradient is a function of both states
PAIRS_OF_STATES = ("single", "chain", "scaled", "auxiliary", "delta", "branching", "branching_guide")

#: the parameters of the guide: those of the model see the drawn value
EVERY_DRAW: dict[str, list[Mix]] = {
    "single": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "single_zero": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "single_zero_model": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "delta": [Mix("enumerate", {"z": Enumerate()}, exact=("b", "c"))],
    "masked_by_handler": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "masked_by_distribution": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "branching": [Mix("enumerate", {"z": Enumerate()}, exact=("a",))],
    "switching": [Mix("enumerate", {"k": Enumerate()}, exact=("a",))],
}

ON_AVERAGE: dict[str, list[Mix]] = {
    "single": [
        AUTO,
        LEAVE_ONE_OUT,
        DISARM,
        CONTROL_LOO,
        NVIL,
        REBARS,
        RELAXES,
        RELAXES_MODEL,
    ],
    "single_zero": [AUTO, DISARM, RELAXES, REBARS],
    "single_zero_model": [AUTO],
    "chain": [
        AUTO,
        LEAVE_ONE_OUT,
        DISARM,
        ENUMERATE,
        OPTIMAL,
        CONTROL_LOO,
        NVIL,
        REBARS,
        RELAXES,
        RELAXES_MODEL,
        MUPROP,
        DOUBLE,
        STEIN,
        REPEAT,
        COMBINE,
        TRIPLE,
        WIDER,
        Mix("antithetic_average", {"z1": Antithetic(Reinforce()), "z2": Average((DisARM(), Enumerate()))}),
        Mix("enumerate_disarm", {"z1": Enumerate(), "z2": DisARM()}),
        Mix("disarm_reinforce", {"z1": DisARM(), "z2": Reinforce(Constant(-1.5))}),
        kept("rebar_reinforce", {"z1": REBAR(), "z2": Reinforce(Constant(-1.5))}),
        kept("relax_model_enumerate", {"z1": RELAXWithModel(hidden=4), "z2": Enumerate()}),
    ],
    "chain3": [
        AUTO,
        DISARM,
        ENUMERATE,
        REBARS,
        kept("three", {"z1": RELAXWithModel(hidden=4), "z2": DisARM(), "z3": Enumerate()}),
    ],
    "mixed": [
        AUTO,
        Mix("disarm_pathwise", {"z*": DisARM(), "w": Pathwise()}),
        Mix("loo_pathwise", {"z*": LOO, "w": Pathwise()}, particles=3),
        Mix("enumerate_landing", {"z*": Enumerate(), "w": StickingTheLanding()}),
        Mix("enumerate_score", {"z*": Enumerate(), "w": LOO}, particles=4),
        Mix("loo", {"*": LOO}, particles=4),
        Mix("measure_valued", {"z*": DisARM(), "w": MeasureValued()}),
        Mix("delta_method", {"z*": DisARM(), "w": DeltaMethod()}, particles=5),
        kept("rebar_pathwise", {"z*": REBAR(), "w": Pathwise()}),
        kept("muprop_stein", {"z1": MuProp(MovingAverage()), "z2": Stein(), "w": Pathwise()}, particles=3),
        kept("relax_model", {"z1": RELAXWithModel(hidden=4), "z2": DisARM()}),
    ],
    "delta": [AUTO, Mix("disarm", {"z": DisARM()})],
    "scaled": [DISARM, NVIL, REBARS, RELAXES],
    "subsample": [
        LEAVE_ONE_OUT,
        DISARM,
        ENUMERATE,
        NVIL,
        kept("relax_model", {"*": RELAXWithModel(hidden=4)}),
        MUPROP,
        DOUBLE,
        STEIN,
        REPEAT,
        COMBINE,
        TRIPLE,
        WIDER,
    ],
    "subsampled_bits": [
        DISARM,
        *BITS,
        Mix("arms_flip", {"z1": ARMS(4), "z2": BitFlip()}),
        Mix("ugc_arm", {"z1": UGC(), "z2": ARM()}),
    ],
    "subsampled_categories": [
        *CATEGORICALS,
        Mix("sum_tree", {"k": SumAndSample(2), "z": DisARMTree()}),
        Mix("sticks_set", {"k": DisARMStickBreaking("ascending"), "z": UnorderedSet(3)}),
    ],
    "subsampled_mix": [
        Mix("delta_method", {"z": DisARM(), "w": DeltaMethod()}, particles=5),
        Mix("antithetic_landing", {"z": Antithetic(Reinforce(Constant(-4.0))), "w": StickingTheLanding()}),
        Mix("average_measure", {"z": Average((DisARM(), Enumerate())), "w": MeasureValued()}),
    ],
    "subsampled_counts": [  # samplers of counts are slow
        Mix("sum_triple", {"z1": SumAroundMode(2), "z2": StochasticTriple()}, draws=12_000),
        Mix("measure_sum", {"z1": MeasureValued(), "z2": SumAroundMode(4)}, draws=12_000),
    ],
    "coupled_categories": [ENUMERATE, *CATEGORICALS],
    "masked_by_handler": [DISARM, NVIL, REBARS, RELAXES],
    "masked_by_distribution": [DISARM, REBARS],
    "undeclared": [LEAVE_ONE_OUT, TRIPLE, DISARM, ENUMERATE, OPTIMAL, REBARS, RELAXES, STEIN, *BITS, FLIPS],
    "event": [
        LEAVE_ONE_OUT,
        WIDER,
        TRIPLE,
        DISARM,
        ENUMERATE,
        REBARS,
        RELAXES,
        MUPROP,
        DOUBLE,
        STEIN,
        REPEAT,
        *BITS,
        FLIPS,
    ],
    "crossed": [
        LEAVE_ONE_OUT,
        TRIPLE,
        WIDER,
        DISARM,
        ENUMERATE,
        FLIP,
        FLIPS,
        CLIPPED,
        Mix("two", {"z_row": Enumerate(), "z_column": DisARM()}),
        Mix("arms_disarm", {"z_row": ARMS(4), "z_column": DisARM()}),
        REBARS,
    ],
    "nested": [LEAVE_ONE_OUT, TRIPLE, DISARM, ENUMERATE, NVIL, REBARS, FLIP, CLIPPED],
    "reentered": [LEAVE_ONE_OUT, TRIPLE, ENUMERATE],
    "reentered_same_plate": [LEAVE_ONE_OUT, TRIPLE, DISARM, ENUMERATE, OPTIMAL, REBARS, FLIPS, CLIPPED],
    "auxiliary": [LEAVE_ONE_OUT, DISARM, ENUMERATE, REBARS],
    "mixture": [Mix("loo", {"w": LOO}, particles=4), Mix("repeat", {"w": Repeat(4, LOO)})],
    "wrapped": [
        AUTO,
        Mix("loo", {"*": LOO}, particles=4),
        Mix("repeat", {"*": Repeat(4, LOO)}),
        Mix("optimal", {"*": Reinforce(OptimalConstant())}, particles=8),
    ],
    "categories": [
        LEAVE_ONE_OUT,
        TRIPLE,
        MEASURE,
        ENUMERATE,
        REPEAT,
        kept("enumerate_rebar", {"k": Enumerate(), "z": REBAR()}),
        kept("relax_disarm", {"k": RELAX(hidden=4), "z": RELAXWithModel(hidden=4)}),
    ],
    "branching": [LEAVE_ONE_OUT, DISARM],
    "branching_guide": [ENUMERATE, DISARM],
    "over_time": [LEAVE_ONE_OUT, DISARM, ENUMERATE],
}

#: with the model's own gradient averaged over the counterfactual values too
AVERAGED: dict[str, list[Mix]] = {
    "chain": [DISARM, Mix("enumerate_disarm", {"z1": Enumerate(), "z2": DisARM()})],
    "mixed": [
        Mix("disarm_pathwise", {"z*": DisARM(), "w": Pathwise()}),
        Mix("enumerate_landing", {"z*": Enumerate(), "w": StickingTheLanding()}),
        kept("disarm_lax", {"z*": DisARM(), "w": LAX(hidden=4)}),
    ],
    "subsampled_bits": [Mix("arms_arm", {"z1": ARMS(3), "z2": ARM()})],
    "subsampled_categories": [
        Mix("sum_tree", {"k": SumAndSample(2), "z": DisARMTree()}),
        Mix("sticks_set", {"k": DisARMStickBreaking(), "z": UnorderedSet(2)}),
        Mix("coupled_enumerate", {"k": CoupledImportance(), "z": Enumerate()}),
    ],
    "subsampled_counts": [Mix("sum_around_mode", {"*": SumAroundMode(3)}, draws=12_000)],
    "coupled_categories": [Mix("sum_and_sample", {"*": SumAndSample(1)}), Mix("unordered_set", {"*": UnorderedSet(2)})],
    "undeclared": [ENUMERATE],
    "event": [ENUMERATE],
    "crossed": [
        Mix("two", {"z_row": Enumerate(), "z_column": DisARM()}),
        Mix("arms_disarm", {"z_row": ARMS(4), "z_column": DisARM()}),  # one group, unequal numbers of values
    ],
    "masked_by_handler": [DISARM],
}

#: a Python branch on a value needs particles one after another in Pyro, and that is slow
PYRO_SEQUENTIAL = {"branching", "branching_guide"}
PYRO_SLOW = {("branching", "leave_one_out"), ("branching", "disarm"), ("branching_guide", "disarm")}
LEFT_OUT: dict[str, set[tuple[str, str]]] = {"numpyro": set(), "pyro": PYRO_SLOW}


def facts(estimator: Estimator) -> tuple[Any, ...]:
    """What the engine sees of an estimator: how it makes its value, what it evaluates and what it wants measured. The
    rest is arithmetic."""
    site = site_of(NORMAL if estimator.families is None else estimator.families[0])
    others, relaxed = estimator.alternatives(site), estimator.relaxations(site)
    evaluated = (others.own_law, others.weights is not None, others.count > 0, relaxed.count > 0, relaxed.downstream)
    return (estimator.value, estimator.measures, estimator.compares, bool(estimator.keeps(site, {})), *evaluated)


def profile(mix: Mix) -> frozenset[Any]:
    """What the engine sees of a mix."""
    if mix.estimators is None:
        return frozenset({"auto"})
    return frozenset((*facts(e), mix.hook, mix.particles > 1) for e in mix.estimators.values())


def quick(table: Mapping[str, list[Mix]], library: str) -> set[tuple[str, str]]:
    """The cells ``(case, mix)`` that `make test` runs.

    In Pyro each profile with each case, and each set of profiles that stands together somewhere. In NumPyro, where
    every cell must be compiled, each case with one of these on average, and each profile somewhere. The other cells are
    slow: what is left to see there, that an estimator's arithmetic is right and that the two libraries agree, is exact
    in `tests/exact`.
    """
    rows: list[tuple[str, list[Mix]]] = []
    together: set[frozenset[Any]] = set()
    for case, mixes in table.items():
        seen: set[Any] = set()
        row = []
        for mix in mixes:
            facts = profile(mix)
            if (case, mix.name) not in LEFT_OUT[library]:
                if facts - seen or (len(facts) > 1 and facts not in together):
                    row.append(mix)
                seen |= facts
                together.add(facts)
        rows.append((case, row))
    if library == "pyro":
        return {(case, mix.name) for case, row in rows for mix in row}
    met: set[Any] = set()
    chosen = set()
    for number, (case, row) in enumerate(rows):
        for i, mix in enumerate(row):
            if (table is ON_AVERAGE and i == number % len(row)) or profile(mix) - met:  # another column in each row
                chosen.add((case, mix.name))
                met |= profile(mix)
    return chosen


def every_pair(table: Mapping[str, list[Mix]]) -> list[Any]:
    return [pytest.param(name, mix, id=f"{name}-{mix.name}") for name, mixes in table.items() for mix in mixes]


def pairwise(table: Mapping[str, list[Mix]], library: str) -> list[Any]:
    here = quick(table, library)
    return [
        pytest.param(*(name, mix), id=f"{name}-{mix.name}", marks=() if (name, mix.name) in here else pytest.mark.slow)
        for name, mixes in table.items()
        for mix in mixes
        if (name, mix.name) not in LEFT_OUT[library]
    ]
