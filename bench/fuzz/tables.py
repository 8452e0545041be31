"""What came of a campaign, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.fuzz.outcome import DIFFERENT, FAULTS, LIBRARY_CRASH, REFUSED, SAME, Outcome

COLUMNS = (SAME, DIFFERENT, REFUSED, *FAULTS, LIBRARY_CRASH)

_VARYING = (
    (re.compile(r"(\.{3}|/)[^ :,]*"), "FILE"),
    (re.compile(r"'[^']*'|\"[^\"]*\"|\"[^\"]*$"), "'...'"),
    (re.compile(r"[0-9a-f]{8,}\.*"), "HASH"),
    (re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?"), "N"),
    (re.compile(r"(\[|\()[^])]{15,}(\]|\))?"), "[...]"),
)


@dataclass
class Row:
    """The outcomes of one entry point, or of one kind of damage at it.

    Attributes:
        verdicts: How often each came.
        mebibytes: Most that a case added to resident memory.
        seconds: That the slowest case took.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    mebibytes: float = 0.0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Counts one more."""
        self.verdicts[outcome.verdict] += 1
        self.mebibytes = max(self.mebibytes, outcome.mebibytes)
        self.seconds = max(self.seconds, outcome.seconds)

    @property
    def cases(self) -> int:
        """How many were counted."""
        return self.verdicts.total()

    @property
    def faults(self) -> int:
        """How many of them must not be."""
        return sum(self.verdicts[name] for name in FAULTS)

    def cells(self) -> list[str]:
        """Cases, then one count per verdict; nothing for none."""
        return [str(self.cases), *(str(self.verdicts[name] or "") for name in COLUMNS)]


def by_entry(outcomes: Mapping[str, Outcome]) -> dict[str, Row]:
    """Entry point -> its row."""
    rows: dict[str, Row] = {}
    for key, outcome in outcomes.items():
        rows.setdefault(key.split("|")[0], Row()).add(outcome)
    return rows


def by_kind(outcomes: Mapping[str, Outcome]) -> dict[tuple[str, str], Row]:
    """(entry point, kind of damage) -> its row."""
    rows: dict[tuple[str, str], Row] = {}
    for key, outcome in outcomes.items():
        entry, kind, _ = key.split("|")
        rows.setdefault((entry, kind), Row()).add(outcome)
    return rows


def total(outcomes: Mapping[str, Outcome]) -> Row:
    """All of them."""
    row = Row()
    for outcome in outcomes.values():
        row.add(outcome)
    return row


def messages(outcomes: Mapping[str, Outcome], verdicts: tuple[str, ...]) -> Counter[str]:
    """What was said, without what differs from file to file, and how often."""
    return Counter(plain(each.message) for each in outcomes.values() if each.verdict in verdicts)


def plain(message: str) -> str:
    """A message without names, numbers and hashes.

    >>> plain("degree 4: the file /tmp/x1/r04.onnx must have 3 bytes")
    'degree N: the file FILE must have N bytes'
    """
    for pattern, stands in _VARYING:
        message = pattern.sub(stands, message)
    return message[:110]
