"""Logits of labelled images at several degrees -> the cascade that keeps an accuracy at the least mean cost.

Per degree a temperature makes probabilities honest (Guo et al. 2017): the one with the least negative log-likelihood.
Then every pair and triple of degrees is tried with every combination of thresholds on a grid. A cascade counts only if
it keeps the accuracy with a margin of one standard error, because the best of thousands that were tried on the same
images owes some of its accuracy to chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.cascade import CascadePlan, Stage, confidence
from runtime.errors import InputError
from runtime.local_latency import Times

CAUTION = 1.0  # standard errors that an accuracy must lie above what is asked for
TEMPERATURES = (0.01, 100.0)  # what is beyond says only that all images are right, or that there is nothing to know

_GRID = 40  # thresholds per stage
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Goal:
    """What a cascade must keep.

    Attributes:
        accuracy: Least top-1, a share in 0..1; None to go by what is lost instead.
        max_drop: Top-1 that may be lost against the least compressed degree, in points.

    Raises:
        InputError: A number is out of range.
    """

    accuracy: float | None = None
    max_drop: float = 0.5

    def __post_init__(self) -> None:
        if self.accuracy is not None and not 0 < self.accuracy <= 1:
            raise InputError(f"an accuracy to keep must be a share above 0, up to 1, got {self.accuracy}")
        if not 0 <= self.max_drop <= 100:
            raise InputError(f"points of accuracy that may be lost must be in 0..100, got {self.max_drop}")

    def kept(self, right: np.ndarray, differ: np.ndarray, base: int, count: int) -> np.ndarray:
        """Whether the goal is kept, with the margin.

        The variances count one image more than was seen to differ: none in a few images does not prove that none would.

        Args:
            right: Images that each candidate is right on.
            differ: Images on which one is right and the other wrong, candidate and least compressed degree.
            base: Images that the least compressed degree is right on.
            count: Images in all.
        """
        share = np.asarray(right) / count
        if self.accuracy is not None:
            variance = share * (1 - share) + 1 / count
            return share - CAUTION * np.sqrt(variance / count) >= self.accuracy
        gain = (np.asarray(right) - base) / count
        variance = (np.asarray(differ) + 1) / count - gain**2
        return gain - CAUTION * np.sqrt(variance / count) >= -self.max_drop / 100

    @property
    def images(self) -> int:
        """How many images are needed for a candidate that errs nowhere to be seen to keep the goal."""
        allowed = 1 - self.accuracy if self.accuracy is not None else self.max_drop / 100
        return math.ceil(CAUTION / allowed) if allowed else 0


@dataclass(frozen=True)
class Costs:
    """Mean cost of an image at every degree, where not every image of a batch comes to it.

    Attributes:
        start: Degree -> cost of a call, whatever its images.
        each: Degree -> cost of each image of a call.
        batch: Images that enter the cascade together.
    """

    start: Mapping[int, float]
    each: Mapping[int, float]
    batch: int = 1

    @classmethod
    def of_times(cls, ones: Mapping[int, Times], many: Mapping[int, Times], batch: int) -> Costs:
        """In ms, linear between calls with one image and calls with a whole batch.

        Args:
            ones: Degree -> times with one image.
            many: Degree -> times with a whole batch.
            batch: Images of a whole batch, 2 or more for the two to differ.
        """
        each = {degree: max(0.0, (many[degree].p50_ms - ones[degree].p50_ms) / max(1, batch - 1)) for degree in many}
        start = {degree: max(0.0, many[degree].p50_ms - batch * each[degree]) for degree in many}
        return cls(start, each, batch)

    def of(self, degree: int, share: float | np.ndarray) -> float | np.ndarray:
        """Mean cost per image that enters the cascade, where a share of them comes to a degree, each by itself."""
        called = 1 - (1 - np.asarray(share)) ** self.batch
        return self.start[degree] * called / self.batch + self.each[degree] * share


@dataclass(frozen=True)
class Candidate:
    """A cascade or a single degree, as it did on the calibration images.

    Attributes:
        plan: Its stages; a single degree has one.
        accuracy: Top-1, a share.
        cost: Mean per image, in the unit of the costs it was found by.
        shares: Share of images that reach each stage.
    """

    plan: CascadePlan
    accuracy: float
    cost: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        cascade: The cheapest that keeps the goal; None where none does.
        single: The cheapest single degree that keeps it; None where none does.
        nearest: The most accurate of all, cascades and single degrees.
    """

    cascade: Candidate | None
    single: Candidate | None
    nearest: Candidate


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood, by golden-section search for its logarithm.

    The likelihood is concave in 1 / temperature, so along the logarithm there is one best place.

    Args:
        logits: [n, classes].
        labels: int [n].

    Returns:
        Within `TEMPERATURES`.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float((np.log(np.exp(shifted * scale).sum(axis=1)) - own * scale).mean())

    low, high = map(math.log, TEMPERATURES)
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    losses = [loss(at) for at in inner]
    while high - low > 1e-7:
        if losses[0] <= losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - _GOLDEN * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + _GOLDEN * (high - low)
            losses[1] = loss(inner[1])
    return math.exp((low + high) / 2)


