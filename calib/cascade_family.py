"""A compiled family and labelled images -> its cascade, found on one half of the images and measured on the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tocom.calib.cascade import CAUTION, Calibration, Candidate, Costs, Goal, calibrate
from tocom.calib.cascade_trial import Trial, compare, halves, in_batches, measure_times
from tocom.calib.labelled import LabelledImages
from tocom.runtime.degrees.cascade import Cascade, InferAt
from tocom.runtime.degrees.choose import SAVES, points
from tocom.runtime.degrees.local_latency import Times, local_latencies, this_machine
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import GateError, InputError, one_line
from tocom.runtime.manifest import Family

FEWEST = 50  # images of a half: fewer say nothing of either cost or accuracy
_CHUNK_BYTES = 512 << 20  # of prepared images held at a time
_SHORTFALL = 2.0  # standard errors that the other half may be short of the goal

OnProgress = Callable[[str, int, int], object]
"""(what is done, how much of it, of how much)."""


@dataclass(frozen=True)
class CascadeOptions:
    """How a cascade is found.

    Attributes:
        goal: What it must keep.
        batch: Images per call that costs are counted at.
        seed: Of the draw that halves the images.
        cache: Folder of measured latencies; the user's by default.

    Raises:
        InputError: The batch is below 1.
    """

    goal: Goal = field(default_factory=Goal)
    batch: int = 8
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"batch must be 1 or more, got {self.batch}")


@dataclass(frozen=True)
class FoundCascade:
    """What was found.

    Attributes:
        calibration: The cheapest cascade and single degree that keep the goal, on one half.
        trial: The cascade on the other half; None where none was worth measuring.
        cascade: What to write, with what was found; None where no cascade is cheaper than a single degree.
        images: How many calibrated.
    """

    calibration: Calibration
    trial: Trial | None
    cascade: Cascade | None
    images: int


def find_cascade(
    folder: Path, family: Family, images: LabelledImages, options: CascadeOptions, on_progress: OnProgress
) -> FoundCascade:
    """Finds the cascade of a family; writes nothing.

    Args:
        folder: Of the family.
        family: Its manifest.
        images: Labelled.
        options: How.
        on_progress: Told as work is done.

    Raises:
        InputError: The images or the family cannot be used.
        GateError: Nothing keeps the goal with the margin, or what does on one half does not on the other.
    """
    _ensure_usable(family, images, options.goal)
    labels = np.array(images.labels)
    fitting, reporting = halves(labels, options.seed)

    def tell(line: str) -> None:
        on_progress(line, 0, 1)

    whole, ones, many = (
        local_latencies(folder, family, batch, fixed=fixed, cache=options.cache, tell=tell)
        for batch, fixed in ((options.batch, True), (1, False), (options.batch, False))
    )
    logits = logits_of(folder, family, images, options.batch, on_progress)
    on_fitting = {degree: rows[fitting] for degree, rows in logits.items()}
    costs = Costs.of_times(whole, ones, many, options.batch)
    degrees = frontier(family, whole, on_fitting, labels[fitting])
    calibration = calibrate(on_fitting, labels[fitting], options.goal, costs, degrees)
    cascade, single = calibration.cascade, calibration.single
    if cascade is None and single is None:
        raise GateError(_nothing_keeps(options.goal, calibration.nearest, len(fitting)))
    if cascade is None or (single is not None and cascade.cost > (1 - SAVES) * single.cost):
        return FoundCascade(calibration, None, None, len(fitting))
    batches = [images.pixels(chosen) for chosen in in_batches(reporting, options.batch, options.seed)]
    times = measure_times(
        cascade.cascade, sorted(logits), partial(opened, folder, family), batches,
        lambda done: on_progress("timing the cascade beside single degrees", done, len(batches)),
    )  # fmt: skip
    gmacs = {entry.degree: entry.gmacs for entry in family.engines}
    on_reporting = {degree: rows[reporting] for degree, rows in logits.items()}
    trial = compare(cascade.cascade, on_reporting, labels[reporting], times, gmacs, options.batch)
    _ensure_kept(options.goal, trial)
    rivals = [row for row in trial.singles if single is not None and row.degrees == single.cascade.degrees]
    if any(trial.cascade.ms > (1 - SAVES) * row.ms for row in rivals):
        return FoundCascade(calibration, trial, None, len(fitting))
    stages = [replace(stage, recipe=family.entry(stage.degree).recipe) for stage in cascade.cascade.stages]
    return FoundCascade(calibration, trial, Cascade(stages, _found(options, trial, len(fitting))), len(fitting))


def _ensure_usable(family: Family, images: LabelledImages, goal: Goal) -> None:
    if len(family.engines) < 2:
        raise InputError(f"a cascade needs engines of two degrees or more, got {len(family.engines)}: compile further "
                         "ones with `tocom compile --degrees 8,16 ...`")  # fmt: skip
    if images.labels is None:
        folders = sorted({path.absolute().parent.name for path in images.paths})
        more = ", ..." if len(folders) > 3 else ""
        raise InputError("a cascade is found on images in one folder per class, each named like a class of the family "
                         f"or its index, got images in {', '.join(map(one_line, folders[:3]))}{more}")  # fmt: skip
    needed = 2 * max(FEWEST, goal.images)
    if len(images) < needed:
        raise InputError(f"a cascade is found on one half of the images and measured on the other: to tell what is "
                         f"asked for takes {needed} images or more, got {len(images)}")  # fmt: skip
    counts = Counter(images.labels)
    if len(counts) < 2:
        raise InputError("a cascade is found on images of two classes or more, got one: class "
                         f"{next(iter(counts))}")  # fmt: skip


def frontier(
    family: Family, times: dict[int, Times], logits: dict[int, np.ndarray], labels: np.ndarray
) -> tuple[int, ...]:
    """Degrees that pay, and that no other one beats in accuracy and time.

    Args:
        family: The manifest.
        times: Degree -> times at the batch that counts.
        logits: Degree -> [n, classes].
        labels: int [n].
    """
    for degree, rows in logits.items():
        top1 = float((rows.argmax(axis=1) == labels).mean())
        family = family.with_entry(replace(family.entry(degree), accuracy={"top1": top1}))
    return tuple(point.degree for point in points(family, times) if point.on_frontier)


@contextmanager
def opened(folder: Path, family: Family, degrees: Sequence[int], batch: int | None) -> Iterator[InferAt]:
    """The engines of some degrees, as a function of images and degree.

    Args:
        folder: Of the family.
        family: Its manifest.
        degrees: Which.
        batch: Images of most calls; None for any number.
    """
    with ExitStack() as stack:
        runners = {}
        for entry in map(family.entry, degrees):
            family.check_files(folder, entry)
            engine = open_engine(folder / entry.engine, entry.backend, precision=entry.precision, batch=batch)
            runners[entry.degree] = stack.enter_context(engine)
        yield lambda pixel_values, degree: runners[degree].infer(pixel_values)


def logits_of(
    folder: Path, family: Family, images: LabelledImages, batch: int, on_progress: OnProgress
) -> dict[int, np.ndarray]:
    """Runs every engine on every image.

    Args:
        folder: Of the family.
        family: Its manifest.
        images: To run on.
        batch: Images per call.
        on_progress: Told as images are done, each counted once per degree.

    Returns:
        Degree -> float32 [n, classes].

    Raises:
        InputError: An image or an engine cannot be used.
    """
    degrees = [entry.degree for entry in family.engines]
    length = max(batch, _CHUNK_BYTES // (4 * int(np.prod(images.spec.size))) // batch * batch)
    answers: dict[int, list[np.ndarray]] = {degree: [] for degree in degrees}
    total, done = len(images) * len(degrees), 0
    for start in range(0, len(images), length):
        pixels = images.pixels(range(start, min(start + length, len(images))))
        for degree in degrees:
            with opened(folder, family, [degree], batch) as infer:
                for first in range(0, len(pixels), batch):
                    answers[degree].append(infer(pixels[first : first + batch], degree))
                    done += len(answers[degree][-1])
                    on_progress(f"classifying at degree {degree}", done, total)
    logits = {degree: np.concatenate(parts) for degree, parts in answers.items()}
    for degree, rows in logits.items():
        if not np.isfinite(rows).all():
            raise InputError(f"logits must be finite, got others at degree {degree}: compile it again")
    return logits


def _nothing_keeps(goal: Goal, nearest: Candidate, images: int) -> str:
    """Only where an accuracy is asked for: the lowest degree loses nothing against itself."""
    degrees = ", ".join(map(str, nearest.cascade.degrees))
    return (f"neither a cascade nor a single degree is sure to keep an accuracy of {goal.accuracy:g}: the nearest, "
            f"{degrees}, has {nearest.accuracy:.4g} on the {images} images that calibrate, and {CAUTION:g} standard "
            "errors must lie between. Ask for less, or give more images")  # fmt: skip


def _ensure_kept(goal: Goal, trial: Trial) -> None:
    row, base = trial.cascade, trial.singles[0]
    if goal.accuracy is not None:
        short, error, asked = goal.accuracy - row.accuracy, row.error, f"{goal.accuracy:g}"
    else:
        short, error = -base.gain - goal.max_drop / 100, base.gain_error
        asked = f"{goal.max_drop:g} points below degree {base.degrees[0]}'s {base.accuracy:.4g}"
    if short > _SHORTFALL * error and short > 0:
        raise GateError(f"the cascade that kept {asked} on one half of the images has {row.accuracy:.4g} on the other: "
                        "give more images, or ask for less")  # fmt: skip


def _found(options: CascadeOptions, trial: Trial, fitted: int) -> dict[str, Any]:
    """What goes into cascade.json."""
    lowest = trial.singles[0]
    return {
        "goal": asdict(options.goal),
        "calibrated_on": fitted,
        "images": trial.images,
        "accuracy": trial.cascade.accuracy,
        "standard_error": trial.cascade.error,
        "against_degree": lowest.degrees[0],
        "gain": lowest.gain,
        "gain_standard_error": lowest.gain_error,
        "batch": trial.batch,
        "ms_per_image": round(trial.cascade.ms, 5),
        "ms_per_image_of_degree": {str(row.degrees[0]): round(row.ms, 5) for row in trial.singles},
        "gmacs": trial.cascade.gmacs,
        "shares": list(trial.cascade.shares),
        "machine": this_machine(),
    }
