"""The page, from the results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bench.experiment.tasks import TASKS
from bench.harness.page import figure, render
from bench.quantize.accuracy import CALIBRATION_IMAGES
from bench.quantize.subjects import POOL
from tocom.calib.quantize.calibrate import OBSERVED

BAR = 0.3  # points of top-1 that INT8 may lose
TITLES = {"int8": "INT8", "fp8": "FP8", "int8-weights": "INT8 weights only"}


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page, and its plot beside it."""
    records = pd.DataFrame(results["rows"])
    int8 = records[records["format"] == "int8"]
    rows = [_degree_row(degree, each) for degree, each in int8.groupby("degree")]
    by_task = int8.groupby(["degree", int8["network"].str.replace(r"-\d+$", "", regex=True)], sort=False)
    tasks = by_task.apply(lambda each: f"{each['reference'].mean():.1f}, {change(each)}").unstack()
    formats = [_format_row(form, each) for form, each in records.groupby("format", sort=False)]
    worst = int8.loc[int8["change"].idxmin()]
    means = int8.groupby("degree")["change"].mean()
    picture = out.with_name(f"{out.stem}-default.png")
    _draw(records, picture)
    render("quantize/page.md.j2", out, **results, rows_of_degrees=rows, formats=formats, picture=picture.name, bar=BAR,
           tasks=tasks.rename_axis("r").rename_axis(None, axis=1).reset_index(), networks=int8["network"].nunique(),
           lowest=(means.idxmin(), change(int8[int8["degree"] == means.idxmin()])), worst=worst, singles=len(int8),
           below=int((int8["change"] < -BAR).sum()), held=bool((means >= -BAR).all()),
           beyond=int((int8["change"] < -2 * int8["error"]).sum()), images=CALIBRATION_IMAGES, pool=POOL,
           observed=OBSERVED, sheets=int8["sheets"].max(),
           asked=[(name, task.asks) for name, task in TASKS.items()
                  if records["network"].str.startswith(f"{name}-").any()])  # fmt: skip


def change(records: pd.DataFrame) -> str:
    """The mean change in top-1 with its standard error, from theirs, taken as independent."""
    return f"{records['change'].mean():+.2f} ± {math.sqrt((records['error'] ** 2).sum()) / len(records):.2f}"


def _degree_row(degree: int, records: pd.DataFrame) -> dict[str, Any]:
    worst = records.loc[records["change"].idxmin()]
    return {
        "r": degree, "float32, %": f"{records['reference'].mean():.2f}",
        "INT8, %": f"{records['candidate'].mean():.2f}",
        "change": change(records),
        "worst network": f"{worst['change']:+.2f} ± {worst['error']:.2f} ({worst['network']})",
        "same class, %": f"{records['equal'].mean():.2f}", "divergence": f"{records['divergence'].mean():.2g}",
        f"within {BAR}": "yes" if records["change"].mean() >= -BAR else "**no**",
    }  # fmt: skip


def _format_row(form: str, records: pd.DataFrame) -> dict[str, Any]:
    row = {"format": TITLES[form], "sheets": records["sheets"].iloc[0]}
    at = {degree: each for degree, each in records.groupby("degree") if degree in (0, 8, 16)}
    row |= {f"change, r = {degree}": change(each) for degree, each in at.items()}
    return row | {f"divergence, r = {degree}": f"{each['divergence'].mean():.2g}" for degree, each in at.items()}


def _draw(records: pd.DataFrame, file: Path) -> None:
    """INT8's change in top-1 of every network and the mean, with the bar; and the divergence of every format."""
    with figure(file, 1, 2, figsize=(9, 3.4)) as (_, (left, right)):
        int8 = records[records["format"] == "int8"]
        for _name, own in int8.groupby("network"):
            left.plot(own["degree"], own["change"], color="0.7", linewidth=0.8)
        by_degree = int8.groupby("degree")
        errors = by_degree["error"].apply(lambda each: 2 * math.sqrt((each**2).sum()) / len(each))
        means = by_degree["change"].mean()
        left.errorbar(means.index, means, errors, color="#1f5fa8", marker="o", markersize=4, capsize=2,
                      label="mean, 2 standard errors")  # fmt: skip
        left.axhline(-BAR, color="#b5651d", linestyle="--", linewidth=1, label=f"{BAR} points")
        left.set(title="INT8", xlabel="degree r", ylabel="change in top-1, points", xticks=list(means.index))
        left.legend(loc="upper left", fontsize=7)
        for form, own in records.groupby("format", sort=False):
            nats = own.groupby("degree")["divergence"].mean()
            right.plot(nats.index, nats, marker="o", markersize=3, label=TITLES[form])
        right.set(title="divergence from float32", xlabel="degree r", ylabel="nats", yscale="log")
        right.legend(fontsize=7)
