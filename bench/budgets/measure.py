"""What is measured of a subject: logits, cascades by multiply-accumulates and by time, and how far to trust them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.budgets.subjects import Subject
from tocom.calib.cascade import Candidate, Costs, Goal, calibrate, fit_temperature, most_accurate
from tocom.calib.cascade_family import frontier, opened
from tocom.calib.cascade_trial import in_batches, measure_times
from tocom.runtime.degrees.cascade import Cascade, confidence, run, shares
from tocom.runtime.degrees.choose import SAVES
from tocom.runtime.degrees.local_latency import Times, local_latencies
from tocom.runtime.manifest import Family

_BATCH = 64  # of what is not timed
_BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    name: str  # as in the folder of finished stages
    seeds: tuple[int, ...] = (0, 1, 2)  # of the fine-tunings
    tasks: tuple[str, ...] = ("board", "letters", "missing")  # of the experiment
    compile_sheets: int = 512  # to choose scales on, and as many others to prove engines on
    val_sheets: int = 2048  # that cascades are calibrated on
    test_sheets: int = 8192  # that everything is reported on
    drops: tuple[float, ...] = (0.5, 1.0, 2.0)  # points of top-1 that a cascade may lose
    batches: tuple[int, ...] = (8, 32)  # images per call that times are measured at
    draws: int = 40  # calibrations on fewer sheets, to see how often what they promise holds
    draw_sheets: int = 500  # sheets of each


FULL = Effort("full")
QUICK = Effort("quick", seeds=(0,), tasks=("board",), compile_sheets=64, val_sheets=512, test_sheets=1024,
               drops=(2.0,), batches=(8,), draws=5, draw_sheets=256)  # fmt: skip


@dataclass(frozen=True)
class Given:
    """A subject with its family, and what every engine says of every sheet."""

    subject: Subject  # which
    folder: Path  # of the family
    family: Family  # its manifest
    val: Mapping[int, np.ndarray]  # degree -> logits on the validation sheets
    val_labels: np.ndarray  # their classes
    test: Mapping[int, np.ndarray]  # degree -> logits on the test sheets
    test_labels: np.ndarray  # their classes

    @functools.cached_property
    def right(self) -> dict[int, np.ndarray]:
        """Degree -> where it is right on the test sheets."""
        return {degree: logits.argmax(axis=1) == self.test_labels for degree, logits in self.test.items()}

    @property
    def gmacs(self) -> dict[int, float]:
        """Degree -> multiply-accumulates of an image, in units of 1e9."""
        return {entry.degree: entry.gmacs for entry in self.family.engines}

    @classmethod
    def of(cls, subject: Subject, folder: Path, effort: Effort, kept: Path) -> Given:
        """Runs all engines, or reads what they said earlier."""
        family = Family.read(folder)
        val, test = subject.sheets("val", effort.val_sheets), subject.sheets("test", effort.test_sheets)
        if not kept.exists():
            found = {
                f"{split} {entry.degree}": _logits(folder, family, entry.degree, pixels)
                for entry in family.engines
                for split, (pixels, _) in (("val", val), ("test", test))
            }
            with kept.with_suffix(".part").open("wb") as stream:
                np.savez(stream, **found)
            kept.with_suffix(".part").replace(kept)
        with np.load(kept) as stored:
            logits = [{entry.degree: stored[f"{split} {entry.degree}"] for entry in family.engines}
                      for split in ("val", "test")]  # fmt: skip
        return cls(subject, folder, family, logits[0], val[1], logits[1], test[1])


def answers(
    cascade: Cascade, logits: Mapping[int, np.ndarray], labels: np.ndarray
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Carries out a cascade on logits that are known.

    Returns:
        Where it is right, bool [n], and the share that reaches each stage.
    """
    places = np.arange(len(labels), dtype=np.float32)[:, None, None, None]
    answer = run(cascade, lambda images, degree: logits[degree][images[:, 0, 0, 0].astype(int)], places)
    return answer.logits.argmax(axis=1) == labels, shares(cascade, answer.degrees)


def _logits(folder: Path, family: Family, degree: int, pixels: np.ndarray) -> np.ndarray:
    with opened(folder, family, [degree], _BATCH) as infer:
        return np.concatenate([infer(pixels[at : at + _BATCH], degree) for at in range(0, len(pixels), _BATCH)])


def singles(given: Given) -> dict[str, Any]:
    """Every degree on the test sheets, and how honest its probabilities are before and after its temperature."""
    found = {}
    for degree, right in given.right.items():
        temperature = fit_temperature(given.val[degree], given.val_labels)
        found[str(degree)] = {
            "scale": given.family.entry(degree).scale,
            "gmacs": given.gmacs[degree],
            "accuracy": 100 * float(right.mean()),
            "error": 100 * float(right.std() / len(right) ** 0.5),
            "temperature": temperature,
            "calibration_error": [
                calibration_error(confidence(given.test[degree], each), right) for each in (1.0, temperature)
            ],
        }
    return found


