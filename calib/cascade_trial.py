"""What a cascade does on images that it was not found on: accuracy and mean cost, beside every single degree.

Accuracies are compared image by image, times in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from tocom.runtime.degrees.cascade import Cascade, InferAt, run, shares

_TOGETHER = 4  # single degrees that are timed beside a cascade: all of a large family would fill the memory
_SLOWEST_S = 60.0  # of one such group
_MOST_BATCHES = 64
_TIMES = 2  # each batch; the faster one counts, so that a hiccup of the machine does not

OpenDegrees = Callable[[Sequence[int], int | None], AbstractContextManager[InferAt]]
"""(degrees, images of every call or None for any number) -> their engines, open."""


@dataclass(frozen=True)
class Row:
    """A cascade or a single degree on the report's images.

    Attributes:
        name: "cascade", or "degree 8".
        degrees: Its stages, falling.
        accuracy: Top-1, a share.
        error: Its standard error.
        ms: Mean time per image at the report's batch size, in ms.
        ms_error: Standard error of `ms` over batches.
        gmacs: Mean multiply-accumulates per image, in units of 1e9.
        shares: Share of images that reach each stage.
        gain: Accuracy of the cascade minus this one's; 0 for the cascade.
        gain_error: Its standard error, image by image.
    """

    name: str
    degrees: tuple[int, ...]
    accuracy: float
    error: float
    ms: float
    ms_error: float
    gmacs: float
    shares: tuple[float, ...]
    gain: float
    gain_error: float


@dataclass(frozen=True)
class Trial:
    """A cascade beside all single degrees.

    Attributes:
        cascade: The cascade.
        singles: Single degrees, rising.
        images: Images that it rests on.
        batch: Images per call.
    """

    cascade: Row
    singles: tuple[Row, ...]
    images: int
    batch: int

    def best_single(self, cost: str = "ms") -> Row | None:
        """The most accurate single degree of equal or lower mean cost; None where the cascade is cheaper than all.

        Args:
            cost: "ms" or "gmacs".
        """
        within = [row for row in self.singles if getattr(row, cost) <= getattr(self.cascade, cost)]
        return max(within, key=lambda row: row.accuracy, default=None)


def halves(labels: Sequence[int] | np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Parts images in two, each class as evenly as can be: one half to calibrate on, one to report on.

    Args:
        labels: int [n].
        seed: Of the draw.

    Returns:
        Indices of both halves, each rising; the first is never the smaller one.
    """
    labels = np.asarray(labels)
    draws = np.random.default_rng(seed)
    # Classes one after the other, each in random order: every second image, so that odd classes even out.
    order = np.concatenate([draws.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    return np.sort(order[::2]), np.sort(order[1::2])


def measure_times(
    cascade: Cascade,
    degrees: Sequence[int],
    opened: OpenDegrees,
    batches: Sequence[np.ndarray],
    tell: Callable[[int], object] = lambda _done: None,
) -> dict[str, np.ndarray]:
    """Times a cascade and single degrees on the same batches, in turns.

    Args:
        cascade: The cascade.
        degrees: The single degrees, rising; the first is measured in every group and sets its scale.
        opened: Opens engines: single degrees and the first stage for whole batches, later stages for any number.
        batches: Each float32 [B, 3, H, W], all of one size.
        tell: Given how many batches are done, of all groups.

    Returns:
        "cascade" and "degree 8" and so on -> ms per image of each batch [batches].
    """
    base, *others = degrees
    groups = [others[start : start + _TOGETHER] for start in range(0, len(others), _TOGETHER)] or [[]]
    runs = []
    for group in groups:
        first, *later = cascade.degrees
        with (
            opened(sorted({base, *group, first}), len(batches[0])) as infer,
            opened(later, None) as infer_rest,
        ):
            staged = {first: infer} | dict.fromkeys(later, infer_rest)
            runs.append(_timed(cascade, [base, *group], infer, staged, batches, tell))
    fewest = min(len(run_times["cascade"]) for run_times in runs)
    typical = statistics.median(float(np.median(run_times[_name(base)])) for run_times in runs)
    times: dict[str, np.ndarray] = {}
    for run_times in runs:
        scale = typical / float(np.median(run_times[_name(base)]))
        for name, measured in run_times.items():
            times.setdefault(name, scale * measured[:fewest])
    return times


def _timed(
    cascade: Cascade,
    degrees: Sequence[int],
    infer: InferAt,
    staged: Mapping[int, InferAt],
    batches: Sequence[np.ndarray],
    tell: Callable[[int], object],
) -> dict[str, np.ndarray]:
    def single(degree: int) -> Callable[[np.ndarray], object]:
        return lambda batch: infer(batch, degree)

    def whole(batch: np.ndarray) -> object:
        return run(cascade, lambda images, degree: staged[degree](images, degree), batch)

    calls = {_name(degree): single(degree) for degree in degrees} | {"cascade": whole}
    for degree in degrees:
        infer(batches[0], degree)
    for degree in cascade.degrees[1:]:  # an engine may prepare for every number of images that it meets
        for size in range(1, len(batches[0]) + 1):
            staged[degree](batches[0][:size], degree)
    whole(batches[0])
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for index, batch in enumerate(batches[:_MOST_BATCHES]):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(min(_milliseconds(calls[name], batch) for _ in range(_TIMES)) / len(batch))
        tell(1)
        if time.perf_counter() - start > _SLOWEST_S:
            break
    return {name: np.array(measured) for name, measured in times.items()}


def _milliseconds(call: Callable[[np.ndarray], object], batch: np.ndarray) -> float:
    begin = time.perf_counter_ns()
    call(batch)
    return (time.perf_counter_ns() - begin) / 1e6


def compare(
    cascade: Cascade,
    logits: Mapping[int, np.ndarray],
    labels: np.ndarray,
    times: Mapping[str, np.ndarray],
    gmacs: Mapping[int, float],
    batch: int,
) -> Trial:
    """Puts a cascade beside single degrees.

    Args:
        cascade: The cascade.
        logits: Degree -> [n, classes], of every single degree.
        labels: int [n].
        times: As from `measure_times`.
        gmacs: Degree -> multiply-accumulates of an image, in units of 1e9.
        batch: Images per call that the times are of.
    """
    places = np.arange(len(labels), dtype=np.float32)[:, None, None, None]
    answer = run(cascade, lambda images, degree: logits[degree][images[:, 0, 0, 0].astype(int)], places)
    right = answer.logits.argmax(axis=1) == labels
    rows = [_row("cascade", cascade.degrees, shares(cascade, answer.degrees), right, right, times, gmacs)]
    for degree in sorted(logits):
        is_right = logits[degree].argmax(axis=1) == labels
        rows.append(_row(_name(degree), (degree,), (1.0,), is_right, right, times, gmacs))
    return Trial(rows[0], tuple(rows[1:]), len(labels), batch)


def _row(
    name: str,
    degrees: tuple[int, ...],
    reached: tuple[float, ...],
    right: np.ndarray,
    of_cascade: np.ndarray,
    times: Mapping[str, np.ndarray],
    gmacs: Mapping[int, float],
) -> Row:
    gains = of_cascade.astype(float) - right
    cost = sum(share * gmacs[degree] for share, degree in zip(reached, degrees, strict=True))
    return Row(name, degrees, float(right.mean()), _error(right), float(times[name].mean()), _error(times[name]), cost,
               reached, float(gains.mean()), _error(gains))  # fmt: skip


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(np.std(values) / max(1, len(values)) ** 0.5)


def _name(degree: int) -> str:
    return f"degree {degree}"


def in_batches(indices: Iterable[int], batch: int, seed: int = 0) -> list[np.ndarray]:
    """Whole batches in random order: in a sorted folder, a batch would hold images of one class.

    Args:
        indices: Of images; those that fill no batch are left out, unless there is no other.
        batch: Images per call.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(np.fromiter(indices, int))
    whole = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
    return whole or [order]
