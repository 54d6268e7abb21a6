"""The console script: one-line errors and exit codes around the commands.

0 done, 1 it could not be done, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

PROGRAM = "ppl-estimators"
NEEDED = ("typer", "rich")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` are those of the process by default. Returns the exit code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _complain(f"the command line needs {' and '.join(missing)}: pip install {' '.join(missing)}")

    from typer import TyperException

    from ppl_estimators.commands import CommandError, app

    try:
        # Not typer's own mode: that prints a usage error as a box of many lines.
        code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except TyperException as error:
        return _complain(f"{error.format_message().rstrip('.')}. Try '{PROGRAM} --help'.", error.exit_code)
    except CommandError as error:
        return _complain(str(error), error.code)
    return _complain("interrupted", INTERRUPTED) if code == INTERRUPTED else code or 0


def _complain(message: str, code: int = 1) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
