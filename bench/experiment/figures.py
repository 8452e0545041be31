"""The pictures: accuracy against degree, accuracy against latency, and gaps carried between tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.experiment.statistics import Gain

PLAIN, COMPENSATED = {"color": "#b5651d", "marker": "o"}, {"color": "#1f5fa8", "marker": "s"}
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
          "legend.frameon": False}  # fmt: skip


def draw_degrees(panels: Mapping[str, Mapping[int, Gain]], file: Path) -> None:
    """One panel per source degree: top-1 against the target degree, with and without the compensator.

    Args:
        panels: Title -> target degree -> gain. The band is the gain's 95% interval, drawn on the compensated line.
        file: PNG to write.
    """
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(3.1 * len(panels), 3), sharey=True, squeeze=False)
        for axis, (title, gains) in zip(axes[0], panels.items(), strict=True):
            degrees = sorted(gains)
            plain = [gains[degree].plain for degree in degrees]
            axis.plot(degrees, plain, label="as fine-tuned", **PLAIN)
            axis.plot(degrees, [gains[degree].compensated for degree in degrees], label="with ToCom", **COMPENSATED)
            low = [gains[degree].plain + gains[degree].low for degree in degrees]
            high = [gains[degree].plain + gains[degree].high for degree in degrees]
            axis.fill_between(degrees, low, high, color=COMPENSATED["color"], alpha=0.15, linewidth=0)
            axis.set(title=title, xlabel="target degree r", xticks=degrees[::2])
        axes[0][0].set_ylabel("top-1, %")
        axes[0][0].legend(loc="lower left")
        _write(figure, file)


def draw_frontier(curves: Mapping[str, Sequence[tuple[float, float, float]]], title: str, file: Path) -> None:
    """Accuracy against latency.

    Args:
        curves: Method -> (ms, top-1 plain, top-1 compensated) per degree.
        title: Above the picture.
        file: PNG to write.
    """
    with pyplot.rc_context(_STYLE):
        figure, axis = pyplot.subplots(figsize=(5, 3.4))
        for (method, points), line in zip(curves.items(), ("-", "--"), strict=False):
            times, plain, compensated = zip(*sorted(points), strict=True)
            axis.plot(times, plain, line, label=f"{method}, as fine-tuned", **PLAIN, markersize=4)
            axis.plot(times, compensated, line, label=f"{method}, with ToCom", **COMPENSATED, markersize=4)
        axis.set(title=title, xlabel="ms", ylabel="top-1, %")
        axis.legend()
        _write(figure, file)


def draw_transfer(table: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A square per pair of tasks: points gained on one task by the gap measured on another."""
    tasks = list(table)
    gains = [[table[onto][origin] - table[onto]["none"] for origin in tasks] for onto in tasks]
    with pyplot.rc_context({**_STYLE, "axes.grid": False}):
        figure, axis = pyplot.subplots(figsize=(4.2, 3.4))
        limit = max(abs(gain) for row in gains for gain in row) or 1
        image = axis.imshow(gains, cmap="RdBu", vmin=-limit, vmax=limit)
        _number(axis, gains)
        axis.set(xticks=range(len(tasks)), yticks=range(len(tasks)), xticklabels=tasks, yticklabels=tasks,
                 xlabel="gap measured on", ylabel="added on")  # fmt: skip
        figure.colorbar(image, label="points of top-1")
        _write(figure, file)


def _number(axis: Axes, values: Sequence[Sequence[float]]) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axis.text(column, row, f"{value:+.1f}", ha="center", va="center")


def _write(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
