"""Logits of labelled images at several degrees -> the cascade that keeps an accuracy at the least mean cost.

Per degree a temperature makes probabilities honest (Guo et al. 2017): the one with the least negative log-likelihood.
They then mean the same at every degree, so that one threshold serves all stages of a chain. It is lowered from where
every image goes on, for as long as the accuracy is kept with a margin: the first that is not ends the search (fixed
sequence testing, as in Angelopoulos et al. 2021, "Learn then Test"). The best of many that are tried on the same images
owes some of its accuracy to chance; tried in this order, it owes little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tocom.runtime.degrees.cascade import Cascade, Stage, confidence
from tocom.runtime.degrees.local_latency import Times
from tocom.runtime.errors import InputError

CAUTION = 2.0  # standard errors that an accuracy must lie above what is asked for
TEMPERATURES = (0.01, 100.0)  # what is beyond says only that all images are right, or that there is nothing to know

_GRID = 64  # thresholds of a chain
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

        The variances count one image more than was seen to differ: none in a few images does not show that none would.

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
        alone: Degree -> cost of an image where the whole batch comes, as to the first stage.
        start: Degree -> cost of a call in a later stage, whatever its images.
        per_image: Degree -> cost of each image of such a call.
        batch: Images that enter the cascade together.
    """

    alone: Mapping[int, float]
    start: Mapping[int, float]
    per_image: Mapping[int, float]
    batch: int = 1

    @classmethod
    def of_gmacs(cls, gmacs: Mapping[int, float]) -> Costs:
        """In multiply-accumulates, which no call costs by itself.

        Args:
            gmacs: Degree -> of an image.
        """
        return cls(gmacs, dict.fromkeys(gmacs, 0.0), gmacs)

    @classmethod
    def of_times(
        cls, whole: Mapping[int, Times], ones: Mapping[int, Times], many: Mapping[int, Times], batch: int
    ) -> Costs:
        """In ms; of a later stage linear between one image and a whole batch.

        Args:
            whole: Degree -> times of a whole batch, with engines for exactly so many images.
            ones: Degree -> times of one image, with engines for any number.
            many: Degree -> times of a whole batch, with engines for any number.
            batch: Images of a whole batch.
        """
        per_image = {
            degree: max(0.0, (many[degree].p50_ms - ones[degree].p50_ms) / max(1, batch - 1)) for degree in many
        }
        start = {degree: max(0.0, many[degree].p50_ms - batch * per_image[degree]) for degree in many}
        return cls({degree: times.p50_ms / batch for degree, times in whole.items()}, start, per_image, batch)

    def later(self, degree: int, share: float | np.ndarray) -> float | np.ndarray:
        """Mean cost per image that enters the cascade, where a share of them comes to a degree, each by itself."""
        called = 1 - (1 - np.asarray(share)) ** self.batch
        return self.start[degree] * called / self.batch + self.per_image[degree] * share


@dataclass(frozen=True)
class Candidate:
    """A cascade or a single degree, as it did on the calibration images.

    Attributes:
        cascade: Its stages; a single degree has one.
        accuracy: Top-1, a share.
        cost: Mean per image, in the unit of the costs it was found by.
        shares: Share of images that reach each stage.
    """

    cascade: Cascade
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
    of_label = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float((np.log(np.exp(shifted * scale).sum(axis=1)) - of_label * scale).mean())

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
            kept |= True  # nothing is lost against itself, however few images say so
        kept = np.logical_and.accumulate(kept)
        cheapest = int(np.where(kept, tried.cost, np.inf).argmin())
        cheapest_yet = best.get(len(chain) > 1)
        if kept[cheapest] and (cheapest_yet is None or tried.cost[cheapest] < cheapest_yet.cost):
            best[len(chain) > 1] = tried.candidate(chain, cheapest, len(labels))
        closest = int(tried.right.argmax())
        if nearest is None or tried.right[closest] / len(labels) > nearest.accuracy:
            nearest = tried.candidate(chain, closest, len(labels))
    return Calibration(best.get(True), best.get(False), nearest)


