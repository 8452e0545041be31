"""From outcomes to means, gains with confidence intervals, and shares of a loss that were given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

_NOISE = 0.98

Outcomes = Mapping[str, Sequence[Mapping[str, float]]]
"""Name of an assessment, "task-source-seed-method" -> its outcomes."""


@dataclass(frozen=True)
class Gain:
    """What a compensator does at one mismatched degree; in points of top-1."""

    matched: float  # mean top-1 at the source degree
    plain: float  # mean top-1 at the target degree, as it is
    compensated: float  # mean top-1 with the compensator
    low: float  # lower end of the 95% interval of compensated - plain
    high: float  # upper end
    count: int  # checkpoints it rests on

    @property
    def gain(self) -> float:
        """Points that the compensator adds."""
        return self.compensated - self.plain

    @property
    def loss(self) -> float:
        """Points that are lost without it, against the source degree."""
        return self.matched - self.plain

    @property
    def recovered(self) -> float | None:
        """Share of the loss that is given back; None where less than half a point is lost."""
        return self.gain / self.loss if self.loss >= 0.5 else None


def chosen(outcomes: Outcomes, tasks: Iterable[str], source: int, method: str) -> list[Sequence[Mapping[str, float]]]:
    """The assessments of some tasks at a source degree, all seeds."""
    wanted = set(tasks)
    found = []
    for name, listed in outcomes.items():
        task, of_source, _, of_method = name.split("-")
        if task in wanted and int(of_source) == source and of_method == method:
            found.append(listed)
    return found


def gain_over_checkpoints(assessed: Sequence[Sequence[Mapping[str, Any]]], source: int, target: int) -> Gain:
    """Over several checkpoints: Student's interval of the mean gain, each checkpoint one observation.

    Tasks differ more than seeds do, so an interval over all of them also speaks for tasks that were not tried. Of a
    single checkpoint it is the normal interval over its test sheets.
    """
    rows = [{outcome["target"]: outcome for outcome in each} for each in assessed]
    plain = np.array([row[target]["plain"] for row in rows])
    compensated = np.array([row[target]["compensated"] for row in rows])
    gains = compensated - plain
    if len(rows) > 1:
        half = stats.t.ppf(0.975, len(rows) - 1) * gains.std(ddof=1) / len(rows) ** 0.5
    else:
        half = stats.norm.ppf(0.975) * rows[0][target]["standard_error"]
    matched = float(np.mean([row[source]["plain"] for row in rows]))
    return Gain(matched, float(plain.mean()), float(compensated.mean()), float(gains.mean() - half),
                float(gains.mean() + half), len(rows))  # fmt: skip


def at_equal_latency(latency: Sequence[float], accuracy: Sequence[float], times: Sequence[float]) -> list[float | None]:
    """Accuracy of one family of engines at given times, linear between its neighbours; None outside what it reaches.

    Only engines on the family's own frontier count: none that is both slower and less accurate than another. A time
    within 2% of the fastest one counts as reached: so much is noise.
    """
    points = sorted(zip(latency, accuracy, strict=True))
    frontier: list[tuple[float, float]] = []
    for time, share in points:
        if not frontier or share > frontier[-1][1]:
            frontier.append((time, share))
    xs, ys = zip(*frontier, strict=True)
    return [float(np.interp(time, xs, ys)) if _NOISE * xs[0] <= time else None for time in times]
