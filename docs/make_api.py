"""Writes `docs/api.md`: every public name with one line each, and, for the site only, what autodoc makes of it.

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
from ppl_estimators.core.estimator import Estimator
from ppl_estimators.core.objectives import Objective
from ppl_estimators.estimators.baselines.base import Baseline

PAGE = Path(__file__).parent / "api.md"
HEAD = """# API reference

<!-- Made by docs/make_api.py from the docstrings. -->

Every public name. Names that are not here may change without notice.
"""
#: module, what to say of it, its names (None: `__all__`)
MODULES = (
    ("ppl_estimators.pyro", "The ELBO and the guide hook for Pyro. Importing it imports torch and Pyro.", None),
    ("ppl_estimators.numpyro", "The same names for NumPyro. Importing it imports jax and NumPyro.", None),
    (
        "ppl_estimators.diagnostics",
        "How noisy a gradient is, where, and at what price: see [Reading a gradient](diagnostics.md).",
        None,
    ),
    (
        "ppl_estimators.testing",
        "Right gradients, and tests that see wrong ones: see [Testing gradients](testing.md).",
        None,
    ),
    ("ppl_estimators.testing.zoo", "Small hard models, written once for both libraries.", ("CASES", "Case")),
)
CONTRACT = (
    ("ppl_estimators.core.estimator", ("Estimator", "Noise")),
    ("ppl_estimators.core.site", ("Site", "Draw", "Costs", "Local", "Plate")),
    ("ppl_estimators.core.keep", ("Initial", "Network", "Kept")),
    ("ppl_estimators.core.ops", ("Ops",)),
    ("ppl_estimators.estimators.baselines.base", ("Baseline", "Baselined")),
)
CONTRACT_TEXT = """## For estimators of your own

The seam between an estimator and the libraries: [Adding an estimator](adding-an-estimator.md) uses it.
`ppl_estimators.core.families` has the formulas of the discrete families (`threshold`, `score`, ...).
"""


def page() -> str:
    parts = [HEAD, specs()]
    for name, text, names in MODULES:
        module = importlib.import_module(name)
        names = sorted(names or module.__all__, key=lambda n: (n[0].isupper(), n))
        objects = {n: vars(module)[n] for n in names}
        documented = [n for n, found in objects.items() if callable(found)]
        parts.append(f"## {name}\n\n{text}\n\n{table(objects)}\n{reference(name, documented)}")
    parts.append(CONTRACT_TEXT)
    for name, names in CONTRACT:
        module = importlib.import_module(name)
        parts.append(f"### {name}\n\n{table({n: vars(module)[n] for n in names})}\n{reference(name, names)}")
    return "\n".join(parts)


def specs() -> str:
    """The names of the package itself. Estimators have their own page: here stand their arguments."""
    public = {name: vars(ppl_estimators)[name] for name in ppl_estimators.__all__}
    kinds: dict[str, dict[str, Any]] = {"Estimators": {}, "Baselines": {}, "Objectives": {}, "The rest": {}}
    for name, found in public.items():
        base = found if inspect.isclass(found) else object
        if issubclass(base, Estimator) or name == "VarGrad":
            kind = "Estimators"
        elif issubclass(base, Baseline):
            kind = "Baselines"
        else:
            kind = "Objectives" if issubclass(base, Objective) else "The rest"
        kinds[kind][name] = found
    text = "Specs, and no library: importing it imports neither torch nor jax.\n"
    parts = [f"## ppl_estimators\n\n{text}"]
    for kind, objects in kinds.items():
        linked = kind in ("Estimators", "Baselines")
        parts.append(f"### {kind}\n\n{table(objects, linked=linked)}")
        if not linked:
            parts[-1] += "\n" + reference("ppl_estimators", sorted(objects))
    return "\n".join(parts)


def table(objects: dict[str, Any], *, linked: bool = False) -> str:
    rows = ["| name | what it is |", "|---|---|"]
    for name, found in sorted(objects.items(), key=lambda item: item[0].lower()):
        call = f"`{name}{arguments(found) if linked else ''}`"
        target = "leaveoneout" if name == "VarGrad" else name.lower()
        rows.append(f"| {f'[{call}](estimators.md#{target})' if linked else call} | {summary(name, found)} |")
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}")