def most_accurate(
    logits: Mapping[int, np.ndarray], labels: np.ndarray, costs: Costs, at: float, degrees: Sequence[int] = ()
) -> Candidate | None:
    """The cascade or single degree that is right most often at a mean cost; of equals, the one with fewest stages.

    Of a chain, only the highest threshold that keeps to the cost is tried, since sending on more images hardly ever
    harms; so few are compared, and the best owes little to chance.

    Args:
        logits: Degree -> [n, classes].
        labels: int [n].
        costs: What is limited.
        at: The most that it may be, mean per image.
        degrees: Those that may take part; all by default.

    Returns:
        None where even the cheapest degree costs more.
    """
    base = logits[min(logits)].argmax(axis=1) == labels
    stages = [_Scored.of(degree, logits[degree], labels, base) for degree in sorted(degrees or logits, reverse=True)]
    best: Candidate | None = None
    for chain in _chains(stages):
        tried = _tried(chain, costs)
        if (tried.cost <= at).any():
            candidate = tried.candidate(chain, int((tried.cost <= at).argmax()), len(labels))
            if best is None or candidate.accuracy > best.accuracy:
                best = candidate
    return best


def _chains(stages: Sequence[_Scored]) -> Iterator[tuple[_Scored, ...]]:
    """Single degrees, pairs and triples, the shorter ones first, so that of equals the simplest is taken."""
    for length in (1, 2, 3):
        yield from itertools.combinations(stages, length)


@dataclass(frozen=True)
class _Scored:
    """A degree on the calibration images.

    Attributes:
        degree: Which.
        temperature: Of its confidences.
        sureness: float64 [n], how sure it is.
        right: float64 [n], 1 where it is right.
        differ: float64 [n], 1 where only one of it and the least compressed degree is right.
    """

    degree: int
    temperature: float
    sureness: np.ndarray
    right: np.ndarray
    differ: np.ndarray

    @classmethod
    def of(cls, degree: int, logits: np.ndarray, labels: np.ndarray, base: np.ndarray) -> _Scored:
        temperature = round(fit_temperature(logits, labels), 6)
        right = logits.argmax(axis=1) == labels
        return cls(degree, temperature, confidence(logits, temperature), right.astype(float),
                   (right != base).astype(float))  # fmt: skip


def thresholds(sureness: np.ndarray) -> np.ndarray:
    """What to try: places halfway between two confidences, evenly spread over the images, falling.

    Args:
        sureness: Confidences of all stages but the last.

    Returns:
        [G], rounded to what a file shows; of equally sure images only 1, above which nothing lies.
    """
    levels = np.unique(sureness)
    between = np.unique(np.round((levels[1:] + levels[:-1]) / 2, 9))
    if len(between) > _GRID:
        levels = np.quantile(sureness, np.arange(1, _GRID + 1) / (_GRID + 1))
        between = np.unique(between[np.clip(np.searchsorted(between, levels), 0, len(between) - 1)])
    return between[::-1] if len(between) else np.ones(1)


@dataclass(frozen=True)
class _Tried:
    """A chain at every threshold, falling: arrays [G]."""

    thresholds: np.ndarray
    right: np.ndarray
    differ: np.ndarray
    cost: np.ndarray
    shares: tuple[np.ndarray, ...]

    def candidate(self, chain: Sequence[_Scored], at: int, count: int) -> Candidate:
        """The cascade at one of the thresholds."""
        placed = [float(self.thresholds[at])] * (len(chain) - 1)
        stages = [Stage(stage.degree, stage.temperature, threshold)
                  for stage, threshold in zip(chain, [*placed, 0.0], strict=True)]  # fmt: skip
        shares = tuple(float(share[at]) for share in self.shares)
        return Candidate(Cascade(stages), float(self.right[at] / count), float(self.cost[at]), shares)


def _tried(chain: Sequence[_Scored], costs: Costs) -> _Tried:
    *inner, last = chain
    placed = thresholds(np.concatenate([stage.sureness for stage in inner])) if inner else np.ones(1)
    waiting = np.ones((len(placed), len(last.right)), bool)
    right, differ, cost = np.zeros(len(placed)), np.zeros(len(placed)), np.zeros(len(placed))
    shares = []
    for stage in chain:
        answered = waiting if stage is last else waiting & (stage.sureness >= placed[:, None])
        shares.append(waiting.mean(axis=1))
        right += answered @ stage.right
        differ += answered @ stage.differ
        cost += costs.alone[stage.degree] if stage is chain[0] else costs.later(stage.degree, shares[-1])
        waiting = waiting & ~answered
    return _Tried(placed, right, differ, cost, tuple(shares))