def calibration_error(sureness: np.ndarray, right: np.ndarray) -> float:
    """How far confidence and accuracy lie apart, in points, over equally wide bins (Guo et al. 2017, equation 3)."""
    bins = np.minimum((sureness * _BINS).astype(int), _BINS - 1)
    gaps = [abs((right[bins == each].astype(float) - sureness[bins == each]).sum()) for each in range(_BINS)]
    return float(100 * sum(gaps) / len(sureness))


def by_gmacs(given: Given, effort: Effort) -> list[dict[str, Any]]:
    """For every drop, the cascade of the least mean multiply-accumulates, held against single degrees of equal cost."""
    costs = Costs.of_gmacs(given.gmacs)
    rows = []
    for drop in effort.drops:
        found = calibrate(given.val, given.val_labels, Goal(max_drop=drop), costs)
        single = found.single.cascade.degrees[0]  # there is one: the lowest degree loses nothing against itself
        row = {"drop": drop, "single": single, "single_cost": given.gmacs[single], "cascade": None, "pays": False}
        if (cascade := found.cascade) is not None:
            right, reached = answers(cascade.cascade, given.test, given.test_labels)
            cost = sum(
                given.gmacs[degree] * share for degree, share in zip(cascade.cascade.degrees, reached, strict=True)
            )
            row |= _held(given, cascade, right, reached, given.gmacs, cost)
            row["pays"] = cascade.cost <= (1 - SAVES) * found.single.cost
        rows.append(row)
    return rows


def at_equal_cost(given: Given) -> list[dict[str, Any]]:
    """For every degree but the cheapest and the dearest, the most accurate cascade that costs no more."""
    costs = Costs.of_gmacs(given.gmacs)
    rows = []
    for degree in sorted(given.gmacs, key=given.gmacs.get)[1:-1]:
        found = most_accurate(given.val, given.val_labels, costs, given.gmacs[degree])
        right, reached = answers(found.cascade, given.test, given.test_labels)
        cost = sum(given.gmacs[stage] * share for stage, share in zip(found.cascade.degrees, reached, strict=True))
        gains = 100 * (right.astype(float) - given.right[degree])
        rows.append({
            "degree": degree, "its_cost": given.gmacs[degree], "its_accuracy": 100 * float(given.right[degree].mean()),
            "gain": float(gains.mean()), "gain_error": float(gains.std() / len(gains) ** 0.5),
            **_held(given, found, right, reached, given.gmacs, max(cost, given.gmacs[degree])), "cost": cost,
        })  # fmt: skip
    return rows


def _held(
    given: Given,
    found: Candidate,
    right: np.ndarray,
    reached: Sequence[float],
    cost_of: Mapping[int, float],
    cost: float,
) -> dict[str, Any]:
    """A cascade on the test sheets, against what single degrees do at its cost."""
    lowest = min(given.test)
    lost = given.right[lowest].astype(float) - right
    rivals = {}
    for kind, best in (("single", best_single), ("mixture", best_mixture)):
        rival = best(given.right, cost_of, cost)
        if rival is not None:
            gain, error = rival.gain(right)
            rivals[kind] = {"name": rival.name, "cost": rival.cost, "accuracy": 100 * rival.accuracy, "gain": gain,
                            "gain_error": error}  # fmt: skip
    return {
        "cascade": list(found.cascade.degrees),
        "thresholds": [stage.threshold for stage in found.cascade.stages[:-1]],
        "shares": list(reached),
        "cost": cost,
        "accuracy": 100 * float(right.mean()),
        "error": 100 * float(right.std() / len(right) ** 0.5),
        "lost": 100 * float(lost.mean()),
        "lost_error": 100 * float(lost.std() / len(lost) ** 0.5),
        "rivals": rivals,
    }


def by_time(given: Given, effort: Effort, cache: Path) -> list[dict[str, Any]]:
    """For every batch size and drop, the cascade of the least mean time here, timed beside every single degree."""
    rows = []
    pixels, _ = given.subject.sheets("test", effort.test_sheets)
    for batch in effort.batches:
        whole, ones, many = (
            local_latencies(given.folder, given.family, size, fixed=fixed, cache=cache)
            for size, fixed in ((batch, True), (1, False), (batch, False))
        )
        costs = Costs.of_times(whole, ones, many, batch)
        degrees = frontier(given.family, whole, given.val, given.val_labels)
        for drop in effort.drops:
            found = calibrate(given.val, given.val_labels, Goal(max_drop=drop), costs, degrees)
            row = {"batch": batch, "drop": drop, "times": _plain(whole), "cascade": None, "pays": False}
            if found.single is not None:
                row |= {"single": found.single.cascade.degrees[0], "single_predicted": found.single.cost}
            if found.cascade is not None:
                row |= _timed(given, found.cascade, batch, pixels)
                if found.single is not None:
                    row["single_cost"] = row["measured"][str(row["single"])]
                    row["pays"] = found.cascade.cost <= (1 - SAVES) * found.single.cost and (
                        row["cost"] <= (1 - SAVES) * row["single_cost"]
                    )
            rows.append(row)
    return rows


