"""What a campaign's models came to: verdicts by the gates of today, counts and spreads for each engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.proof.models import ENGINES
from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import PARTS

Record = dict[str, Any]  # see `bench.proof.case.check`

WORST, MIDDLE, COPY = "logits of the worst image", "logits of the image in the middle", "debug copy"
MIDDLE_TOKEN = "token in the middle"  # of every part
GATED_PARTS = tuple(part for part in PARTS if part != "decision")
_BY_NETWORK = (MIDDLE, WORST, COPY)  # quantities whose gate depends on the network
_QUANTITIES = (*GATED_PARTS, MIDDLE_TOKEN, "margin, merge", "margin, prune", *_BY_NETWORK)
_COUNTED = {"images": "images", "depth": "blocks", "decisions": "decisions", "different": "that differ",
            "explained": "images x blocks explained", "unexplained": "not explained"}  # fmt: skip


def judged(record: Record) -> Record:
    """A model's record with the verdict of the gates in use, so that another gate needs no new campaign."""
    if "units" not in record:
        return record
    gates, units = GATES[record["precision"]], record["units"]
    allowed = {**record["allowed"], "part": gates.part, MIDDLE_TOKEN: gates.middle}
    limits = {**dict.fromkeys(PARTS, gates.part), MIDDLE_TOKEN: gates.middle}
    faults = [f"{name}: {units[name]:.1f} u, allowed {limit:g} u" for name, limit in limits.items()
              if not units.get(name, 0.0) <= limit]  # fmt: skip
    if record["unexplained"]:
        faults.append(f"{record['unexplained']} decisions unexplained")
    faults += [f"{name}: {share:.2f} of what is allowed" for name, share in record["shares"].items() if not share <= 1]
    return {**record, "allowed": allowed, "passed": not faults, "faults": faults}


def alarms(records: Iterable[Record]) -> list[Record]:
    """Those that did not pass."""
    return [record for record in records if not record["passed"]]


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """All that the page tells: counts and spreads of every engine, and the alarms."""
    by_engine = {f"{backend} {precision}": [each for each in records if (each["drawn"]["backend"],
                 each["drawn"]["precision"]) == (backend, precision)] for backend, precision in ENGINES}  # fmt: skip
    ratios = [each["logits per block"] for each in records
              if each["drawn"]["precision"] == "fp32" and "logits per block" in each] or [0.0]  # fmt: skip
    return {
        "per_block": {"median": float(np.median(ratios)), "largest": max(ratios)},
        "engines": [{"engine": engine, **_counts(each)} for engine, each in by_engine.items() if each],
        "room": [{"engine": engine, "quantity": quantity, **spread} for engine, each in by_engine.items()
                 for quantity in _QUANTITIES if (spread := _spread(each, quantity))],
        "alarms": [{"model": each["drawn"]["number"], "what": _described(each["drawn"]),
                    "alarm": "; ".join(each["faults"])} for each in alarms(records)],
    }  # fmt: skip


def _counts(records: Sequence[Record]) -> dict[str, int]:
    summed = pd.DataFrame(records).reindex(columns=list(_COUNTED)).sum().astype(int)
    counts = {title: int(summed[name]) for name, title in _COUNTED.items()}
    return {"models": len(records), "false alarms": len(alarms(records)), **counts}


def _spread(records: Sequence[Record], quantity: str) -> dict[str, float] | None:
    """A quantity over models: median, what 99% stay below, the largest; its gate, or the largest share of it."""
    having = [record for record in records if quantity in record.get("units", {})]
    if not having:
        return None
    levels = np.quantile([record["units"][quantity] for record in having], (0.5, 0.99, 1)).tolist()
    found = dict(zip(("median", "most", "largest"), levels, strict=True))
    if quantity in _BY_NETWORK:
        return found | {"share": max(record["shares"][quantity] for record in having)}
    return found | {"gate": having[0]["allowed"]["part" if quantity in PARTS else quantity]}


def _described(drawn: dict[str, Any]) -> str:
    given = drawn["arguments"]
    height, width = given["img_size"]
    return (f"{drawn['backend']} {drawn['precision']}: {drawn['kind']}, {given['depth']} blocks, width "
            f"{given['embed_dim']}, {given['num_heads']} heads, {height}x{width} by {given['patch_size']}, "
            f"{drawn['reduction']} {drawn['degree']} {drawn['schedule']}, gain {drawn['gain']:.2f}")  # fmt: skip
