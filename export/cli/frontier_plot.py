"""Accuracy against cost as a picture (matplotlib): single degrees, those that others beat in grey, and cascades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")

_INK, _FRONTIER, _BEATEN, _CASCADE = "#123457", "#4a8fd4", "#a9afb8", "#d9822b"
_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8, "svg.hashsalt": "tocom",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color", "grid.color"), _INK),
}  # fmt: skip
_COLUMNS = 3


@dataclass(frozen=True)
class Mark:
    """A point of a panel.

    Attributes:
        cost: Where it stands from left to right.
        accuracy: Top-1, in percent.
        error: Standard error of `accuracy`; 0 where it is unknown.
        name: Written beside it.
        on_frontier: Whether no other single degree beats it.
        cascade: Whether it is a cascade.
    """

    cost: float
    accuracy: float
    error: float
    name: str
    on_frontier: bool = True
    cascade: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Above it.
        cost: What the cost is, with its unit.
        marks: In rising order of degree, cascades behind them.
    """

    title: str
    cost: str
    marks: tuple[Mark, ...]


def ensure_drawable(file: Path) -> None:
    """Checks, before anything is measured, that a picture can be drawn.

    Raises:
        InputError: matplotlib is not installed, or the file's name says no format that is drawn.
    """
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"a picture must be a file {' or '.join(FORMATS)}, got {one_line(file)}")
    if not file.absolute().parent.is_dir():
        raise InputError(f"a picture must be written into a folder that is there, got {one_line(file)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "pictures are drawn with matplotlib, which is not installed: pip install 'tocom[report]'"
        ) from None


def draw(panels: Sequence[Panel], file: Path) -> Path:
    """Draws panels side by side.

    Args:
        panels: At least one.
        file: Written whole, as what its name says.

    Returns:
        The file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = 2 if len(panels) == 4 else min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.2, 4.0 * columns), 3.3 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid.flat, panels, strict=False):
            _panel(axes, panel)
        named = {
            label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
        kind = file.suffix.lower().removeprefix(".")
        about = {"Date": None} if kind == "svg" else {"Software": None}  # equal pictures are equal files
        write_atomically(file, lambda stream: figure.savefig(stream, format=kind, dpi=130, facecolor="white",
                                                              metadata=about))  # fmt: skip
    return file


def _panel(axes: Axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.cost, ylabel="top-1, %")
    frontier = sorted(
        (mark for mark in panel.marks if mark.on_frontier and not mark.cascade), key=lambda mark: mark.cost
    )
    axes.plot([mark.cost for mark in frontier], [mark.accuracy for mark in frontier], "-", color=_FRONTIER,
              linewidth=1.4, alpha=0.7)  # fmt: skip
    named: set[str] = set()
    for mark in panel.marks:
        if mark.cascade:
            colour, shape, size, label = _CASCADE, "*", 13, "cascade"
        elif mark.on_frontier:
            colour, shape, size, label = _FRONTIER, "o", 6, "degree r, on the frontier"
        else:
            colour, shape, size, label = _BEATEN, "o", 5, "another is faster and as accurate, or it does not pay"
        axes.errorbar(mark.cost, mark.accuracy, yerr=mark.error or None, fmt=shape, color=colour, markersize=size,
                      elinewidth=1, capsize=2, label=None if label in named else label,
                      zorder=4 if mark.cascade else 3)  # fmt: skip
        named.add(label)
        axes.annotate(mark.name, (mark.cost, mark.accuracy), (7, -11) if not mark.cascade else (-8, 4),
                      textcoords="offset points", ha="left" if not mark.cascade else "right", fontsize=8,
                      color=colour)  # fmt: skip
    axes.margins(x=0.14, y=0.1)
