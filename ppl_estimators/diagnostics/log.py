"""Where the looks of a `GradientMonitor` go: a CSV file, or TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import EstimatorError

FIGURES = ("mean_norm", "variance", "signal_to_noise")


@dataclass(frozen=True)
class MonitorRow:
    """One parameter or site at one look. ``mean_norm``: ‖E g‖; ``variance``: of one step, summed over the entries."""

    step: int
    kind: str
    name: str
    mean_norm: float
    variance: float
    signal_to_noise: float


class Log(Protocol):
    def write(self, rows: Iterable[MonitorRow], loss: float) -> None: ...


def open_log(where: str | Path | Any | None) -> Log | None:
    """A log for a ``.csv`` path, a folder, or a writer that has ``add_scalar``."""
    if where is None:
        return None
    if callable(getattr(where, "add_scalar", None)):
        return Scalars(where)
    if not isinstance(where, (str, Path)):
        raise EstimatorError(
            f"GradientMonitor(log=...) takes a .csv file, a folder, or a writer with add_scalar, got {where!r}."
        )
    path = Path(where)
    if path.suffix == ".csv":
        return Table(path)
    if path.suffix or path.is_file():
        raise EstimatorError(f"GradientMonitor(log=...): '{path}' is neither a .csv file nor a folder for TensorBoard.")
    return Scalars(_writer(path))


def _writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                f"GradientMonitor(log='{folder}') writes for TensorBoard: pip install tensorboardX. Or name a .csv."
            ) from None
    return SummaryWriter(str(folder))


class Table:
    """One line a row, written at each look; the file starts anew."""

    def __init__(self, path: Path):
        self.path = path
        self.names = [f.name for f in fields(MonitorRow)]
        self._open("w", lambda writer: writer.writeheader())

    def write(self, rows: Iterable[MonitorRow], loss: float) -> None:
        self._open("a", lambda writer: writer.writerows(map(asdict, rows)))

    def _open(self, mode: str, use: Any) -> None:
        try:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                use(csv.DictWriter(file, self.names))
        except OSError as error:
            raise EstimatorError(f"GradientMonitor(log=...): cannot write '{self.path}': {error.strerror}.") from None


class Scalars:
    """Tags such as ``gradient/site/z/variance``, for TensorBoard and whatever writes like it."""

    def __init__(self, writer: Any):
        self.writer = writer

    def write(self, rows: Iterable[MonitorRow], loss: float) -> None:
        rows = list(rows)
        for row in rows:
            for figure in FIGURES:
                self.writer.add_scalar(f"gradient/{row.kind}/{row.name}/{figure}", getattr(row, figure), row.step)
        if rows:
            self.writer.add_scalar("gradient/loss", loss, rows[0].step)
        flush = getattr(self.writer, "flush", None)
        if flush is not None:
            flush()
