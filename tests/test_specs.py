"""Specs are values: frozen, hashable, comparable, with a repr that can be pasted back."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
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
    VIMCO,
    AnalyticKL,
    BitFlip,
    Constant,
    ControlVariate,
    CoupledImportance,
    DeltaMethod,
    DisARM,
    DisARMStickBreaking,
    DisARMTree,
    DoublyReparameterized,
    Enumerate,
    EvidenceLowerBound,
    Given,
    ImportanceWeighted,
    KLAnnealed,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Pathwise,
    Reinforce,
    RELAXWithModel,
    Renyi,
    StickingTheLanding,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
    WakeSleep,
)
from ppl_estimators.core.spec import Spec

SPECS = [
    Pathwise(),
    StickingTheLanding(),
    DoublyReparameterized(),
    Reinforce(VIMCO("arithmetic")),
    Reinforce(),
    Reinforce(Constant(-1.5)),
    Reinforce(LeaveOneOut()),
    Reinforce(MovingAverage(0.5)),
    Reinforce(MovingAverage() + Learned(hidden=8)),
    Reinforce(OptimalConstant()),
    Reinforce(OptimalConstant(PastSteps(0.9))),
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
    RELAXWithModel(0.2),
    EvidenceLowerBound(),
    ImportanceWeighted(),
    KLAnnealed(0.3),
    AnalyticKL("w", "z_*"),
    WakeSleep(wake_phi=0.5),
    Renyi(0.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_repr_can_be_pasted_back(spec):
    again = eval(repr(spec), vars(ppl_estimators))
    assert again == spec
    assert hash(again) == hash(spec)
    assert {spec: 1}[again] == 1


def test_decay_is_short_for_past_steps():
    assert OptimalConstant(decay=0.9) == OptimalConstant(PastSteps(0.9))
    assert DeltaMethod(decay=0.9) == DeltaMethod(PastSteps(0.9))
    assert ControlVariate(abs, abs, decay=0.9) == ControlVariate(abs, abs, PastSteps(0.9)) != ControlVariate(abs, abs)


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
        (lambda: OptimalConstant(PastSteps(0.9), decay=0.5), "moments or decay, not both"),
        (lambda: PastSteps(-0.1), r"PastSteps\(decay\) needs"),
        (
            lambda: OptimalConstant(0.9),
            r"OptimalConstant\(moments\) takes OtherParticles\(\) or PastSteps\(0.99\), got 0.9",
        ),
        (lambda: Constant(float("nan")), r"Constant\(value\) needs a finite number"),
        (lambda: Learned(hidden=0), r"Learned\(hidden=...\) needs a positive integer"),
        (lambda: REBAR(0.0), r"REBAR\(temperature=...\) needs a positive number, got 0.0"),
        (lambda: RELAXWithModel(scale=-1.0), r"RELAXWithModel\(scale=...\) needs a positive number"),
        (lambda: Reinforce("LeaveOneOut"), r"takes a baseline such as LeaveOneOut\(\)"),
        (lambda: Reinforce(LeaveOneOut), r"takes a baseline such as LeaveOneOut\(\)"),
        (lambda: ControlVariate(abs, abs, float("inf")), r"takes a finite number, OtherParticles"),
        (lambda: VIMCO("harmonic"), r'takes "geometric" or "arithmetic"'),
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


#: what each folder or file of the package may import of the package; "" is the package itself, with its public names
ARROWS = {
    "core": {"core"},
    "measure": {"measure", "core"},
    "estimators": {"estimators", "core"},
    "policy.py": {"estimators", "core"},
    "pyro": {"pyro", "measure", "core"},
    "numpyro": {"numpyro", "measure", "core"},
    "backends.py": {"measure", "core"},
    "__init__.py": {"estimators", "citations", "core"},
    "catalogue.py": {"", "citations", "estimators", "core"},
    "citations.py": {"core"},
    "figures.py": set(),
    "testing": {"testing", "backends", "measure", "core"},
    "diagnostics": {"diagnostics", "testing", "backends", "measure", "figures", "catalogue", "estimators", "", "core"},
    "demo": {"demo", "diagnostics", "pyro", "numpyro", "figures", "", "core"},
    "commands": {"commands", "demo", "diagnostics", "testing", "backends", "catalogue", "", "core"},
    "cli.py": {"commands"},
}
#: arrows beside these, each with its reason
EXCEPTIONS = {
    ("pyro/baseline.py", "estimators"): 'says Pyro\'s infer={"baseline": ...} in specs',
    ("pyro/library.py", "policy"): 'what infer={"enumerate": "sequential"} asks for',
    ("pyro/memory.py", "policy"): "the same",
    ("numpyro/distributions.py", "policy"): "the same",
    ("pyro/elbo.py", "policy"): "its default",
    ("numpyro/elbo.py", "policy"): "its default",
}
FRAMEWORKS = {"torch", "jax", "pyro", "numpyro"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, lazily or for types too."""
    here = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            folder = PACKAGE.parent / module.replace(".", "/")
            parts = {a.name for a in node.names if (folder / a.name).is_dir() or (folder / f"{a.name}.py").exists()}
            found |= {f"{module}.{name}" for name in parts} | ({module} if len(parts) < len(node.names) else set())
    return found


