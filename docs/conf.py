"""The site: `make docs`, or `python -m sphinx -W docs build/docs`. The pages are Markdown that GitHub shows too."""

from __future__ import annotations

import os
import re
import textwrap

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
html_copy_source = html_show_sourcelink = False
templates_path: list[str] = []

myst_heading_anchors = 3
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


def setup(app) -> None:
    app.connect("source-read", for_the_site)
    app.connect("autodoc-process-docstring", as_restructured_text)
