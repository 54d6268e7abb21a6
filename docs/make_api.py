"""Writes `docs/api.md` and a page in `docs/api` for each module: every public name with one line, and, for the site
only, what autodoc makes of it.

python docs/make_api.py
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import ppl_estimators
from ppl_estimators.catalogue import ENTRIES, Kind
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.core.objectives import Objective
from ppl_estimators.estimators.baselines.base import Baseline

DOCS = Path(__file__).parent
MADE = "<!-- Made by docs/make_api.py from the docstrings. -->"
#: page, title, what to say of it
HEADS = {
    "specs": (
        "ppl_estimators",
        "Specs, and no library: importing it imports neither torch nor jax. Estimators and baselines: "
        "[the estimators](../estimators.md) has a section on each.",
    ),
    "pyro": ("ppl_estimators.pyro", "The ELBO and the guide hook for Pyro. Importing it imports torch and Pyro."),
    "numpyro": ("ppl_estimators.numpyro", "The same names for NumPyro. Importing it imports jax and NumPyro."),
    "diagnostics": (
        "ppl_estimators.diagnostics",
        "How noisy a gradient is, where, and at what price: see [Reading a gradient](../diagnostics.md).",
    ),
    "testing": (
        "ppl_estimators.testing",
        "Right gradients, and tests that see wrong ones: see [Testing gradients](../testing.md).",
    ),
    "contract": (
        "For estimators of your own",
        "The seam between an estimator and the libraries: [Adding an estimator](../adding-an-estimator.md) uses it. "
        "`ppl_estimators.core.families` has the formulas of the discrete families (`threshold`, `score`, ...).",
    ),
}
ZOO = ("ppl_estimators.testing.zoo", ("CASES", "Case"))
CONTRACT = (
    ("ppl_estimators.core.estimator", ("Estimator", "Noise")),
    ("ppl_estimators.core.site", ("Site", "Draw", "Costs", "Local", "Plate")),
    ("ppl_estimators.core.keep", ("Initial", "Network", "Kept")),
    ("ppl_estimators.core.ops", ("Ops",)),
    ("ppl_estimators.estimators.baselines.base", ("Baseline", "Baselined")),
)


def pages() -> dict[str, str]:
    """Text by path under `docs`."""
    found = {"api.md": index()}
    for page, (title, text) in HEADS.items():
        if page == "specs":
            body = specs()
        elif page == "contract":
            body = "\n".join(f"## {name}\n\n{documented(name, names)}" for name, names in CONTRACT)
        else:
            body = documented(title, public(title))
        if page == "testing":
            name, names = ZOO
            body += f"\n## {name}\n\nSmall hard models, written once for both libraries.\n\n{documented(name, names)}"
        found[f"api/{page}.md"] = f"# {title}\n\n{MADE}\n\n{text}\n\n{body}"
    return found


def index() -> str:
    """The names of every page, and where they are."""
    parts = ["# API reference", MADE, "Every public name. Names that are not here may change without notice."]
    for page, (title, text) in HEADS.items():
        if page == "contract":
            names = [name for _, some in CONTRACT for name in some]
        else:
            names = public(title)
        listed = ", ".join(f"`{name}`" for name in names)
        parts.append(f"## [{title}](api/{page}.md)\n\n{text.replace('](../', '](')}\n\n{listed}.")
    toctree = "\n".join(f"api/{page}" for page in HEADS)
    return "\n\n".join([*parts, f"<!-- site\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n-->\n"])


def public(module: str) -> list[str]:
    return sorted(importlib.import_module(module).__all__, key=lambda n: (n[0].isupper(), n.lower()))


def documented(module: str, names: Any) -> str:
    objects = {name: vars(importlib.import_module(module))[name] for name in names}
    return f"{table(objects)}\n{reference(module, [name for name, found in objects.items() if callable(found)])}"


def specs() -> str:
    """The names of the package itself. Estimators have their own page: here stand their arguments."""
    kinds: dict[str, dict[str, Any]] = {"Estimators": {}, "Baselines": {}, "Objectives": {}, "The rest": {}}
    for name, found in ((name, vars(ppl_estimators)[name]) for name in ppl_estimators.__all__):
        base = found if inspect.isclass(found) else object
        if issubclass(base, Estimator) or name == "VarGrad":
            kind = "Estimators"
        elif issubclass(base, Baseline):
            kind = "Baselines"
        else:
            kind = "Objectives" if issubclass(base, Objective) else "The rest"
        kinds[kind][name] = found
    parts = []
    for kind, objects in kinds.items():
        linked = kind in ("Estimators", "Baselines")
        parts.append(f"## {kind}\n\n{table(objects, linked=linked)}")
        if not linked:
            parts[-1] += "\n" + reference("ppl_estimators", sorted(objects))
    return "\n".join(parts)


def table(objects: dict[str, Any], *, linked: bool = False) -> str:
    rows = ["| name | what it is |", "|---|---|"]
    pages = {"VarGrad": Kind.score.page, **{entry.name: entry.kind.page for entry in ENTRIES}}
    for name, found in sorted(objects.items(), key=lambda item: item[0].lower()):
        call = f"`{name}{arguments(found) if linked else ''}`"
        target = f"{pages[name]}#{'leaveoneout' if name == 'VarGrad' else name.lower()}" if linked else ""
        rows.append(f"| {f'[{call}](../{target})' if linked else call} | {summary(name, found)} |")
    return "\n".join(rows) + "\n"


def arguments(found: Any) -> str:
    """The signature without types."""
    parameters = inspect.signature(found).parameters.values()
    return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))


def summary(name: str, found: Any) -> str:
    """The first sentence of the docstring, as Markdown."""
    if isinstance(found, ModuleType) or callable(found):
        text = " ".join(inspect.getdoc(found).split("\n\n")[0].split())
    else:
        text = f"`{type(found).__name__}` of {len(found)}: the programs by name."
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text)[0]
    parts = first.replace("``", "`").replace("|", "\\|").split("`")
    parts[::2] = [part.replace("_", "\\_").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def reference(module: str, names: Any) -> str:
    """For the site: see `for_the_site` in conf.py."""
    directives = []
    for name in names:
        found = vars(importlib.import_module(module))[name]
        kind = "autoclass" if inspect.isclass(found) else "autofunction"
        members = "\n   :members:" if kind == "autoclass" and module != "ppl_estimators" else ""
        directives.append(f".. {kind}:: {module}.{name}{members}")
    return "<!-- site\n```{eval-rst}\n" + "\n".join(directives) + "\n```\n-->\n" if directives else ""


def main() -> None:
    for path, text in pages().items():
        (DOCS / path).parent.mkdir(exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
    print(f"Wrote {', '.join(pages())}")


if __name__ == "__main__":
    main()