def test_arrows_point_downward():
    wrong, used = [], set()
    for path in FILES:
        file = path.relative_to(PACKAGE).as_posix()
        folder = path.relative_to(PACKAGE).parts[0]
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top != PACKAGE.name or (target := rest.partition(".")[0]) in ARROWS[folder]:
                continue
            used.add((file, target))
            if (file, target) not in EXCEPTIONS:
                wrong.append(f"{file} imports {name}")
    assert not wrong
    assert used == EXCEPTIONS.keys()


@pytest.mark.parametrize("folder", ["core", "estimators", "measure", "policy.py", "backends.py"])
def test_shared_code_imports_no_framework(folder):
    allowed = {"numpy"} if folder == "measure" else set()
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] == folder:
            found = {name.partition(".")[0] for name in imported(path)}
            assert not found & ({*FRAMEWORKS, "numpy"} - allowed), path


@pytest.mark.parametrize(("library", "other"), [("pyro", {"jax", "numpyro"}), ("numpyro", {"torch", "pyro"})])
def test_an_adapter_names_only_its_library(library, other):
    for path in (PACKAGE / library).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & other, path


#: who may ask a foreign object what it has
ASKS = {
    "pyro/distributions.py": "a distribution of the user's that wraps another one shows it by `base_dist` only",
    "numpyro/distributions.py": "a distribution of the user's that wraps another one shows it by `base_dist` only",
    "pyro/gradients.py": "stock ELBOs without a backward pass of their own have `differentiable_loss` in common",
}


def calls(path: Path, name: str) -> list[ast.Call]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def test_nobody_asks_hasattr():
    assert {path.relative_to(PACKAGE).as_posix() for path in FILES if calls(path, "hasattr")} == ASKS.keys()


CONCRETE = {c for c in vars(ppl_estimators).values() if isinstance(c, type) and issubclass(c, Spec)}
#: who may know a concrete spec by its class
KNOWS = {
    ("estimators/importance_sampled.py", "Reinforce"): "is made of it",
}


def test_nobody_asks_for_a_concrete_spec():
    names, found = {c.__name__: c.__module__ for c in CONCRETE}, set()
    for path in FILES:
        module = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))
        for call in [*calls(path, "isinstance"), *calls(path, "issubclass")]:
            asked = {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)} & names.keys()
            found |= {(path.relative_to(PACKAGE).as_posix(), n) for n in asked if names[n] != module}
        for node in ast.walk(ast.parse(path.read_text())):  # type(x) is C, type(x) in (C, D)
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and calls_type(node.left):
                asked = {n.id for c in node.comparators for n in ast.walk(c) if isinstance(n, ast.Name)} & names.keys()
                found |= {(path.relative_to(PACKAGE).as_posix(), n) for n in asked if names[n] != module}
    assert found == KNOWS.keys()


