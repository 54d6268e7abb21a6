"""The documentation is true: its Python runs, and what a script makes is what is committed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import symtable
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.image import imread

import ppl_estimators
from ppl_estimators import cli
from ppl_estimators.catalogue import ENTRIES
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.estimators.baselines.base import Baseline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """``(line of the block's first line, source)`` of each Python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run(page, line, source, namespace):
    """Errors point at the line of the page."""
    exec(compile("\n" * line + source, str(page), "exec", dont_inherit=True), namespace)


#: pages that run from their first block to their last
STORIES = {"adding-an-estimator.md": 3, "diagnostics.md": 4}
CASES = [
    pytest.param(page, number, id=f"{page.name}-{number}")
    for page in PAGES
    for number in range(len(blocks(page)))
    if page.name not in STORIES and (page.name, number) != ("README.md", 2)
]


@pytest.mark.parametrize(("page", "number"), CASES)
def test_a_block_runs_as_pasted(page, number):
    run(page, *blocks(page)[number], {"__name__": "documentation"})


#: what trains by the README's last choice, after its program in either library
FURTHER = {
    0: "svi = pyro.infer.SVI(model, guide, adam, elbo); svi.step(torch.tensor(1.4))",
    1: "numpyro.infer.SVI(model, guide, adam, elbo).run(key, 1, 1.4, progress_bar=False)",
}


@pytest.mark.parametrize("program", FURTHER)
def test_the_readmes_ways_to_choose_after_either_program(program):
    page = ROOT / "README.md"
    namespace = {"__name__": "documentation"}
    run(page, *blocks(page)[program], namespace)
    assert abs(namespace["a"] + 0.047) < 0.02, "what the page says is exact"
    for _, source in (blocks(page)[2], (0, FURTHER[program])):
        exec(source, namespace)
    assert page.read_text(encoding="utf-8").count("```python") == 3


def test_how_to_cite_is_said_alike_and_of_this_version():
    cff, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "README.md"))
    said = dict(re.findall(r'^(\w+): "?(.*?)"?$', cff, flags=re.MULTILINE))
    bibtex = dict(re.findall(r"^  (\w+) *= \{(.*)\},$", readme, flags=re.MULTILINE))
    assert said["version"] == bibtex["version"] == ppl_estimators.__version__
    assert said["title"] == bibtex["title"].replace("\\_", "_")


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning")
def test_a_page_from_the_first_block_to_the_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes
    page = ROOT / "docs" / name
    namespace = {"__name__": "documentation"}
    for line, source in blocks(page):
        run(page, line, source, namespace)
    assert len(blocks(page)) >= STORIES[name]


TUTORIALS, GALLERY = (sorted((ROOT / "docs" / name).glob("*.ipynb")) for name in ("tutorials", "gallery"))
NOTEBOOKS = [*TUTORIALS, *GALLERY]