def _timed(given: Given, found: Candidate, batch: int, pixels: np.ndarray) -> dict[str, Any]:
    batches = [pixels[chosen] for chosen in in_batches(range(len(pixels)), batch)]
    times = measure_times(
        found.cascade, sorted(given.test), functools.partial(opened, given.folder, given.family), batches
    )
    cost_of = {degree: float(times[f"degree {degree}"].mean()) for degree in given.test}
    right, reached = answers(found.cascade, given.test, given.test_labels)
    return {
        **_held(given, found, right, reached, cost_of, float(times["cascade"].mean())),
        "cost_error": float(times["cascade"].std() / len(times["cascade"]) ** 0.5),
        "predicted": found.cost,
        "measured": {str(degree): cost for degree, cost in cost_of.items()},
    }


def _plain(times: Mapping[int, Times]) -> dict[str, float]:
    return {str(degree): each.p50_ms for degree, each in times.items()}


def promises(given: Given, effort: Effort) -> list[dict[str, Any]]:
    """Cascades from few validation sheets, drawn again and again: what they lose on others.

    Validation sheets that were not drawn are like those that were; test sheets are by other hands.
    """
    costs = Costs.of_gmacs(given.gmacs)
    lowest = min(given.test)
    rows = []
    for drop in effort.drops:
        alike, test = [], []
        for draw in range(effort.draws):
            order = np.random.default_rng(draw).permutation(len(given.val_labels))
            chosen, others = order[: effort.draw_sheets], order[effort.draw_sheets :]
            fitted = {degree: each[chosen] for degree, each in given.val.items()}
            found = calibrate(fitted, given.val_labels[chosen], Goal(max_drop=drop), costs).cascade
            if found is not None:
                left = {degree: each[others] for degree, each in given.val.items()}
                alike.append(_lost(found.cascade, left, given.val_labels[others], lowest))
                test.append(_lost(found.cascade, given.test, given.test_labels, lowest))
        rows.append({"drop": drop, "draws": effort.draws, "alike": alike, "test": test})
    return rows


def _lost(cascade: Cascade, logits: Mapping[int, np.ndarray], labels: np.ndarray, lowest: int) -> float:
    right, _ = answers(cascade, logits, labels)
    return 100 * float((logits[lowest].argmax(axis=1) == labels).mean() - right.mean())


@dataclass(frozen=True)
class Rival:
    """The best that single degrees do at a mean cost."""

    name: str  # "degree 8", or the two degrees that images are sent to at random, and how many to the cheaper one
    cost: float  # its mean cost
    right: np.ndarray  # how often each image is right, 0 to 1: chance may decide the degree; float64 [n]

    @property
    def accuracy(self) -> float:
        """Top-1, a share."""
        return float(self.right.mean())

    def gain(self, of: np.ndarray) -> tuple[float, float]:
        """How much better something is, in points of top-1, with the standard error of the paired difference."""
        gains = 100 * (of.astype(float) - self.right)
        return float(gains.mean()), float(gains.std() / len(gains) ** 0.5)


def best_single(right: Mapping[int, np.ndarray], cost: Mapping[int, float], at: float) -> Rival | None:
    """The single degree of equal or lower cost that is right most often on these very images.

    That it is picked by what is reported favours it.

    Returns:
        None where every degree costs more.
    """
    within = [degree for degree in right if cost[degree] <= at]
    if not within:
        return None
    best = max(within, key=lambda degree: right[degree].mean())
    return Rival(f"degree {best}", cost[best], right[best].astype(float))


def best_mixture(right: Mapping[int, np.ndarray], cost: Mapping[int, float], at: float) -> Rival | None:
    """The best single degree, or pair of degrees between which images are drawn by lot, of exactly equal mean cost.

    It is the upper envelope of all lines between degrees, so it fills the gaps between them.

    Returns:
        None where every degree costs more.
    """
    best = best_single(right, cost, at)
    for cheap, dear in itertools.permutations(right, 2):
        if cost[cheap] <= at < cost[dear]:
            share = (cost[dear] - at) / (cost[dear] - cost[cheap])
            mixed = share * right[cheap] + (1 - share) * right[dear]
            if best is None or mixed.mean() > best.accuracy:
                best = Rival(f"{share:.0%} at {cheap}, the rest at {dear}", at, mixed)
    return best
