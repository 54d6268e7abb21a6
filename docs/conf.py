"""The site: `make docs`, or `python -m sphinx -W docs build/docs`. The pages are Markdown that GitHub shows too."""

from __future__ import annotations

import os
import re
import textwrap

import docutils.nodes
from latex2mathml.converter import convert
from sphinx.errors import SphinxError

import ppl_estimators

project = "ppl_estimators"
author = copyright = "the authors of ppl_estimators"
release = version = ppl_estimators.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["derivations.md"]  # a part of estimators.md
html_theme = "furo"
pygments_dark_style = "monokai"
html_title = "ppl_estimators"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = html_show_sourcelink = False
templates_path: list[str] = []

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_fence_as_directive = {"math"}  # GitHub, too, renders $...$ and ```math
html_math_renderer = "mathml"
# Notebooks are committed with their outputs: NOTEBOOKS=force runs them anew.
nb_execution_mode = os.environ.get("NOTEBOOKS", "off")
nb_execution_raise_on_error = True
nb_execution_timeout = 600

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"


def for_the_site(app: object, docname: str, source: list[str]) -> None:
    """What stands in a comment `<!-- site ... -->` is for the site only: GitHub would show directives as code. Markdown
    that is no page of the site is linked as a file."""
    text = re.sub(r"<!-- site\n(.*?)\n-->", r"\1", source[0], flags=re.DOTALL)
    source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)\)", r"](path:\1)", text) if "/" not in docname else text


def as_restructured_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: one or two backticks around code, formulas indented."""
    blocks = []
    for block in "\n".join(lines).strip("\n").split("\n\n"):
        if block.startswith(">>>"):
            blocks.append(block.replace("  # doctest: +SKIP", "").replace("\n... # doctest: +SKIP", ""))
        elif block.startswith(("Approximates", "  ")):
            blocks.append("::\n\n" + textwrap.indent(textwrap.dedent(block), "    "))
        else:
            text, *rest = re.split(r"(`+)(.+?)\1", block.replace("\n    ", "\n"), flags=re.DOTALL)
            parts = [escaped(text)]
            for code, after in zip(rest[1::3], rest[2::3], strict=True):
                parts += [f"``{' '.join(code.split())}``\\ ", escaped(after)]
            blocks.append("".join(parts))
    lines[:] = [*"\n\n".join(blocks).split("\n"), ""]


def escaped(text: str) -> str:
    return re.sub(r"([\\*_|])", r"\\\1", text)


def mathml(formula: str, **options: str) -> str:
    # Names of functions stand apart from what follows them, unless that is a bracket.
    name, space = r"<m[io]>(log|exp|min|max|argmin|softmax|relu)</m[io]>", '<mo lspace="0.17em" rspace="{}">\\1</mo>'
    found = re.sub(name + r"(?=<mo[^>]*>(?:\(|&#x00028;))", space.format("0"), convert(formula, **options))
    found = re.sub(name, space.format("0.17em"), found)
    if re.search(r">(\\\w+|&)<", found):
        raise SphinxError(f"not known to latex2mathml: {formula}")
    return found


def inline_maths(self, node: docutils.nodes.math) -> None:
    """As MathML, which browsers draw by themselves: no script, nothing fetched, copied as text."""
    self.body.append(f'<span class="math">{mathml(node.astext())}</span>')
    raise docutils.nodes.SkipNode


def displayed_maths(self, node: docutils.nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), display="block")}</div>')
    raise docutils.nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline_maths, None), (displayed_maths, None))
    app.connect("source-read", for_the_site)
    app.connect("autodoc-process-docstring", as_restructured_text)
