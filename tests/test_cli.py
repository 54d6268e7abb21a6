"""The command line: help, one-line errors, exit codes."""

import pytest

from ppl_estimators import cli
from ppl_estimators.commands import demo as demo_command
from ppl_estimators.demo import experiment


def test_help_names_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "list" in shown


def test_help_of_demo_explains_the_table(capsys):
    assert cli.main(["demo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "held-out ELBO" in shown
    assert "--smoke" in shown


def test_help_of_list_explains_the_columns(capsys):
    assert cli.main(["list", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "dependent elements" in " ".join(shown.split())
    assert "--unbiased" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--backend", "tensorflow"], "'pyro', 'numpyro', 'both'"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--sed", "1"], "--seed"),
        (["list", "--format", "latex"], "'table', 'markdown', 'json'"),
        (["list", "--family", "student"], "Families: bernoulli, categorical"),
        (["list", "DisARM"], "DisARM"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert_one_line(capsys, message)


def test_missing_command_line_packages(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert_one_line(capsys, "needs typer and rich: pip install typer rich")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pyro", "needs it: pip install pyro-ppl array-api-compat"),
        ("numpyro", "needs it: pip install numpyro"),
        ("sklearn", "needs scikit-learn: pip install scikit-learn"),
    ],
)
def test_missing_library(missing, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None if name == missing else True)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert_one_line(capsys, message)


def test_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "below")]) == 1
    assert_one_line(capsys, "cannot write to --out")


def test_interruption(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupted)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def assert_one_line(capsys, message):
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("ppl-estimators: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report", "nonsense"], 2, "program 'nonsense' is not known"),
        (["report", "nonsense:program"], 2, "cannot load 'nonsense:program'"),
        (["report", "bit", "--estimator", "Disarm"], 1, "'Disarm' is not a name of ppl_estimators"),
        (["report", "bit", "--draws", "1"], 2, "--draws"),
        (["report", "bit", "--backend", "tensorflow"], 2, "'pyro', 'numpyro'"),
        (["recommend", "nonsense"], 2, "program 'nonsense' is not known. Use bit, bits"),
        (["recommend", "bit", "--draws", "49"], 2, "--draws"),
        (["recommend", "bit", "--seed", "-1"], 2, "--seed"),
        (["compare", "bit", "--particles", "0"], 2, "--particles"),
        (["compare", "counts", "--estimator", "DisARM", "--draws", "2"], 1, "DisARM needs a Bernoulli site"),
    ],
)
def test_report_and_compare_complain_in_one_line(arguments, code, message, capsys):
    assert cli.main(arguments) == code
    assert_one_line(capsys, message)


def test_report_and_compare_in_both_libraries(capsys, tmp_path, monkeypatch):
    import json

    assert cli.main(["report", "bit", "--draws", "20", "--json", "--backend", "pyro"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][1]["name"] == "b"
    assert cli.main(["compare", "bit", "--draws", "50", "--estimator", "Enumerate", "--out", str(tmp_path)]) == 0
    assert "exact, 2 states" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["label"] == "Enumerate"
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_recommend_prints_what_to_paste_and_saves_the_evidence(capsys, tmp_path):
    import json

    common = ["recommend", "bit", "--draws", "50", "--seed", "3", "--backend", "pyro"]
    assert cli.main([*common, "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "recommendation.json").read_text())
    assert printed["library"] == "pyro"
    assert printed["joint"]["seed"] == 3
    assert len(printed["choices"][0]["evidence"]["rows"]) > 5
    assert "elbo = EstimatorELBO({" in printed["code"]
    assert (tmp_path / "recommendation.png").stat().st_size > 1000


@pytest.mark.parametrize("command", ["report", "compare", "recommend"])
def test_help_of_the_measuring_tools_teaches(command, capsys):
    assert cli.main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--backend", "--seed", "--out", "--json", "--draws", "--particles"):
        assert option in shown
    assert "module:function" in shown
    assert f"ppl-estimators {command} " in shown
    for program in ("mixture", "fairness"):
        assert program in shown


def test_a_program_of_ones_own(capsys, tmp_path, monkeypatch):
    import json

    source = """
import pyro, torch
import pyro.distributions as dist

def program():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
    return model, guide, (torch.tensor(0.5),)

def broken():
    model, guide, args = program()
    return model, lambda x: None, args

def unfinished():
    return program()[0]
"""
    (tmp_path / "of_my_own.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "of_my_own:program", "--backend", "pyro", "--draws", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][1]["name"] == "z"
    for command in ("report", "compare", "recommend"):
        assert cli.main([command, "of_my_own:broken", "--backend", "pyro"]) == 1
        assert_one_line(capsys, "the guide has no latent sites")
    assert cli.main(["report", "of_my_own:unfinished", "--backend", "pyro"]) == 2
    assert_one_line(capsys, "must return (model, guide) or (model, guide, args)")