def cells_of(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


#: what a reader waits for gladly: (as on the page, as in the test)
SHORTER = {"from_trace_enum_elbo": ("range(300)", "range(150)")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:shape requires ndarray")  # NumPyro's `SVI.init` replays kept state into a scan
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_from_the_first_cell_to_the_last(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    namespace = {"__name__": "documentation", "display": str}
    cells = cells_of(path)
    page, test = SHORTER.get(path.stem, ("", ""))
    assert any(page in cell.source for cell in cells)
    for number, cell in enumerate(cells):
        assert cell.outputs or cell.execution_count, f"cell {number} was committed without being run"
        source = cell.source.replace(page, test) if page else cell.source
        exec(compile(source, f"{path.name}, cell {number}", "exec", dont_inherit=True), namespace)


class Shorter(ast.NodeTransformer):
    """Four steps or draws where there are hundreds, and no word on what comes out of them."""

    FEW, COUNTS = 4, ("steps", "num_draws", "number", "budget", "draws")

    def few(self, node):
        long = isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value >= 20
        return ast.copy_location(ast.Constant(self.FEW), node) if long else node

    def visit_Assert(self, node):
        return ast.copy_location(ast.Pass(), node)

    def visit_keyword(self, node):
        self.generic_visit(node)
        if node.arg in self.COUNTS:
            node.value = self.few(node.value)
        return node

    def visit_arguments(self, node):
        for i, (argument, default) in enumerate(zip(node.args[::-1], node.defaults[::-1], strict=False)):
            if argument.arg in self.COUNTS:
                node.defaults[-1 - i] = self.few(default)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", getattr(node.func, "attr", "")) in ("range", "run", "epochs"):
            node.args = [self.few(x) for x in node.args]
        return node


@pytest.mark.filterwarnings("ignore")
def test_a_tutorial_in_four_steps(monkeypatch):
    """Every cell of the shortest runs; what it finds is not looked at."""
    path = ROOT / "docs" / "tutorials" / "from_pyro_baselines.ipynb"
    monkeypatch.chdir(path.parent)
    namespace = {"__name__": "documentation", "display": str}
    for number, cell in enumerate(cells_of(path)):
        tree = ast.fix_missing_locations(Shorter().visit(ast.parse(cell.source)))
        exec(compile(tree, f"{path.name}, cell {number}", "exec", dont_inherit=True), namespace)


def without(cells, libraries):
    """The cells that neither import these libraries nor hang on one that does."""
    lost = set()
    for cell in cells:
        top = symtable.symtable(cell.source, "cell", "exec")
        made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
        used = {s.get_name() for s in top.get_symbols() if s.is_referenced()} - made
        inner = top.get_children()
        while inner:
            table = inner.pop()
            inner += table.get_children()
            used |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()} - made
        imports = re.findall(r"^(?:from|import) ([\w.]+)", cell.source, flags=re.MULTILINE)
        if used & lost or any(part in libraries for name in imports for part in name.split(".")):
            lost |= made
        else:
            lost -= made
            yield cell


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_what_a_worked_model_does_in_pyro_in_four_steps(path, monkeypatch):
    """NumPyro's half is mostly compilation: the test of the whole page, marked slow, has it."""
    monkeypatch.chdir(path.parent)
    namespace = {"__name__": "documentation", "display": str}
    for cell in without(cells_of(path), {"jax", "numpyro"}):
        tree = ast.fix_missing_locations(Shorter().visit(ast.parse(cell.source)))
        exec(compile(tree, path.name, "exec", dont_inherit=True), namespace)
    assert callable(namespace["PyroELBO"]), "nothing of Pyro was run"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_tutorial_imports_is_there_and_takes_these_arguments(path):
    found = {}
    for cell in cells_of(path):
        assert cell.outputs or cell.execution_count, f"committed without being run: {cell.source}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ppl_estimators"):
                exec(ast.unparse(node), found)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(found.get(node.func.id)):
                if not any(k.arg is None for k in node.keywords) and not any(
                    isinstance(a, ast.Starred) for a in node.args
                ):
                    inspect.signature(found[node.func.id]).bind(*node.args, **{k.arg: k.value for k in node.keywords})
    assert found


def commands():
    """The lines of all shell blocks."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            if language in ("", "sh", "bash", "shell"):
                yield from (line.partition(" #")[0].strip() for line in block.splitlines())


COMMANDS = sorted({line for line in commands() if line.startswith("ppl-estimators")})


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_is_one(line, capsys):
    """Its command and its options are known: with --help they are parsed, and nothing runs."""
    assert cli.main([*shlex.split(line)[1:], "--help"]) == 0, line
    assert shlex.split(line)[1] in capsys.readouterr().out


def test_every_make_target_is_one():
    made = {target for line in commands() for target in re.findall(r"\bmake ([\w-]+)", line)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test"} <= made <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_said_of_the_code_is_in_it(page):
    """Names written as `core/step.py: Step.run`; `*` stands for both libraries."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    for path, name in re.findall(r"`((?:[\w*]+/)*\w+\.py): ([\w.]+)`", text):
        for library in ("pyro", "numpyro"):
            file = ROOT / "ppl_estimators" / path.replace("*", library)
            assert name in definitions(ast.parse(file.read_text(encoding="utf-8"))), (file, name)


def definitions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


# ---- what scripts make -----------------------------------------------------------------------------------------------


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("make_estimators")


REMAKE = "run `make docs` and commit what it writes"


def test_the_api_pages_are_up_to_date():
    api = load("make_api")
    made = api.pages()
    for path, text in made.items():
        assert (ROOT / "docs" / path).read_text(encoding="utf-8") == text, f"docs/{path} is old: {REMAKE}"
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "api").iterdir()}
    assert there | {"api.md"} == set(made)


