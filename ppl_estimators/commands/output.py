"""How a command ends: with a result, shown and saved, or with one line and an exit code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer


class CommandError(Exception):
    """The message says what could not be done, why, and what would help.

    ``code``: 1, or 2 where the command line is at fault.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def folder(out: Path) -> None:
    """Make it, before the work begins."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to --out {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise CommandError(f"cannot write to --out {out}: Permission denied")


def show(result: Any, out: Path | None, numbers: str, figure: str, *, json: bool = False) -> None:
    """Print a `Showable`, as JSON if asked for; save its ``numbers`` (JSON) and its ``figure`` (PNG) in a folder."""
    from rich.console import Console

    if json:
        typer.echo(result.to_json())
    else:
        Console().print(result)
    if out is not None:
        result.to_json(out / f"{numbers}.json")
        result.plot().savefig(out / f"{figure}.png", dpi=150)