def calls_type(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "type"


#: concrete classes that others inherit from
INHERITED = {
    "EstimatorError": "an exception is caught by its base",
    "Library": "the name of a protocol in the core and of an enumeration in backends: two things",
    "Randomness": "the source of random numbers, which tools and tests replace",
}


def test_a_class_is_abstract_or_final():
    """What is made somewhere in the package inherits nothing that is made, too."""
    bases, made = set(), set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases |= {n.id for b in node.bases for n in ast.walk(b) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                made.add(node.func.id)
    own = {n.name for p in FILES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ClassDef)}
    assert bases & own & (made | {c.__name__ for c in CONCRETE}) == INHERITED.keys()


#: files that one library needs and the other has no use for
ONLY_PYRO = {
    "baseline.py",  # Pyro's own words for a baseline
    "compiled.py",  # NumPyro's steps are compiled by JAX; here operations are noted, and done again
    "tape.py",  # the notes
    "graphs.py",  # the notes as one call of a card
    "guards.py",  # are they still true?
    "particles.py",  # an axis of theirs in arrays of all shapes; JAX maps over it
    "buffers.py",  # torch modules hold what they count; in JAX that is mutable state, which the caller passes on
}


def test_the_adapters_have_the_same_files():
    names = [{p.name for p in (PACKAGE / library).glob("*.py")} for library in ("pyro", "numpyro")]
    assert names[0] - ONLY_PYRO == names[1]


#: public names that one adapter's file has and its twin has not, and why
ALONE = {
    ("pyro", "library.py"): {"PyroLibrary": "the twins' classes bear their library's name"},
    ("pyro", "memory.py"): {
        "Recent": "what a program has shown, from step to step; a step of NumPyro is traced, and one plan kept",
        "kind_of": "of a site, alone: it is met before the structure is known",
        "code_of": "a program is made anew at every step; NumPyro remembers only one that stays",
        "shape_of": "the same of its arguments",
    },
    ("numpyro", "memory.py"): {"kinds_of": "of all sites, and only outside of jit"},
    ("numpyro", "library.py"): {"NumPyroLibrary": "the twins' classes bear their library's name"},
    ("pyro", "elbo.py"): {"JitEstimatorELBO": "NumPyro's steps are always compiled"},
    ("pyro", "ops.py"): {
        "TorchOps": "named after the arrays",
        "CONSTANTS": "tensors of ours that a compiled step may meet",
    },
    ("numpyro", "ops.py"): {"JaxOps": "named after the arrays"},
    ("pyro", "randomness.py"): {
        "State": "of Pyro's generators; NumPyro's keys are values",
        "Generators": "rewinds them",
        "Stream": "what a rewound program draws again",
        "SideBySide": "the same for alternatives evaluated in one run",
    },
    ("pyro", "run.py"): {
        "ProgramError": "a mistake where Pyro's own ELBOs raise a RuntimeError or ValueError",
        "traced": "a run as Pyro's own tools take it",
        "shapes": "the table of shapes that Pyro's own ELBOs print",
    },
    ("numpyro", "run.py"): {
        "within": "of what a scan or a branch calls, which no handler outside reaches",
        "Keys": "of the sites, by their names; Pyro has one generator",
        "key_of": "the same",
        "keys_of": "the same",
        "ranks": "whether jax lets arrays of different ranks meet",
        "promoting": "they may",
        "DuplicateName": "a mistake where NumPyro itself raises an AssertionError",
        "Program": "with its parameters and its key, which Pyro holds by itself",
        "Scan": "Pyro has no scan",
        "in_scans": "Pyro has no scan",
        "interpreted": "under jax.disable_jit",
        "is_latent": "a record holds more than sample sites; Pyro's does not",
    },
    ("pyro", "survey.py"): {"dependencies": "of each run that is followed, for a plan is kept by them"},
    ("numpyro", "survey.py"): {
        "Survey": "what one trace shows beside the structure; Pyro learns it from the runs themselves",
        "plain_shapes": "Pyro's own ELBO counts plates",
    },
    ("pyro", "enumeration.py"): {"declared": "plates; NumPyro's are looked up in the traces"},
    ("numpyro", "enumeration.py"): {
        "in_turn": "the first steps of a scan beside the others; Pyro has no scan",
        "steps_of": "has them",
        "is_stepwise": "enumerated in each of them",
    },
    ("pyro", "distributions.py"): {
        "support_moves": "asks the tensors behind the ends; NumPyro's walk asks it of `ends`",
        "constant": "parameters that lead nowhere; NumPyro stops them before the program runs",
        "is_point": "moves with what it is made of; NumPyro's walk passes through it",
        "is_masked": "masked sites keep the log probability of the library",
    },
    ("numpyro", "distributions.py"): {
        "OneHotCategorical": "Pyro has one",
        "SCANS": "Pyro has no scan",
        "still": "a plan keeps shapes, no arrays of a trace",
        "ends": "what says where a support ends; Pyro asks `support_moves`",
        "StillLaw": "what a plan may ask of a law without its arrays",
        "cost_log_prob": "right at logits of exactly 0, where the library's slope is not",
        "log_p_of_all": "Pyro's own categorical does as it does",
        "sampled_dtype": "under a trace nothing is drawn to be looked at",
    },
    ("pyro", "keep.py"): {
        "Keeper": "holds parameters by name, as the store does; NumPyro declares them as sites",
        "read_state": "of the store",
        "update_state": "of the store",
    },
    ("numpyro", "keep.py"): {
        "state_name": "of a mutable site",
        "declare": "declares sites for what estimators keep",
    },
    ("pyro", "look.py"): {"untouched": "the parameter store and the random state are global"},
    ("pyro", "gradients.py"): {
        "aliased": "a distribution on watch: backward hooks stand where NumPyro differentiates a gate"
    },
    ("pyro", "hook.py"): {"Wrapped": "attributes of a module; NumPyro's guide is any callable"},
    ("numpyro", "gradients.py"): {
        "plan_of": "traces the program; Pyro's ELBO remembers its last plan",
        "CHUNK_NUMBERS": "draws are mapped, so many at once",
        "CHUNK_DRAWS": "draws are mapped, so many at once",
    },
    ("pyro", "monitor.py"): {
        "SHAPES": "sites whose shape changes from step to step",
        "Running": "averages are objects that hooks add to; NumPyro carries them as a state",
        "Record": "averages are objects that hooks add to; NumPyro carries them as a state",
        "WatchedGuide": "a guide may be watched without an SVI",
    },
    ("numpyro", "monitor.py"): {"State": "averages ride in the optimiser's state, through compiled loops"},
    ("pyro", "exact.py"): {"Point": "moves the store's parameters, and back; NumPyro's are arguments"},
    ("numpyro", "exact.py"): {
        "point": "finds the parameters and their constraints; Pyro's store has them",
        "named_leaves": "a network's parameters are a tree under one name",
    },
}
#: no twins: torch is watched while it runs, by function modes; JAX is read, as a jaxpr
APART = {"dependencies", "privates"}
TWIN_FILES = (
    "library",
    "memory",
    "run",
    "survey",
    "enumeration",
    "distributions",
    "elbo",
    "ops",
    "hook",
    "keep",
    "randomness",
    "look",
    "gradients",
    "monitor",
    "exact",
    "injected",
)


def defined(path: Path) -> list[str]:
    """Top-level names in the order of the file, constants included."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return found


def test_every_file_that_both_have_is_a_twin_or_says_why_not():
    both = {p.stem for p in (PACKAGE / "pyro").glob("*.py")} & {p.stem for p in (PACKAGE / "numpyro").glob("*.py")}
    assert both - {"__init__"} == {*TWIN_FILES} | APART


@pytest.mark.parametrize("name", TWIN_FILES)
def test_twin_files_read_alike(name):
    """The same public names in the same order; private ones that both have stand in the same order, too."""
    pyro, numpyro = (defined(PACKAGE / library / f"{name}.py") for library in ("pyro", "numpyro"))
    for library, mine, other in (("pyro", pyro, numpyro), ("numpyro", numpyro, pyro)):
        alone = {n for n in mine if n not in other and not n.startswith("_")}
        assert alone == ALONE.get((library, f"{name}.py"), {}).keys(), library
    assert [n for n in pyro if n in numpyro] == [n for n in numpyro if n in pyro]


#: words of our own, or of Python's documentation, that begin as private names do
PROMISED = {"_with_estimators", "_counterfactual_values", "_replace", "_getframe"}


def words(path: Path) -> set[str]:
    """Names of attributes, of what is imported, and in strings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(node.value.split())
    return found


def declared(path: Path) -> set[str]:
    """Names that a file gives to something."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_private_names_of_the_libraries_are_listed(library):
    listed = importlib.import_module(f"ppl_estimators.{library}.privates").PRIVATES
    files = [path for path in (PACKAGE / library).rglob("*.py") if path.name != "privates.py"]
    used, ours = set().union(*map(words, files)), set().union(*map(declared, FILES))
    private = {word for word in used if re.fullmatch(r"_[A-Za-z]\w*(?<!__)", word)} - ours - PROMISED
    assert private - listed.keys() == set()
    assert listed.keys() - used == set()


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_private_names_of_the_libraries_are_there(library):
    gone = []
    for name, (purpose, find) in importlib.import_module(f"ppl_estimators.{library}.privates").PRIVATES.items():
        try:
            find()
        except (AttributeError, ImportError, KeyError, IndexError) as error:
            gone.append(f"{name} ({purpose}): {error}")
    assert not gone
