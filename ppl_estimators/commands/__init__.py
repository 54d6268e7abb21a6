"""The commands of `ppl-estimators`, one file each."""

from __future__ import annotations

import typer

from ppl_estimators.commands import demo, measure
from ppl_estimators.commands import list as list_command
from ppl_estimators.commands.output import CommandError

__all__ = ["CommandError", "app"]

app = typer.Typer(
    name="ppl-estimators",
    help="Gradient estimators for stochastic variational inference in Pyro and NumPyro.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


app.command("demo")(demo.demo)
app.command("list")(list_command.list_estimators)
app.command("report")(measure.report)
app.command("compare")(measure.compare)
app.command("recommend")(measure.recommend)