def calibrate(
    logits: Mapping[int, np.ndarray], labels: np.ndarray, goal: Goal, costs: Costs, degrees: Sequence[int] = ()
) -> Calibration:
    """Finds the cheapest cascade that keeps a goal.

    Args:
        logits: Degree -> [n, classes]; the lowest is what a drop is measured against.
        labels: int [n].
        goal: What to keep.
        costs: What is to be least.
        degrees: Those that may take part; all by default.
    """
    base = logits[min(logits)].argmax(axis=1) == labels
    stages = [_Scored.of(degree, logits[degree], labels, base) for degree in sorted(degrees or logits, reverse=True)]
    best: dict[bool, Candidate] = {}
    nearest: Candidate | None = None
    for chain in _chains(stages):
        tried = _tried(chain, costs)
        kept = goal.kept(tried.right, tried.differ, int(base.sum()), len(labels))
        if goal.accuracy is None and [stage.degree for stage in chain] == [min(logits)]:
            kept = np.array(True)  # nothing is lost against itself, however few images say so
        cheapest = int(np.where(kept, tried.cost, np.inf).argmin())
        found = best.get(len(chain) > 1)
        if kept.flat[cheapest] and (found is None or tried.cost.flat[cheapest] < found.cost):
            best[len(chain) > 1] = tried.candidate(chain, cheapest, len(labels))
        closest = int(tried.right.argmax())
        if nearest is None or tried.right.flat[closest] / len(labels) > nearest.accuracy:
            nearest = tried.candidate(chain, closest, len(labels))
    return Calibration(best.get(True), best.get(False), nearest)


def _chains(stages: Sequence[_Scored]) -> Iterator[tuple[_Scored, ...]]:
    """Single degrees, pairs and triples, the shorter ones first, so that of equals the simplest is taken."""
    for length in (1, 2, 3):
        for chain in itertools.combinations(stages, length):
            if all(len(stage.thresholds) for stage in chain[:-1]):  # else all images are equally sure
                yield chain


@dataclass(frozen=True)
class _Scored:
    """A degree on the calibration images.

    Attributes:
        degree: Which.
        temperature: Of its confidences.
        right: float64 [n], 1 where it is right.
        differ: float64 [n], 1 where only one of it and the least compressed degree is right.
        thresholds: [G], rising.
        keeps: float64 [G, n], 1 where it would answer at a threshold.
    """

    degree: int
    temperature: float
    right: np.ndarray
    differ: np.ndarray
    thresholds: np.ndarray
    keeps: np.ndarray

    @classmethod
    def of(cls, degree: int, logits: np.ndarray, labels: np.ndarray, base: np.ndarray) -> _Scored:
        temperature = round(fit_temperature(logits, labels), 6)
        sureness = confidence(logits, temperature)
        right = logits.argmax(axis=1) == labels
        thresholds = _thresholds(sureness)
        keeps = sureness >= thresholds[:, None]
        return cls(degree, temperature, right.astype(float), (right != base).astype(float), thresholds,
                   keeps.astype(float))  # fmt: skip


def _thresholds(sureness: np.ndarray) -> np.ndarray:
    """Places halfway between two images, evenly spread over the images; rounded to what a file shows."""
    levels = np.unique(sureness)
    between = np.unique(np.round((levels[1:] + levels[:-1]) / 2, 9))
    if len(between) <= _GRID:
        return between
    wanted = np.quantile(sureness, np.arange(1, _GRID + 1) / (_GRID + 1))
    return np.unique(between[np.clip(np.searchsorted(between, wanted), 0, len(between) - 1)])


@dataclass(frozen=True)
class _Tried:
    """All combinations of thresholds of a chain; arrays [G, ...] with an axis per stage but the last."""

    right: np.ndarray
    differ: np.ndarray
    cost: np.ndarray
    shares: tuple[np.ndarray, ...]

    def candidate(self, chain: Sequence[_Scored], index: int, count: int) -> Candidate:
        """The combination at a flat index."""
        places = np.unravel_index(index, self.right.shape)
        thresholds = [float(stage.thresholds[place]) for stage, place in zip(chain, places, strict=False)]
        stages = [Stage(stage.degree, stage.temperature, threshold)
                  for stage, threshold in zip(chain, [*thresholds, 0.0], strict=True)]  # fmt: skip
        shares = tuple(float(np.broadcast_to(share, self.right.shape)[places]) for share in self.shares)
        return Candidate(CascadePlan(stages), float(self.right[places] / count), float(self.cost[places]), shares)


def _tried(chain: Sequence[_Scored], costs: Costs) -> _Tried:
    parts = list(_parts(chain))
    shape = np.broadcast_shapes(*(right.shape for right, _, _ in parts))
    return _Tried(
        right=sum((right for right, _, _ in parts), np.zeros(shape)),
        differ=sum((differ for _, differ, _ in parts), np.zeros(shape)),
        cost=sum((costs.of(stage.degree, share) for stage, (_, _, share) in zip(chain, parts, strict=True)),
                 np.zeros(shape)),
        shares=tuple(share for _, _, share in parts),
    )  # fmt: skip


def _parts(chain: Sequence[_Scored]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every stage, how many of its own images are right, how many differ, and the share that reaches it.

    Sums over images are products of matrices: [thresholds of the first stage, n] x [n, thresholds of the second].
    """
    first, *others = chain
    count = len(first.right)
    if not others:
        yield np.array(first.right.sum()), np.array(first.differ.sum()), np.array(1.0)
        return
    left = 1 - first.keeps
    axis = (slice(None), *(None,) * (len(others) - 1))
    yield (first.keeps @ first.right)[axis], (first.keeps @ first.differ)[axis], np.array(1.0)
    second, *last = others
    if not last:
        yield left @ second.right, left @ second.differ, left.mean(axis=1)
        return
    yield (left * second.right) @ second.keeps.T, (left * second.differ) @ second.keeps.T, left.mean(axis=1)[axis]
    (third,) = last
    rest = (1 - second.keeps).T
    yield (left * third.right) @ rest, (left * third.differ) @ rest, left @ rest / count
