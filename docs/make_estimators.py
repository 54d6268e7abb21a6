"""Writes `docs/estimators.md`, the pages below it and the README's short table from `ppl_estimators.catalogue`.

    python docs/make_estimators.py

Formulas, requirements and advice are those of the docstrings, derivations those of `docs/derivations.md`. A test checks
that what is committed is what this script makes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppl_estimators import EstimatorError, ImportanceWeighted
from ppl_estimators.catalogue import COLUMNS, ENTRIES, LEGEND, Entry, Kind, by_kind, markdown, site_of
from ppl_estimators.citations import REFERENCES

DOCS = Path(__file__).parent
PAGE, FOLDER, REFUSED = DOCS / "estimators.md", DOCS / "estimators", DOCS / "refused.md"
README = DOCS.parent / "README.md"
START, END = "<!-- estimators:start -->", "<!-- estimators:end -->"

MADE = "<!-- Made by docs/make_estimators.py from docstrings, ppl_estimators/catalogue.py and docs/derivations.md. -->"

HEAD = """# The estimators

{made}

{legend} The column *keeps* names what is trained or averaged over the steps; the guide hook `with_estimators` declares
it. `ppl-estimators list` prints the table in a terminal, filtered if you like.

"""

NOTATION = r"""
## Notation

In the formulas $f$ is the downstream cost of a site, as a number: the part of the ELBO that the site can move. $q$ is
the law of its value, $s = \nabla \log q$ its score, $\sigma$ the logistic function, $H$ the step from a relaxed to a
hard value; what stands behind $\approx$ is the estimate. At Bernoulli sites $b$ is the value, $a$ the logit,
$p = \sigma(a)$ and $q = 1 - p$. An index $i$ names one of the dependent elements of a site. The derivations use the
identity $\nabla\, \mathbb{E}_q[f] = \mathbb{E}_q[f\, \nabla \log q]$ and little else.

`ppl_estimators.citation(...)` gives the BibTeX of the papers behind what you use.
"""

SITE = """
<!-- site
```{{toctree}}
:hidden:

{pages}
```
-->
"""

PART = """# {title}

{made}

