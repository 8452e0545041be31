"""Which degree to run: a family's points between time and accuracy, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import GateError, InputError
from ..manifest import Family

if TYPE_CHECKING:
    from .local_latency import Times

SAVES = 0.02  # share of degree 0's time that a degree must save to pay; less is within the noise of a measurement


@dataclass(frozen=True)
class Point:
    """What a degree takes and gives.

    Attributes:
        degree: Degree r.
        p50_ms: Median time of a call, in ms.
        p99_ms: 99th percentile, in ms.
        gmacs: Multiply-accumulates of one image, in units of 1e9.
        top1: Share of labelled images that it was right on when it was compiled, in 0..1; None where none were given.
        pays: Whether it saves at least 2% of the time of degree 0, or is degree 0.
        on_frontier: Whether it pays, and no other degree that pays is both at least as accurate and at least as fast.
    """

    degree: int
    p50_ms: float
    p99_ms: float
    gmacs: float
    top1: float | None
    pays: bool
    on_frontier: bool


def points(family: Family, latencies: Mapping[int, Times]) -> tuple[Point, ...]:
    """Puts times and accuracies side by side.

    Unless the accuracy of every degree is known, a lower degree counts as more accurate than a higher one. Of degrees
    that are equal in both, the lowest is on the frontier.

    Args:
        family: Whose accuracies the manifest has.
        latencies: Degree -> times; degrees without any are left out. A degree pays by what it saves against the lowest.

    Returns:
        Points in rising order of degree.

    Raises:
        InputError: No engine of the family has times.
    """
    timed = [entry for entry in family.engines if entry.degree in latencies]
    if not timed:
        raise InputError("latencies must hold the times of at least one of the family's degrees, got none")
    base = latencies[timed[0].degree].p50_ms
    measured = []
    for entry in timed:
        times = latencies[entry.degree]
        pays = entry is timed[0] or times.p50_ms <= (1 - SAVES) * base
        top1 = entry.accuracy.get("top1")
        measured.append(Point(entry.degree, times.p50_ms, times.p99_ms, entry.gmacs, top1, pays, on_frontier=False))
    frontier = _frontier(measured)
    return tuple(replace(point, on_frontier=point.degree in frontier) for point in measured)


def _frontier(measured: Sequence[Point]) -> set[int]:
    known = all(point.top1 is not None for point in measured)
    worth = {point.degree: point.top1 if known else -point.degree for point in measured}
    frontier, best = set(), -math.inf
    for point in sorted(measured, key=lambda point: (point.p50_ms, -worth[point.degree], point.degree)):
        if point.pays and worth[point.degree] > best:
            frontier.add(point.degree)
            best = worth[point.degree]
    return frontier


def choose(points: Sequence[Point], *, budget_ms: float | None = None, min_accuracy: float | None = None) -> Point:
    """The degree to run, of those on the frontier: the most accurate within a budget, or the fastest accurate enough.

    Args:
        points: Of the family.
        budget_ms: What a call may take, by its median, in ms.
        min_accuracy: Least top-1, a share in 0..1. Alone it asks for the fastest degree that has it; with a budget, for
            the most accurate one.

    Raises:
        InputError: A number is out of range, or an accuracy is asked for and none is known.
        GateError: No degree fits; the message names the nearest.
    """
    _ensure_sensible(budget_ms, min_accuracy, points)
    frontier = sorted((point for point in points if point.on_frontier), key=lambda point: point.p50_ms)
    within = [point for point in frontier if budget_ms is None or point.p50_ms <= budget_ms]
    accurate = [point for point in frontier if min_accuracy is None or (point.top1 or 0.0) >= min_accuracy]
    fitting = [point for point in within if point in accurate]
    if not fitting:
        raise GateError(_nothing_fits(frontier, within, accurate, budget_ms, min_accuracy))
    # Along the frontier, whatever is slower is more accurate.
    return fitting[0] if budget_ms is None and min_accuracy is not None else fitting[-1]


def _ensure_sensible(budget_ms: float | None, min_accuracy: float | None, points: Iterable[Point]) -> None:
    if budget_ms is not None and not (math.isfinite(budget_ms) and budget_ms > 0):
        raise InputError(f"a budget must be more than 0 ms, got {budget_ms}")
    if min_accuracy is None:
        return
    if not 0 <= min_accuracy <= 1:
        raise InputError(f"a least accuracy must be a share in 0..1, got {min_accuracy}")
    if all(point.top1 is None for point in points):
        raise InputError("a least accuracy needs the accuracies of the degrees, but family.json has none: compile "
                         "again with --images and labelled images")  # fmt: skip


def _nothing_fits(
    frontier: Sequence[Point],
    within: Sequence[Point],
    accurate: Sequence[Point],
    budget_ms: float | None,
    min_accuracy: float | None,
) -> str:
    best = max(frontier, key=lambda point: (point.top1 or 0.0, -point.degree))
    if not accurate:
        return f"no degree reaches an accuracy of {min_accuracy:g}: the nearest is {_in_words(best)}"
    if min_accuracy is None:
        return f"no degree takes {budget_ms:g} ms or less: the nearest is {_in_words(frontier[0])}"
    nearest = f"the fastest that is as accurate is {_in_words(accurate[0])}"
    if within:
        nearest += f", the most accurate that is as fast is {_in_words(within[-1])}"
    return f"no degree takes {budget_ms:g} ms or less at an accuracy of {min_accuracy:g}: {nearest}"


def _in_words(point: Point) -> str:
    accuracy = "" if point.top1 is None else f" and an accuracy of {point.top1:.4g}"
    return f"degree {point.degree} with {point.p50_ms:.3g} ms{accuracy}"
