"""What a campaign's models came to, per engine: numbers for the page and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.proof.models import ENGINES
from bench.proof.state import Record
from tocom.export.proof.parts import PARTS

WORST, MIDDLE, COPY = "logits of the worst image", "logits of the image in the middle", "debug copy"
MIDDLE_TOKEN = "token in the middle"  # of every part
NETWORK = (MIDDLE, WORST, COPY)
MARGINS = ("margin, merge", "margin, prune")


@dataclass(frozen=True)
class Spread:
    """One quantity over the models of one engine.

    Attributes:
        median: Half of them are below it, in units of the format's unit roundoff.
        most: 99% of them are below it.
        largest: All of them are.
        gate: What is allowed, in the same units; None where that depends on the network.
        share: The largest share of what was allowed.
    """

    median: float
    most: float
    largest: float
    gate: float | None
    share: float

    def __str__(self) -> str:
        shown = " / ".join(_short(value) for value in (self.median, self.most, self.largest))
        return f"{shown} ({self.share:.0%})" if self.gate is None else f"{shown} ({self.gate:g})"


def _short(value: float) -> str:
    return "0" if value < 0.005 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def by_engine(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """(Library, format) -> its models, in the order of `ENGINES`."""
    found: dict[tuple[str, str], list[Record]] = {engine: [] for engine in ENGINES}
    for record in records:
        found[record["drawn"]["backend"], record["drawn"]["precision"]].append(record)
    return {engine: of_it for engine, of_it in found.items() if of_it}


def quantities() -> tuple[str, ...]:
    """Everything that a gate is for, in the order of the network."""
    parts = tuple(part for part in PARTS if part != "decision")
    return (*parts, MIDDLE_TOKEN, *MARGINS, *NETWORK)


def spread_of(records: Sequence[Record], quantity: str) -> Spread | None:
    """A quantity over one engine's models; None where none has it."""
    having = [record for record in records if quantity in record.get("units", {})]
    if not having:
        return None
    low, most, largest = np.quantile([record["units"][quantity] for record in having], (0.5, 0.99, 1))
    if quantity in NETWORK:
        share = max(record["shares"][quantity] for record in having)
        return Spread(float(low), float(most), float(largest), None, share)
    gate = having[0]["allowed"]["part" if quantity in PARTS else quantity]
    return Spread(float(low), float(most), float(largest), gate, float(largest) / gate)


def total(records: Iterable[Record], name: str) -> int:
    """A count over models."""
    return sum(record.get(name, 0) for record in records)


def per_block(records: Iterable[Record]) -> list[float]:
    """Of float32 engines: the middle image's logit error in units of u times the depth."""
    return [record["logits per block"] for record in records
            if record["drawn"]["precision"] == "fp32" and "logits per block" in record]  # fmt: skip
