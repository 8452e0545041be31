"""The page of the engines on a CPU, and its pictures, from the records of `bench.cpu.groups`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.cpu.groups import STRIDED
from bench.harness.page import figure, render, spread

Record = dict[str, Any]
_RATIOS = {"gain": "over plain export", "over_half": "over ours bf16", "over_float": "over ours fp32"}


def write_page(results: dict[str, Any], out: Path) -> None:
    """Writes the page, and a picture for each model and batch size beside it."""
    sections = []
    for (model, batch), records in groupby(results["rows"], lambda each: (each["model"], each["batch"])):
        group = list(records)
        picture = out.with_name(f"{out.stem}-{model.split('_patch')[0]}-{batch}.png")
        _draw(f"{model}, batch {batch}", group, picture)
        sections.append({"title": f"{model}, batch {batch}", "picture": picture.name, "rows": _rows(group)})
    render("cpu/page.md.j2", out, **results, sections=sections)


def _rows(records: Sequence[Record]) -> list[dict[str, str]]:
    order = {degree: place for place, degree in enumerate(dict.fromkeys(each["degree"] for each in records))}
    rows = []
    for each in sorted(records, key=lambda each: (order[each["degree"]], each["schedule"] == "-", each["ms"])):
        merged = each["schedule"] != "-"
        row = {"r": each["degree"] if merged else 0, "contender": each["contender"], "schedule": each["schedule"],
               "rounds": each.get("rounds"), "ms": f"{each['ms']:.1f}",
               "quartiles": f"{each['low']:.1f} - {each['high']:.1f}",
               "speed-up": f"{each['speed_up']:.2f}x" if merged else "",
               "of ideal": f"{each['of_ideal']:.0%}" if merged else "",
               "tax": spread(each.get("tax"), "{:+.1%}")}  # fmt: skip
        rows.append(row | {title: spread(each.get(ratio), "{:.2f}x") for ratio, title in _RATIOS.items()})
    filled = [name for name in rows[0] if any(row[name] not in ("", None) for row in rows)]
    return [{name: row[name] for name in filled} for row in rows]


def _draw(title: str, records: Sequence[Record], file: Path) -> None:
    """Latency against degree, each as a share of its own time without merging, with slice bounds and the ideal."""
    with figure(file, figsize=(7, 4)) as (_, axis):
        ideal: dict[int, float] = {0: 1.0}
        for contender in dict.fromkeys(each["contender"] for each in records):
            for schedule in ("constant", STRIDED):
                points = [each for each in records if (each["contender"], each["schedule"]) == (contender, schedule)]
                if not points:
                    continue
                degrees = [0, *(each["degree"] for each in points)]
                (line,) = axis.plot(
                    degrees, [1, *(1 / each["speed_up"] for each in points)],
                    "-" if contender.startswith("ours") else ":", marker="o", markersize=3,
                    label=contender if schedule == "constant" else f"{contender}, {schedule}",
                )  # fmt: skip
                if "tax" in points[0]:
                    bounds = [1, *(1 / each["speed_up"] / (1 + each["tax"][1]) for each in points)]
                    axis.plot(degrees, bounds, "--", color=line.get_color(), linewidth=0.8, alpha=0.6)
                if schedule == "constant":
                    ideal |= {each["degree"]: each["of_ideal"] / each["speed_up"] for each in points}
        axis.plot(ideal.keys(), ideal.values(), color="black", linewidth=1, label="by multiplications")
        axis.set(title=f"{title} (dashed: slice bounds)", xlabel="degree r", ylabel="time / own time at r = 0")
        axis.legend(fontsize=6, loc="lower left")
