"""The pictures of the load test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

_COLORS = ("#b5651d", "#4a8f4a", "#1f5fa8")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
          "legend.frameon": False}  # fmt: skip


def draw_load(curves: Mapping[str, Sequence[tuple[float, float, float]]], objective_ms: float, file: Path) -> None:
    """p99 against offered load, and below it the share refused.

    Args:
        curves: Contender -> (load as a multiple, p99 in ms, share refused), by rising load.
        objective_ms: Drawn as a line.
        file: PNG to write.
    """
    with pyplot.rc_context(_STYLE):
        figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(6, 4.6), sharex=True, height_ratios=(2, 1))
        for (name, points), color in zip(curves.items(), _COLORS, strict=False):
            loads, p99, refused = zip(*points, strict=True)
            upper.plot(loads, p99, "o-", color=color, label=name, markersize=4)
            lower.plot(loads, [100 * share for share in refused], "o-", color=color, markersize=4)
        upper.axhline(objective_ms, color="#888888", linestyle="--", linewidth=1, label="objective")
        upper.set(ylabel="p99 of what is answered, ms", ylim=(0, None))
        lower.set(ylabel="refused, %", xlabel="offered load, times what r=0 sustains", ylim=(0, None))
        upper.legend()
        _write(figure, file)


def draw_step(timeline: Sequence[Mapping[str, Any]], phases: Sequence[Sequence[float]], objective_ms: float,
              file: Path) -> None:  # fmt: skip
    """Latency and degree over time, through a step of load.

    Args:
        timeline: See `bench.serving.accounts.over_time`.
        phases: (rate, seconds).
        objective_ms: Drawn as a line.
        file: PNG to write.
    """
    with pyplot.rc_context(_STYLE):
        figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(6, 4.6), sharex=True)
        seconds = [each["at_s"] for each in timeline]
        for key, style in (("p50_ms", "-"), ("p99_ms", ":")):
            upper.plot(seconds, [_number(each[key]) for each in timeline], style, color=_COLORS[2], label=key[:3])
        upper.axhline(objective_ms, color="#888888", linestyle="--", linewidth=1, label="objective")
        upper.set(ylabel="latency, ms", ylim=(0, None))
        upper.legend()
        lower.step(seconds, [_number(each["degree"]) for each in timeline], where="post", color=_COLORS[2])
        lower.set(ylabel="degree r, mean of a second", xlabel="seconds", ylim=(-0.5, None))
        start = 0.0
        for rate, length in phases:
            for axis in (upper, lower):
                axis.axvline(start, color="#bbbbbb", linewidth=0.8)
            lower.text(start + 0.3, lower.get_ylim()[1], f"{rate:.0f}/s", va="top")
            start += length
        _write(figure, file)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _write(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=140, metadata={"Software": None})
    pyplot.close(figure)
