"""Specs are values: frozen, hashable, comparable, with a repr that can be pasted back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import ppl_estimators
from ppl_estimators import *  # noqa: F403
from ppl_estimators import (
    ARM,
    ARMS,
    ARSM,
    REBAR,
    RELAX,
    UGC,
    BitFlip,
    Constant,
    ControlVariate,
    CoupledImportance,
    DisARM,
    DisARMStickBreaking,
    DisARMTree,
    Enumerate,
    EvidenceLowerBound,
    Given,
    ImportanceWeighted,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    Pathwise,
    Reinforce,
    Renyi,
    StickingTheLanding,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
)
from ppl_estimators.core.spec import Spec

SPECS = [
    Pathwise(),
    StickingTheLanding(),
    Reinforce(),
    Reinforce(Constant(-1.5)),
    Reinforce(LeaveOneOut()),
    Reinforce(MovingAverage(0.5)),
    Reinforce(MovingAverage() + Learned(hidden=8)),
    Reinforce(OptimalConstant()),
    Reinforce(OptimalConstant(0.9)),
    Reinforce(Learned()),
    Enumerate(),
    DisARM(),
    ARM(),
    ARMS(3),
    BitFlip(),
    BitFlip(4),
    UGC(),
    SumAndSample(2),
    SumAroundMode(6),
    UnorderedSet(3),
    DisARMStickBreaking(),
    DisARMStickBreaking("given"),
    DisARMTree(),
    CoupledImportance(),
    ARSM(),
    REBAR(0.3, scale=0.5),
    RELAX(hidden=4),
    RELAX(0.2, model_term=True),
    EvidenceLowerBound(),
    ImportanceWeighted(),
    Renyi(0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_repr_can_be_pasted_back(spec):
    again = eval(repr(spec), vars(ppl_estimators))
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_specs_are_frozen(spec):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        spec.anything = 1


def test_specs_differ_when_a_field_differs():
    assert Reinforce() != Reinforce(LeaveOneOut())
    assert RELAX() != REBAR()
    assert MovingAverage(0.5) != MovingAverage(0.6)
    assert MovingAverage() + Learned() != Learned() + MovingAverage()


def test_unhashable_fields_are_compared_by_identity():
    import numpy as np

    x = np.ones(3)
    assert Learned(inputs=x) == Learned(inputs=x)
    assert Learned(inputs=x) != Learned(inputs=np.ones(3))
    assert {Reinforce(Given(x)): 1}[Reinforce(Given(x))] == 1


def test_all_public_names_are_sorted_specs_or_errors():
    assert set(ppl_estimators.__all__) <= set(vars(ppl_estimators))
    for name in ppl_estimators.__all__:
        assert vars(ppl_estimators)[name].__doc__, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MovingAverage(1.0), r"MovingAverage\(decay\) needs 0 <= decay < 1, got 1.0"),
        (lambda: OptimalConstant(-0.1), r"OptimalConstant\(decay\) needs"),
        (lambda: Constant(float("nan")), r"Constant\(value\) needs a finite number"),
        (lambda: Learned(hidden=0), r"Learned\(hidden=...\) needs a positive integer"),
        (lambda: REBAR(0.0), r"REBAR\(temperature=...\) needs a positive number, got 0.0"),
        (lambda: RELAX(scale=-1.0), r"RELAX\(scale=...\) needs a positive number"),
        (lambda: Reinforce("LeaveOneOut"), r"takes a baseline such as LeaveOneOut\(\)"),
        (lambda: Reinforce(LeaveOneOut), r"takes a baseline such as LeaveOneOut\(\)"),
        (lambda: ControlVariate(abs, abs, 1.0, decay=0.5), r"not both"),
        (lambda: ControlVariate(abs, abs, float("inf")), r"finite number or None"),
        (lambda: Renyi(1.0), r"1 is the ELBO"),
        (lambda: ImportanceWeighted(0.5), r"use Renyi\(alpha\)"),
    ],
)
def test_bad_values_are_refused_at_once(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_every_spec_is_a_dataclass_without_generated_equality():
    pending = [Spec]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        assert "__eq__" not in vars(cls) or cls is Spec, cls


def test_a_spec_is_abstract_or_final():
    """What users write inherits from nothing that users write."""
    public = {c for c in vars(ppl_estimators).values() if isinstance(c, type) and issubclass(c, Spec)}
    assert not {(c.__name__, b.__name__) for c in public for b in c.__mro__[1:] if b in public}


# ---- import hygiene --------------------------------------------------------------------------------------------------

PACKAGE = Path(ppl_estimators.__file__).parent


def test_the_bare_package_imports_neither_library():
    code = (
        "import sys, ppl_estimators; "
        "bad = {'torch', 'jax', 'pyro', 'numpyro', 'numpy', 'array_api_compat'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize(("library", "absent"), [("pyro", "jax"), ("numpyro", "torch")])
def test_each_adapter_imports_only_its_library(library, absent):
    code = (
        f"import sys, ppl_estimators.{library}; "
        f"bad = [m for m in sys.modules if m.split('.')[0] in ('{absent}',)]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("folder", ["core", "estimators"])
def test_shared_code_imports_no_framework(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in {"torch", "jax", "pyro", "numpyro", "numpy"}, f"{path}: {line}"


#: files that one library needs and the other has no use for
ONLY_PYRO = {
    "baseline.py",  # Pyro's own words for a baseline
    "buffers.py",  # torch modules hold what they count; in JAX that is mutable state, which the caller passes on
}


def test_the_adapters_have_the_same_files():
    names = [{p.name for p in (PACKAGE / library).glob("*.py")} for library in ("pyro", "numpyro")]
    assert names[0] - ONLY_PYRO == names[1]
