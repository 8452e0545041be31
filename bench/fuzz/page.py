"""What came of a campaign, counted; and the page that tells it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bench.fuzz.case import DIFFERENT, FAULTS, LIBRARY_CRASH, REFUSED, SAME
from bench.harness.page import cell, render

VERDICTS = (SAME, DIFFERENT, REFUSED, *FAULTS, LIBRARY_CRASH)
_MOST = 40  # messages that are listed
_VARYING = (
    (re.compile(r"(\.{3}|/)[^ :,]*"), "FILE"),
    (re.compile(r"'[^']*'|\"[^\"]*\"|\"[^\"]*$"), "'...'"),
    (re.compile(r"[0-9a-f]{8,}\.*"), "HASH"),
    (re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?"), "N"),
    (re.compile(r"(\[|\()[^])]{15,}(\]|\))?"), "[...]"),
)


def faults_of(outcomes: Mapping[str, Mapping[str, Any]]) -> int:
    """How many outcomes must not be."""
    return sum(each["verdict"] in FAULTS for each in outcomes.values())


def summary(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that the page tells, of outcomes by key of the case: "entry point|damage|number"."""
    frame = pd.DataFrame(
        [dict(zip(("entry point", "damage", "number"), key.split("|"), strict=True), **each)
         for key, each in outcomes.items()]
    )  # fmt: skip
    told = Counter(plain(text) for text in frame.loc[frame["verdict"] == REFUSED, "message"])
    odd = frame[~frame["verdict"].isin([SAME, DIFFERENT, REFUSED])]
    entries = _counted(frame, ["entry point"])
    most = frame.groupby("entry point")[["mebibytes", "seconds"]].max()
    for row in entries:
        row |= {"MiB at most": round(most["mebibytes"][row["entry point"]]),
                "s at most": round(most["seconds"][row["entry point"]], 1)}  # fmt: skip
    return {
        "seconds": float(frame["seconds"].sum()),
        "entries": entries,
        "kinds": _counted(frame, ["entry point", "damage"]),
        "odd": odd[["entry point", "damage", "number", "verdict", "message"]].to_dict("records"),
        "distinct": len(told),
        "messages": [{"message": text, "times": times} for text, times in told.most_common(_MOST)],
    }


def _counted(frame: pd.DataFrame, by: list[str]) -> list[dict[str, Any]]:
    counts = frame.groupby(by)["verdict"].value_counts().unstack(fill_value=0).reindex(columns=VERDICTS, fill_value=0)
    counts.insert(0, "cases", counts.sum(axis=1))
    return counts.reset_index().to_dict("records")


def plain(message: str) -> str:
    """A message without names, numbers and hashes.

    >>> plain("degree 4: the file /tmp/x1/r04.onnx must have 3 bytes")
    'degree N: the file FILE must have N bytes'
    """
    for pattern, stands in _VARYING:
        message = pattern.sub(stands, message)
    return message[:110]


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Writes the page."""
    entries = pd.DataFrame(results["entries"])
    summed = entries[["cases", *VERDICTS]].sum()
    total = {
        "entry point": "**all**",
        **summed,
        "MiB at most": entries["MiB at most"].max(),
        "s at most": entries["s at most"].max(),
    }
    counts = pd.concat([entries, pd.DataFrame([total])])
    empty = [name for name in VERDICTS if not summed[name]]
    counts[list(VERDICTS)] = counts[list(VERDICTS)].astype(object).replace(0, "")
    found = [f"{summed[name]} {name}" for name in (*FAULTS, LIBRARY_CRASH) if summed[name]]
    shown = {
        "messages": [each | {"message": cell(each["message"])} for each in results["messages"]],
        "odd": [each | {"message": cell(each["message"])} for each in results["odd"]],
    }
    render("fuzz/page.md.j2", out, **{**results, **shown}, counts=counts.drop(columns=empty), empty=empty, found=found,
           cases=summed["cases"], faults=sum(summed[name] for name in FAULTS))  # fmt: skip
