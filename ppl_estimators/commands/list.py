"""`ppl-estimators list`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ppl_estimators.commands.output import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from ppl_estimators.catalogue import Entry

WIDTHS = {"estimator, and when to use it": 38, "sites": 17, "evaluations": 15, "needs": 13, "keeps": 12}
WIDTH = 100


class Format(StrEnum):
    """How the table is printed."""

    table = "table"
    markdown = "markdown"
    json = "json"


def list_estimators(
    family: Annotated[
        str | None,
        typer.Option(help="Only estimators for sites of this family: bernoulli, categorical, onehot, poisson, ..."),
    ] = None,
    unbiased: Annotated[bool, typer.Option("--unbiased", help="Only estimators of the exact gradient.")] = False,
    format: Annotated[Format, typer.Option(help="For reading, for a document, or for a program.")] = Format.table,
) -> None:
    """List every gradient estimator: for which sites, at what price, and when to use it.

    **One row** is what you write in `EstimatorELBO({"site": ...})`, at the guide or at the site. The columns:

    - *sites*: the distributions in the guide that it works for;
    - *evaluations*: runs of model and guide per step and particle. D is the number of dependent elements of a site, C
      of its categories; other letters are the estimator's own arguments;
    - *needs*: what the model must offer. Where that is nothing, it may be a black box;
    - *keeps*: what it trains or averages over the steps; wrap the guide in `with_estimators` then.

    Estimators in the group *biased*, and `NVIL`, return another expectation than the gradient.
    `--format json` says more: the papers, the fewest particles, when to avoid it.

    **Examples**

    - `ppl-estimators list --family bernoulli --unbiased`
    - `ppl-estimators list --format json`
    """
    from ppl_estimators import catalogue

    if family is not None and family not in catalogue.FAMILIES:
        raise CommandError(f"--family {family} is not known. Families: {', '.join(catalogue.FAMILIES)}", code=2)
    chosen = [
        entry
        for entry in catalogue.ENTRIES
        if (family is None or family in entry.families) and (entry.unbiased or not unbiased)
    ]
    if format is Format.json:
        typer.echo(json.dumps([entry.facts() for entry in chosen], indent=2, ensure_ascii=False))
    elif format is Format.markdown:
        typer.echo(catalogue.markdown(chosen))
    else:
        from rich.console import Console

        console = Console()
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
        console.print(_table(chosen))
        console.print(f"\n{catalogue.LEGEND}", style="dim", highlight=False)


def _table(entries: list[Entry]) -> Table:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from ppl_estimators.catalogue import by_kind

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    width_of_call = next(iter(WIDTHS.values()))
    for name, width in WIDTHS.items():
        table.add_column(name, width=width)
    for kind, group in by_kind(entries).items():
        table.add_row(Text(f"\n{kind.value.capitalize()}", style="bold underline"))
        for entry in group:
            fits = " " in entry.call or len(entry.call) <= width_of_call
            call = Text(entry.call if fits else entry.call.replace("(", "(\n    ", 1), style="bold")
            if not entry.unbiased:
                call.append(" biased", style="red")
            use = Padding(Text(entry.shown_use, style="dim"), (0, 0, 0, 2))
            cells = (entry.shown_sites, entry.shown_evaluations, entry.shown_model, entry.shown_keeps)
            table.add_row(Group(call, use), *cells)
    return table
