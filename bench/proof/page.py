"""The page of the healthy models, and its picture, from `bench.proof.summary`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bench.harness.page import figure, render
from bench.proof.summary import GATED_PARTS

_ROOM = ("engine", "quantity", "median", "most", "largest", "gate", "share")
_LEAST = 0.05  # units; what is less is drawn here


def write_page(results: dict[str, Any], out: Path) -> None:
    """Writes the page, and the picture beside it."""
    engines = pd.DataFrame(results["engines"])
    total = engines.drop(columns="engine").sum().to_dict()
    room = pd.DataFrame(results["room"] or None, columns=[*_ROOM])
    room["text"] = [_text(each) for each in results["room"]]
    room = room.pivot(index="quantity", columns="engine", values="text").reindex(
        index=room["quantity"].unique(), columns=engines["engine"]
    )
    picture = out.with_suffix(".png")
    _draw(results["room"], list(engines["engine"]), picture)
    counts = pd.concat([engines, pd.DataFrame([{"engine": "**all**", **total}])]).map(
        lambda value: value if isinstance(value, str) else f"{value:,}"
    )
    render("proof/page.md.j2", out, **results, total=total, counts=counts, picture=picture.name,
           room_table=room.rename_axis("").reset_index())  # fmt: skip


def _text(spread: dict[str, Any]) -> str:
    shown = " / ".join(_short(spread[name]) for name in ("median", "most", "largest"))
    return f"{shown} ({spread['share']:.0%})" if "share" in spread else f"{shown} ({spread['gate']:g})"


def _short(value: float) -> str:
    return "0" if value < 0.005 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _draw(room: list[dict[str, Any]], engines: list[str], file: Path) -> None:
    """A panel for each engine: median, 99% and largest of the models' worst errors of every part, and the gate."""
    rows = -(-len(engines) // 3)
    size = {"figsize": (9.3, 2.3 * rows), "sharex": True, "sharey": True, "squeeze": False}
    with figure(file, rows, 3, **size) as (_, axes):
        for axis, engine in zip(axes.flat, engines, strict=False):
            for height, part in enumerate(reversed(GATED_PARTS)):
                for each in room:
                    if (each["engine"], each["quantity"]) == (engine, part):
                        low, most, largest = (max(each[name], _LEAST) for name in ("median", "most", "largest"))
                        axis.plot([low, largest], [height, height], color="#1f5fa8", linewidth=1)
                        axis.plot([low, most, largest], [height] * 3, "o", color="#1f5fa8", markersize=3)
                        axis.axvline(each["gate"], color="#b5651d", linewidth=1.2)
            axis.set(title=engine, xscale="log", ylim=(-0.6, len(GATED_PARTS) - 0.4))
            axis.set_yticks(range(len(GATED_PARTS)), list(reversed(GATED_PARTS)))
        for axis in axes[-1]:
            axis.set_xlabel("worst error, units of u")
        for axis in axes.flat[len(engines) :]:
            axis.set_visible(False)
