"""The plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import LogLocator

from bench.quantize.comparison import Ratio, Record, mean_of
from bench.quantize.protocol import TITLES
from bench.quantize.selection import values, where

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
          "legend.frameon": False}  # fmt: skip


def draw_default(records: Sequence[Record], bar: float, file: Path) -> None:
    """INT8's change in top-1 of every network and the mean, with the bar; and the divergence of every format."""
    with pyplot.rc_context(_STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
        int8 = where(records, format="int8")
        at = values(int8, "degree")
        for network in values(int8, "network"):
            own = where(int8, network=network)
            left.plot([each["degree"] for each in own], [each["change"] for each in own], color="0.7", linewidth=0.8)
        means = [mean_of(where(int8, degree=degree)) for degree in at]
        left.errorbar(at, [each.mean for each in means], [2 * each.error for each in means], color="#1f5fa8",
                      marker="o", markersize=4, capsize=2, label="mean, 2 standard errors")  # fmt: skip
        left.axhline(-bar, color="#b5651d", linestyle="--", linewidth=1, label=f"{bar} points")
        left.set(title="INT8", xlabel="degree r", ylabel="change in top-1, points", xticks=at)
        left.legend(loc="upper left", fontsize=7)
        for form in values(records, "format"):
            own = where(records, format=form)
            degrees = values(own, "degree")
            nats = [np.mean([each["divergence"] for each in where(own, degree=degree)]) for degree in degrees]
            right.plot(degrees, nats, marker="o", markersize=3, label=TITLES[form])
        right.set(title="divergence from float32", xlabel="degree r", ylabel="nats", yscale="log", xticks=at)
        right.legend(fontsize=7)
        _write(figure, file)


def draw_methods(ratios: Mapping[str, Mapping[str, Ratio]], file: Path) -> None:
    """Format -> method -> divergence over the default's: a panel for each format."""
    names = list(dict.fromkeys(name for each in ratios.values() for name in each if name != "default"))
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(ratios), figsize=(3 * len(ratios) + 1.5, 3.6), sharey=True, squeeze=False)
        for axis, (form, found) in zip(axes[0], ratios.items(), strict=True):
            for place, name in enumerate(names):
                if name in found:
                    ratio = found[name]
                    ends = None if math.isinf(ratio.high) else [[ratio.mean - ratio.low], [ratio.high - ratio.mean]]
                    axis.errorbar([ratio.mean], [place], xerr=ends, color="#1f5fa8", marker="o", capsize=2)
            axis.axvline(1, color="#b5651d", linestyle="--", linewidth=1)
            axis.set(title=TITLES[form], xlabel="divergence / default's", xscale="log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].invert_yaxis()
        _write(figure, file)


def draw_ranges(records: Sequence[Record], relative: Callable[..., float], file: Path) -> None:
    """A panel for each kind of product: magnitudes against the degree, relative to r = 0."""
    kinds, degrees = values(records, "kind"), values(records, "degree")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(kinds), figsize=(2.6 * len(kinds), 3), sharey=True, squeeze=False)
        for axis, kind in zip(axes[0], kinds, strict=True):
            for weights, color in zip(values(records, "weights"), ("#1f5fa8", "#b5651d"), strict=False):
                these = where(records, kind=kind, weights=weights)
                for key, line, title in (("largest", "-", "largest"), ("percentile", ":", "99.99%")):
                    shown = [relative(these, degree, key) for degree in degrees]
                    axis.plot(degrees, shown, line, color=color, marker="o", markersize=3, label=f"{weights}, {title}")
            axis.set(title=f"into {kind}", xlabel="degree r", xticks=degrees)
        axes[0][0].set_ylabel("magnitude / at r = 0")
        axes[0][-1].legend(fontsize=6)
        _write(figure, file)


def draw_products(records: Sequence[Record], file: Path) -> None:
    """The divergence of each product alone, a line for each degree; mean over networks."""
    names = sorted(values(records, "product"), key=_place)
    with pyplot.rc_context(_STYLE):
        figure, axis = pyplot.subplots(figsize=(8, 3.6))
        for degree in values(records, "degree"):
            nats = [np.mean([each["divergence"] for each in where(records, degree=degree, product=name)])
                    for name in names]  # fmt: skip
            axis.plot(range(len(names)), nats, marker="o", markersize=4, linewidth=0.8, label=f"r = {degree}")
        axis.set(ylabel="divergence from float32, nats", yscale="log")
        labels = [name.removeprefix("blocks.").replace("attn.", "").replace("mlp.", "") for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=90)
        axis.legend()
        _write(figure, file)


def _place(name: str) -> tuple[int, int]:
    order = ("qkv", "gate", "proj", "fc1", "fc1_g", "fc1_x", "fc2")
    return int(name.split(".")[1]), order.index(name.rpartition(".")[2])


def draw_decisions(records: Sequence[Record], file: Path) -> None:
    """A panel for each format: percent of merges that are float32's, block by block."""
    forms, degrees = values(records, "format"), values(records, "degree")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(forms), figsize=(4.2 * len(forms), 3.4), squeeze=False)
        for axis, form in zip(axes[0], forms, strict=True):
            for place, degree in enumerate(degrees):
                these = where(records, format=form, degree=degree)
                for key, line in (("own", "-"), ("local", ":")):
                    label = f"r = {degree}" if key == "own" else None
                    shown = np.mean([each[key] for each in these], axis=0)
                    axis.plot(these[0]["blocks"], shown, line, color=f"C{place}", marker="o", markersize=3, label=label)
            axis.set(title=f"{TITLES[form]} (dotted: float32's forced before)", xlabel="block",
                     ylabel="merges as in float32, %", xticks=these[0]["blocks"])  # fmt: skip
            axis.title.set_fontsize(9)
            axis.legend(fontsize=7)
        _write(figure, file)


def draw_images(records: Sequence[Record], file: Path) -> None:
    """A panel for each format: divergence against the number of calibration images; sources without data as lines."""
    forms = values(records, "format")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, len(forms), figsize=(4.2 * len(forms), 3.4), squeeze=False)
        for axis, form in zip(axes[0], forms, strict=True):
            for place, source in enumerate(values(records, "source")):
                these = where(records, format=form, source=source)
                counts = sorted(values(these, "images"))
                nats = [np.exp(np.mean([np.log(each["divergence"]) for each in where(these, images=count)]))
                        for count in counts]  # fmt: skip
                if source in ("spread", "diverse"):
                    axis.plot(counts, nats, marker="o", markersize=4, color=f"C{place}", label=source)
                else:
                    axis.axhline(nats[0], linestyle="--", linewidth=1, color=f"C{place}", label=source)
            axis.set(title=TITLES[form], xlabel="calibration images", ylabel="divergence from float32, nats",
                     xscale="log", yscale="log")  # fmt: skip
            axis.xaxis.set_major_formatter("{x:g}")
            axis.legend(fontsize=7)
        _write(figure, file)


def _write(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
