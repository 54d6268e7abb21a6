"""Tables of numbers: in a terminal, in a notebook, in pandas, in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from io import StringIO
from pathlib import Path
from typing import Any

#: of what is printed; notebooks have more room
WIDTH, NOTEBOOK = 80, 110
#: stands before a row that was chosen
CHOSEN = "▸ "


@dataclass(frozen=True)
class Shown:
    """One table: headings and cells as text; ``code`` to paste stands below it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    code: str = ""


def number(x: float | None, digits: int = 3) -> str:
    if x is None:
        return "–"
    if not math.isfinite(x):
        return {math.inf: "∞", -math.inf: "−∞"}.get(x, "nan")
    if x != 0 and not 1e-3 <= abs(x) < 1e6:
        return f"{x:.{digits - 1}e}"
    return f"{float(f'{x:.{digits}g}'):,.10g}"


def ratio(signal_to_noise: float) -> str:
    """What was seen of a signal: none is less than the noise lets see, not nothing."""
    return number(signal_to_noise) if signal_to_noise else "below the noise"


def percent(x: float | None) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{100 * x:.1f}%"


def named(rows: Iterable[Any], attribute: str, name: str, what: str) -> Any:
    """The first row of that name. Raises `KeyError`, which lists those that there are."""
    known: dict[str, Any] = {}
    for row in rows:
        known.setdefault(getattr(row, attribute), row)
    if name not in known:
        raise KeyError(f"no {what} '{name}': {', '.join(known)}")
    return known[name]


class Showable:
    """A result that shows itself. A subclass gives `tables` and `records`."""

    def tables(self) -> list[Shown]:
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """One flat dictionary a row."""
        raise NotImplementedError

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        views: list[Table | Text] = []
        for shown in self.tables():
            title, caption = Text(shown.title), Text(shown.caption)  # not markup: brackets are brackets
            table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            table.title_style, table.caption_style, table.caption_justify = "bold", "dim", "left"
            for i, heading in enumerate(shown.headings):
                number = i > 0 and not any(len(row[i]) > 20 for row in shown.rows)
                table.add_column(heading, justify="right" if number else "left", no_wrap=number, overflow="fold")
            for row in shown.rows:
                table.add_row(*map(Text, row), style="bold" if row[0].startswith(CHOSEN) else "")
            views.append(table)
            if shown.code:
                views.append(Text(f"\n{shown.code}\n", style="bold", overflow="fold"))
        return Group(*views)

    def _printed(self, width: int) -> Any:
        """On a console that shows nothing and remembers all."""
        from rich.console import Console

        console = Console(width=width, record=True, file=StringIO(), force_terminal=False, force_jupyter=False)
        console.print(self)
        return console

    def __str__(self) -> str:
        return self._printed(WIDTH).export_text()

    __repr__ = __str__  # a console shows the table, not every number that is kept

    def _repr_html_(self) -> str:
        return self._printed(NOTEBOOK).export_html(
            inline_styles=True, code_format='<pre style="line-height: 1.2; overflow-x: auto">{code}</pre>'
        )

    def to_pandas(self) -> Any:
        """One row a record, as a `pandas.DataFrame`. Raises ImportError without pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.records())

    def facts(self) -> dict[str, Any]:
        assert is_dataclass(self) and not isinstance(self, type)
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Every number as JSON text (numbers that are not finite as null); written to ``path`` if given."""
        text = json.dumps(_plain(self.facts()), indent=2, ensure_ascii=False, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x


def axes(number_of_rows: int, columns: int = 1, width: float = 5.5) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, of ``width`` inches each. Raises ImportError without matplotlib."""
    try:
        from ppl_estimators.figures import panels
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
    return panels(columns, width, 1.5 + 0.3 * number_of_rows)