@pytest.mark.parametrize("module", ["", ".pyro", ".numpyro", ".diagnostics", ".testing"])
def test_every_public_name_is_on_the_page_of_its_module(module):
    text = (ROOT / "docs" / "api" / f"{module[1:] or 'specs'}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \[?`(\w+)", text.partition("\n## ppl_estimators.")[0], flags=re.MULTILINE))
    assert named == set(importlib.import_module(f"ppl_estimators{module}").__all__)


def test_the_tables_of_results_are_up_to_date():
    tables = load("make_tables")
    for path in tables.PAGES:
        assert path.read_text(encoding="utf-8") == tables.page(path), f"docs/{path.name} is old: {REMAKE}"
    assert tables.README.read_text(encoding="utf-8") == tables.readme(), f"the README's demo table is old: {REMAKE}"


def test_rows_taken_from_results_are_there():
    """The tables under ``<!-- rows of FILE -->`` hold rows of that file, without some of their cells."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- rows of (\S+) -->\n\| (.*?) \|.*\n.*\n((?:\|.*\n)+)", text)
    assert len(tables) == 2
    for file, title, rows in tables:
        _, _, results = (ROOT / file).read_text(encoding="utf-8").partition(f": {title}\n")
        found = {row[0]: row for row in map(cells, results.partition("\n## ")[0].splitlines())}
        for row in map(cells, rows.splitlines()):
            there = iter(found[row[0]])
            assert all(cell in there for cell in row), row


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_figures_can_be_drawn_again(tmp_path):
    load("make_figures").main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "figures").glob("*.png"))
    for name in drawn:
        for folder in (tmp_path, ROOT / "docs" / "figures"):
            alpha = imread(folder / name)[..., 3]
            assert alpha[0, 0] == 0, f"{name} has a background: it would glare on dark pages"
            assert (alpha > 0).mean() > 0.02
        assert np.abs(np.subtract(imread(tmp_path / name).shape, imread(folder / name).shape)).max() < 20


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "site")]
    run = subprocess.run([*command, "-d", str(tmp_path / "doctrees")], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for name, page in (
        ("pyro.EstimatorELBO", "pyro"), ("numpyro.with_estimators", "numpyro"),
        ("diagnostics.recommend", "diagnostics"), ("core.estimator.Estimator", "contract"),
    ):  # fmt: skip
        reference = (tmp_path / "site" / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert f'id="ppl_estimators.{name}"' in reference
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (*PAGES[1:], *NOTEBOOKS)]
    for page in pages:
        assert (tmp_path / "site" / page).exists() or page.stem == "derivations"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_are_ones_that_the_site_can_draw(page):
    conf = load("conf")
    text = page.read_text(encoding="utf-8")
    for formula in re.findall(r"^```math\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        conf.mathml(formula)
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for formula in re.findall(r"\$([^$]+)\$", text):
        assert "\n" not in formula, f"GitHub draws no formula over two lines: {formula}"
        conf.mathml(formula)


# ---- the estimators --------------------------------------------------------------------------------------------------


def test_every_row_has_a_derivation(script):
    wanted, there = {entry.name for entry in ENTRIES}, set(script.derivations())
    assert wanted <= there, f"docs/derivations.md has no section for {', '.join(sorted(wanted - there))}"
    assert there <= wanted, f"docs/derivations.md: no row of the catalogue is about {sorted(there - wanted)}"


def test_the_pages_of_estimators_are_up_to_date(script):
    pages = script.pages()
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is old: {REMAKE}"
    assert {p for p in pages if p != script.PAGE} == set(script.FOLDER.iterdir()), "a page of no kind"


def test_the_page_of_refusals_is_up_to_date(script):
    assert script.REFUSED.read_text(encoding="utf-8") == script.refused(), f"docs/refused.md is old: {REMAKE}"


def test_the_readmes_table_is_up_to_date(script):
    assert script.README.read_text(encoding="utf-8") == script.readme(), f"README.md's table is old: {REMAKE}"
    assert sum(entry.common for entry in ENTRIES) == 10


def test_every_public_estimator_has_a_section(script):
    headings = set(re.findall(r"^## (\w+)$", "\n".join(script.pages().values()), flags=re.MULTILINE))
    public = {name: vars(ppl_estimators)[name] for name in ppl_estimators.__all__}
    wanted = {n for n, c in public.items() if inspect.isclass(c) and issubclass(c, (Estimator, Baseline))}
    assert wanted <= headings, (
        f"docs/estimators has no section for {', '.join(sorted(wanted - headings))}: "
        f"see the docstring of ppl_estimators/catalogue.py, then {REMAKE}"
    )


def without_code(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), target