One section for each; [the whole table](../estimators.md), [the notation](../estimators.md#notation).
"""


def derivations() -> dict[str, str]:
    """The sections of `docs/derivations.md` by class name."""
    sections = re.split(r"^## ", (DOCS / "derivations.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name.strip(): text.strip() for name, _, text in (section.partition("\n") for section in sections)}


def sections() -> dict[str, list[Entry]]:
    """The rows of each section: those about one class."""
    found: dict[str, list[Entry]] = {}
    for group in by_kind(ENTRIES).values():
        for entry in sorted(group, key=lambda entry: entry.name != "Reinforce"):  # the others refer to it
            found.setdefault(entry.name, []).append(entry)
    return found


def pages() -> dict[Path, str]:
    """The page with the table, and one of sections for each kind."""
    linked = {**COLUMNS, "estimator": lambda entry: f"[`{entry.call}`]({place(entry.name)})"}
    kinds: dict[Kind, list[str]] = {}
    texts = derivations()
    for name, entries in sections().items():
        if name not in texts:
            raise SystemExit(f"docs/derivations.md has no section '## {name}': say why {name} is unbiased, or is not.")
        kinds.setdefault(entries[0].kind, []).append(section(entries, texts[name]))
    toctree = SITE.format(pages="\n".join(kind.page for kind in kinds))
    table = HEAD.format(made=MADE, legend=LEGEND) + markdown(ENTRIES, linked) + "\n"
    found = {PAGE: wrapped(table + NOTATION) + toctree}
    for kind, parts in kinds.items():
        title = kind.value[0].upper() + kind.value[1:]
        found[DOCS / kind.page] = wrapped(PART.format(made=MADE, title=title) + "".join(parts))
    return found


def place(name: str) -> str:
    """Where the section of a class is, seen from `docs`."""
    return f"{sections()[name][0].kind.page}#{name.lower()}"


def section(entries: list[Entry], derivation: str) -> str:
    entry = entries[0]
    summary, requires, advice, reference = split(entry.docstring)
    formula, _, derivation = derivation.rpartition("\n\n")
    parts = [f"\n## {entry.name}\n", prose(summary)]
    if formula:
        parts.append(formula)
    if requires:
        parts.append(f"**Requires** {prose(requires)}")
    parts.append("\n".join(facts(row) for row in entries))
    title = "Why it is unbiased." if entry.unbiased else "Where the bias comes from."
    if entry.kind is Kind.composition:
        title = "Why it is unbiased if its parts are."
    parts.append(f"**{title}** {prose(derivation)}")
    if advice:
        parts.append(f"**When to use it, and how.** {prose(advice)}")
    if entry.aliases:
        parts.append(f"Also written {', '.join(f'`{alias}()`' for alias in entry.aliases)}.")
    if reference:
        keys = ", ".join(f"`{key}`" for key in entry.papers)
        parts.append(f"**Reference.** {linked_arxiv(reference)} BibTeX: {keys}.")
    return "\n\n".join(parts) + "\n"


def facts(entry: Entry) -> str:
    """One row in a sentence."""
    said = [f"sites: {entry.shown_sites}", f"evaluations: {entry.shown_evaluations}"]
    alone = not entry.example.alternatives(site_of(entry.families[0])).own_law
    if not alone and entry.evaluations != "1" and entry.kind is not Kind.composition:
        said[-1] += ", which sites that do not depend on each other share"
    said += [f"needs of the model: {entry.shown_model}", f"keeps: {entry.shown_keeps}".replace("–", "nothing")]
    if entry.particles > 1:
        said.append(f"particles: {entry.particles} or more")
    advice = f" Use: {entry.use}." if entry.use else " Not recommended:"
    against = f"{' Avoid:' if entry.use else ''} {entry.avoid}." if entry.avoid else ""
    return f"- `{entry.call}`: {'; '.join(said)}.{advice}{against}"


def split(docstring: str) -> tuple[str, str, str, str]:
    """Summary, requirements, advice and reference of a docstring in the house form. Its formula is plain text, for
    `help()`: the page has that of `docs/derivations.md`. What it is for and not for is said in the row."""
    docstring = re.sub(r"^(For|Not for|Not advised) {2,}.*\n?", "", docstring, flags=re.MULTILINE)
    blocks = [block.strip() for block in docstring.split("\n\n") if block.strip()]
    summary = " ".join(blocks[0].split())
    formula = next((block for block in blocks if block.startswith("Approximates")), "")
    reference = next((block for block in blocks if block.startswith("Reference:")), "")
    skipped = (blocks[0], formula, reference)
    advice = [block for block in blocks if block not in skipped and not block.startswith(">>>")]
    requires = " ".join(formula.partition("Requires")[2].split())
    shown = re.sub(r" \[\w+\]", "", " ".join(reference.removeprefix("Reference:").split()))  # without BibTeX keys
    return summary, requires, "\n\n".join(advice), shown


def prose(text: str) -> str:
    """Text as Markdown: one backtick around code; outside of code and formulas no emphasis and no link."""
    parts = re.split(r"(`[^`]*`|\$[^$]*\$)", text.replace("``", "`"))
    parts[::2] = [part.replace("_", "\\_").replace("](", "]\\(") for part in parts[::2]]
    return "".join(parts)


def linked_arxiv(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def wrapped(text: str) -> str:
    """Paragraphs and list items refilled to 120 columns; tables, headings and formulas as they are."""
    lines, fenced, found = [], False, []

    def flush() -> None:
        if lines:
            indent = "  " if lines[0].startswith("- ") else ""
            text = re.sub(r"\$[^$]*\$", lambda maths: maths[0].replace(" ", "\0"), " ".join(map(str.strip, lines)))
            filled = textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            found.extend(line.replace("\0", " ") for line in filled)
            lines.clear()

    for line in text.splitlines():
        fence = line.startswith("```")
        if fenced or fence or not line.strip() or line.startswith(("|", "#", "<!--", "    ")):
            flush()
            if line.strip() or fenced or (found and found[-1]):
                found.append(line)
            fenced ^= fence
        else:
            if line.startswith("- "):
                flush()
            lines.append(line)
    flush()
    return "\n".join(found).strip() + "\n"


def readme() -> str:
    """The README with its short table made anew."""
    short = {
        name: COLUMNS[name] for name in ("estimator", "sites", "evaluations", "needs of the model", "keeps", "use it")
    }
    rows = [f"| {' | '.join(column(entry) for column in short.values())} |" for entry in ENTRIES if entry.common]
    table = "\n".join([f"| {' | '.join(short)} |", "|---" * len(short) + "|", *rows])
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table}\n{END}{after}"


def refused() -> str:
    """`docs/refused.md` with its table made anew: where each estimator is refused, by its own word."""
    columns = ("estimator", "other sites than", "in a `scan`", "particles below", "below it", "bounds")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in ENTRIES:
        site = site_of(entry.families[0])
        relaxed = entry.example.relaxations(site)
        cells = [
            "" if entry.shown_sites == "any" else entry.shown_sites,
            "" if allowed(entry.example.check, replace(site, time=True), 100) else "refused",
            "" if entry.particles == 1 else str(entry.particles),
            "refused" if relaxed.count and relaxed.downstream == "relaxed" else "",
            "" if allowed(ImportanceWeighted().check, site, entry.example, 100) else "refused",
        ]
        if any(cells):
            rows.append(f"| [`{entry.call}`]({place(entry.name)}) | {' | '.join(cells)} |")
    before, start, rest = REFUSED.read_text(encoding="utf-8").partition("<!-- refused:start -->\n")
    _, end, after = rest.partition("<!-- refused:end -->")
    return before + start + "\n".join(rows) + "\n" + end + after


def allowed(check: Callable[..., None], *args: Any) -> bool:
    try:
        check(*args)
    except EstimatorError:
        return False
    return True


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    REFUSED.write_text(refused(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    print(f"Wrote {PAGE.name} ({len(sections())} sections) and the table of {README.name}; papers: {REFERENCES.name}")


if __name__ == "__main__":
    main()
