"""Puts numbers of `benchmarks/results` where the docs show them: the tables of the pages below, between their
`<!-- results: ... -->` comments, and the demo's table in the README.

    python docs/make_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from ppl_estimators.demo.experiment import read

DOCS = Path(__file__).parent
PAGES = tuple(DOCS / f"{name}.md" for name in ("performance", "growth", "default", "objectives", "using"))
README = DOCS.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"
DEMO = RESULTS / "demo.json"


def page(path: Path) -> str:
    """The page with the tables as they are now."""
    return re.sub(
        r"(<!-- results: (\S+) -->\n).*?(<!-- /results -->)",
        lambda found: f"{found[1]}{tables(RESULTS / found[2])}{found[3]}",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


def tables(path: Path) -> str:
    """A results file as a part of a page: its headings one level down."""
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    rest = re.sub(r"^## ", "### ", rest.strip(), flags=re.MULTILINE)
    return f"{title.removeprefix('# ')}.\n\n{rest}\n"


def readme() -> str:
    """The README with the NumPyro rows of the demo as they are now."""
    experiment = read(DEMO)
    text = f"One run, {experiment.settings.steps['numpyro']:,} steps of NumPyro's unmodified `SVI`"
    rows = []
    for result in (r for r in experiment.results if r.backend == "numpyro"):
        label = result.label if "(stock)" in result.label else re.sub(r"^([^,]*\))", r"`\1`", result.label)
        elbo = f"{result.held_out_elbo:.2f}".replace("-", "−")
        variance = f"{float(f'{result.gradient_variance:.3g}'):,.0f}"
        rows.append(f"| {label} | {elbo} | {variance} | {result.milliseconds_per_step:.2f} |")
    before, start, rest = README.read_text(encoding="utf-8").partition("<!-- demo:start -->")
    shown, end, after = rest.partition("<!-- demo:end -->")
    shown = re.sub(r"One run, .*? `SVI`", lambda _: text, shown)
    shown = re.sub(r"(\|---\|.*\n)(\|.*\n)+", lambda found: found[1] + "\n".join(rows) + "\n", shown)
    return before + start + shown + end + after


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    print(f"Wrote the tables of {', '.join(p.name for p in PAGES)} and of the demo in {README.name}")
