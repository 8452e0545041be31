"""Results of single checkpoints -> rows of a task: means over its fine-tunings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Found = Mapping[str, Any]
"""What `bench.budgets.measure` found of a cascade."""


@dataclass(frozen=True)
class Gain:
    """How much better cascades are than something, in points, over several checkpoints."""

    mean: float  # over them
    error: float  # its standard error, as if they were independent
    worst: float  # of the checkpoint that gains least
    worst_error: float  # its standard error
    count: int  # checkpoints

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Gain | None:
        """From gains and their standard errors; None where there are none."""
        if not pairs:
            return None
        worst = min(pairs)
        error = math.sqrt(sum(each**2 for _, each in pairs)) / len(pairs)
        return cls(float(np.mean([gain for gain, _ in pairs])), error, *worst, len(pairs))

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ±{self.error:.2f}"


@dataclass(frozen=True)
class Cascades:
    """Cascades of a task's checkpoints that may lose the same."""

    task: str  # "example", or the experiment's
    drop: float  # points that they may lose
    batch: int | None  # images per call that their time is of; None where the cost is in multiply-accumulates
    rows: tuple[Found, ...]  # of each checkpoint for which it pays: `tocom cascade` writes the others not
    others: tuple[Found, ...] = ()  # of each checkpoint for which it does not

    def mean(self, name: str) -> float:
        """Of a number that every row has."""
        return float(np.mean([row[name] for row in self.rows]))

    @property
    def chains(self) -> str:
        """Which degrees, and for how many checkpoints where they differ."""
        chains = [", ".join(map(str, row["cascade"])) for row in self.rows]
        distinct = list(dict.fromkeys(chains))
        if len(distinct) == 1:
            return distinct[0]
        return " / ".join(f"{chain} ({chains.count(chain)}x)" for chain in distinct)

    @property
    def sent_on(self) -> float:
        """Share of images that go beyond the first stage."""
        return float(np.mean([row["shares"][1] if len(row["shares"]) > 1 else 0.0 for row in self.rows]))

    @property
    def lost(self) -> Gain:
        """Points lost against the least compressed degree."""
        return Gain.of([(row["lost"], row["lost_error"]) for row in self.rows])

    def gain_on(self, kind: str) -> Gain | None:
        """Over the best single degree ("single") or the best mixture of two ("mixture") of equal cost."""
        rivals = [row["rivals"][kind] for row in self.rows if kind in row["rivals"]]
        return Gain.of([(rival["gain"], rival["gain_error"]) for rival in rivals])


def task_of(subject: str) -> str:
    """The name that a subject's numbers are put together under."""
    return subject.rpartition("-")[0] or subject


def by_task(results: Found, stage: str) -> dict[str, list[Any]]:
    """What a stage found, of every checkpoint of a task."""
    found: dict[str, list[Any]] = {}
    for name, stages in results["subjects"].items():
        if stage in stages:
            found.setdefault(task_of(name), []).append(stages[stage])
    return found


def cascades(results: Found, stage: str) -> Iterator[Cascades]:
    """Every task, batch and drop, in this order."""
    for task, found in by_task(results, stage).items():
        listed = [each["rows"] if stage == "times" else each for each in found]
        for place, first in enumerate(listed[0]):
            paying, others = (tuple(each[place] for each in listed if each[place]["pays"] == pays)
                              for pays in (True, False))  # fmt: skip
            yield Cascades(task, first["drop"], first.get("batch"), paying, others)
