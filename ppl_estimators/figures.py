"""The look of every figure: no background, mid-grey letters and axes, so that one file reads on light and dark pages.

Importing this imports matplotlib.
"""

from __future__ import annotations

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy import ndarray

#: contrast 4.3 both on white and on the pages' #131416, the best that one grey can do
INK = "#777a80"
#: of grid and guiding lines
FAINT = "#777a8040"
#: Okabe and Ito's, told apart by everyone; the two light ones a little darker, for white pages
ORANGE, SKY, GREEN, BLUE, VERMILLION, PINK, OLIVE, BROWN = COLOURS = (
    "#d99400",
    "#3ea3dc",
    "#009e73",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#a89a00",
    "#8c6d46",
)


class Picture(Figure):
    """A figure that notebooks show, pyplot or not."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image)
        return image.getvalue()


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    return Picture(figsize=(width, height), dpi=130, layout=layout, facecolor="none")


def panels(columns: int, width: float = 4.5, height: float = 4.6, rows: int = 1) -> tuple[Figure, ndarray]:
    """A figure and its axes, row by row; ``width`` and ``height`` of one in inches. Nine inches, which is the page's
    width, keep letters of 8.5 points readable there."""
    figure = blank(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        quiet(axis)
    return figure, axes


def quiet(axis: Axes) -> None:
    """Axes in the house style."""
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(which="both", color=INK, labelcolor=INK, labelsize=9)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(INK)
    axis.title.set_color(INK)
    axis.grid(color=FAINT, linewidth=1)
    axis.set_axisbelow(True)


def heading(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", color=INK, fontweight="bold", fontsize=9.5)
