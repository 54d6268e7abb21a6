"""The catalogue, the citations and `ppl-estimators list`: complete, and true to the classes."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys

import pytest

import ppl_estimators
from ppl_estimators import (
    NVIL,
    RELAX,
    AnalyticKL,
    DisARM,
    Enumerate,
    ImportanceWeighted,
    KLAnnealed,
    Learned,
    LeaveOneOut,
    MovingAverage,
    Pathwise,
    Reinforce,
    Renyi,
    Repeat,
    WakeSleep,
    citation,
    cli,
)
from ppl_estimators.catalogue import ENTRIES, FAMILIES, Kind, by_kind, markdown, site_of
from ppl_estimators.citations import papers_of, references
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.core.families import BERNOULLI, CATEGORICAL, DISCRETE, NORMAL, ONEHOT
from ppl_estimators.estimators.baselines.base import Baseline


def missing(names, where):
    """What a failing test prints."""
    return f"{where} lacks {', '.join(sorted(names))}. See the docstring of ppl_estimators/catalogue.py."


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_every_public_estimator_and_baseline_has_a_row():
    public = {name: vars(ppl_estimators)[name] for name in ppl_estimators.__all__}
    wanted = {n for n, c in public.items() if inspect.isclass(c) and issubclass(c, (Estimator, Baseline))}
    wanted |= {"VarGrad"}
    there = {entry.name for entry in ENTRIES} | {alias for entry in ENTRIES for alias in entry.aliases}
    assert wanted <= there, missing(wanted - there, "ppl_estimators.catalogue.ENTRIES")
    assert there <= wanted


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.call)
def test_evaluations_are_those_that_the_class_asks_for(entry):
    if entry.kind is Kind.composition:  # words: those of the parts, whatever they are
        return
    own = {name: value for name, value in vars(entry.example).items() if isinstance(value, int)}
    for family in entry.families:
        elements = 1 if family == "dirichlet" else 5
        site = site_of(family, elements, categories=4)
        a = {CATEGORICAL: 3, ONEHOT: 3, NORMAL: 3}.get(family, 1)
        formula = entry.evaluations.replace("·", "*").replace("−", "-")
        expected = eval(formula, {"D": elements, "C": site.categories if family in DISCRETE else None, "A": a, **own})
        found = 1 + entry.example.alternatives(site).count + entry.example.relaxations(site).count
        assert found == expected, f"{entry.call} at {family}: the class asks for {found}, the row says {expected}"


def test_rows_say_when_to_use_them_or_what_instead():
    for entry in ENTRIES:
        assert entry.families, f"{entry.call} works at no site"
        assert entry.use or entry.avoid, f"{entry.call}: neither use nor avoid"
        assert entry.use or "ot recommended" in entry.docstring, f"{entry.call}: its docstring does not warn"


def test_kinds_and_bias_agree():
    for entry in ENTRIES:
        assert (entry.kind is Kind.biased) is (not entry.unbiased and not isinstance(entry.example, NVIL)), entry.call


def test_derived_facts():
    facts = {entry.call: entry for entry in ENTRIES}
    assert facts["DisARM()"].families == (BERNOULLI,)
    assert facts["Reinforce(LeaveOneOut())"].families == FAMILIES
    assert facts["Reinforce(LeaveOneOut())"].particles == 2
    assert facts["RELAXWithModel()"].shown_keeps == "temperature, scale, a network, averages"
    assert facts["RELAXWithModel()"].shown_model == "gradient at relaxed values"
    assert facts["Pathwise()"].shown_sites == "reparameterisable"
    assert facts["Enumerate()"].shown_sites == "Bernoulli, categorical"
    assert facts["REBAR()"].shown_evaluations == "3, 2 slopes"


def test_the_groups_hold_every_row_once():
    grouped = [entry for group in by_kind(ENTRIES).values() for entry in group]
    assert len(grouped) == len(ENTRIES)
    assert markdown(ENTRIES).count("| `") == len(ENTRIES)


def test_the_catalogue_imports_neither_library():
    code = (
        "import sys, ppl_estimators.catalogue as c; from ppl_estimators import cli; c.markdown(c.ENTRIES); "
        "cli.main(['list']); bad = {'torch', 'jax', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- citations -------------------------------------------------------------------------------------------------------


OBJECTIVES = (AnalyticKL, ImportanceWeighted, KLAnnealed, Renyi, WakeSleep)


@pytest.mark.parametrize("subject", [*{type(e.subject): 0 for e in ENTRIES}, *OBJECTIVES])
def test_every_paper_that_a_docstring_names_is_in_the_bibliography(subject):
    reference = inspect.getdoc(subject).partition("Reference:")[2]
    named = set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", reference)) | set(re.findall(r"\[(\w+)\]", reference))
    found = papers_of(subject)
    assert bool(reference) is bool(found)
    assert len(found) == len(named), f"references.bib lacks one of {sorted(named)}: there is {found}"
    assert set(found) <= set(references()), missing(set(found) - set(references()), "references.bib")


def test_every_paper_of_the_bibliography_is_named():
    used = {key for entry in ENTRIES for key in entry.papers}
    used |= {key for objective in OBJECTIVES for key in papers_of(objective)}
    assert set(references()) <= used, f"references.bib: nothing uses {sorted(set(references()) - used)}"


def test_bibtex_is_well_formed():
    for key, entry in references().items():
        assert entry.count("{") == entry.count("}"), key
        assert entry.endswith("\n}"), key
        for field in ("title", "author", "year"):
            assert f"\n  {field} = {{" in entry, f"{key} has no {field}"


@pytest.mark.parametrize(
    ("used", "keys"),
    [
        (Pathwise(), {"kingma2014autoencoding", "rezende2014stochastic"}),
        ({"z": Enumerate(), "w": Enumerate()}, {"titsias2015local"}),
        ([Reinforce(MovingAverage() + Learned())], {"williams1992simple", "ranganath2014black", "mnih2014neural"}),
        (Repeat(2, RELAX()), {"titsias2015local", "grathwohl2018backpropagation"}),
        (ImportanceWeighted(), {"burda2016importance", "mnih2016variational"}),
        ([], set()),
    ],
)
def test_citation(used, keys):
    found = citation(used)
    assert set(re.findall(r"@\w+\{([^,]+),", found)) == keys
    assert found.count("\n@") == max(len(keys) - 1, 0)


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_citation_of_an_elbo_and_a_guide(library):
    adapter = pytest.importorskip(f"ppl_estimators.{library}")
    elbo = adapter.EstimatorELBO(
        {"z": Reinforce(LeaveOneOut())}, default=Pathwise(), objective=ImportanceWeighted(), num_particles=2
    )
    guide = adapter.with_estimators(lambda: None, {"b": DisARM()})
    found = citation([elbo, guide])
    for key in ("kool2019buy", "kingma2014", "burda2016", "dong2020disarm"):
        assert key in found


@pytest.mark.parametrize("used", ["DisARM()", 3, DisARM])
def test_citation_refuses_anything_else(used):
    with pytest.raises(TypeError, match=r"citation takes an EstimatorELBO, a spec such as DisARM\(\)"):
        citation(used)


def test_an_estimator_of_the_users_cites_nothing():
    class Mine(DisARM):
        pass

    assert citation(Mine()) == ""


# ---- the command -----------------------------------------------------------------------------------------------------


def test_list_shows_every_row_in_100_columns(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
    unbroken = "".join("".join(line[:38] for line in shown.splitlines()).split())  # a long one takes two lines
    for entry in ENTRIES:
        assert entry.call.replace(" ", "") in unbroken, entry.call


def test_list_by_family_and_bias(capsys):
    assert cli.main(["list", "--family", "poisson", "--unbiased", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in rows}
    assert {"StochasticTriple", "MeasureValued", "LeaveOneOut"} <= names
    assert not {"DisARM", "SmoothedTriple", "NVIL"} & names
    assert all(row["unbiased"] and "poisson" in row["families"] for row in rows)


def test_list_in_markdown(capsys):
    assert cli.main(["list", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == markdown(ENTRIES) + "\n"
