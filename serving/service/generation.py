"""One version of a family, open: its own copy of the files, the workers that hold its engines, and their scheduler."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tocom.runtime.degrees.choose import Point, choose, points
from tocom.runtime.degrees.local_latency import Times, local_latencies
from tocom.runtime.engines.merge_trace import MergeTracer
from tocom.runtime.errors import GateError, InputError, one_line
from tocom.runtime.manifest import Family
from tocom.runtime.predictor import load
from tocom.serving.service.degree_policy import DegreePolicy, Speed, useful
from tocom.serving.service.engine_process import EngineProcess
from tocom.serving.service.errors import EngineFailedError
from tocom.serving.service.scheduler import Infer, Limits, Scheduler, Want

MAX_PIXELS = 40_000_000  # of an image that is sent encoded: decoded, three bytes each


@dataclass(frozen=True)
class ServeOptions:
    """How a family is served.

    Attributes:
        objective_ms: What 99 of 100 requests are to take at most; while the load is too high for it, the degree rises.
            None: the degree never changes.
        degree: Where it begins: the least compressed degree that load may choose. None: the family's lowest.
        budget_ms: In place of a degree: the most accurate one whose call for one image keeps to it.
        min_accuracy: Least top-1 of a degree that load may choose, a share in 0..1.
        workers: Processes that hold the engines. 0: they run in this process, which is faster for small networks, and
            ends with them when one crashes.
        threads: CPU threads for one batch; the engine's choice by default.
        limits: Of the queue.
        max_pixels: Of an image that is sent encoded; the images of a request may have four times as many together.
        engine_timeout_s: After so long a batch counts as hung, and the process that runs it is replaced.
        hold_s: Seconds that a lower degree must have sufficed before it is fallen back to.
    """

    objective_ms: float | None = None
    degree: int | None = None
    budget_ms: float | None = None
    min_accuracy: float | None = None
    workers: int = 1
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    max_pixels: int = MAX_PIXELS
    engine_timeout_s: float = 60.0
    hold_s: float = 2.0

    def __post_init__(self) -> None:
        if self.objective_ms is not None and not (math.isfinite(self.objective_ms) and self.objective_ms > 0):
            raise InputError(f"objective_ms must be more than 0 ms, got {self.objective_ms}")
        if self.degree is not None and self.budget_ms is not None:
            raise InputError("give a degree to begin at, or a budget to choose one by, not both")
        if not self.engine_timeout_s > 0:
            raise InputError(f"engine_timeout_s must be more than 0 seconds, got {self.engine_timeout_s}")
        if self.workers < 0 or self.max_pixels < 1:
            raise InputError(f"workers must be 0 or more and max_pixels 1 or more, got {self.workers} and "
                             f"{self.max_pixels}")  # fmt: skip


class Generation:
    """One version of the family, open: its copy on disk, its workers and their scheduler."""

    def __init__(self, folder: Path, options: ServeOptions, on_batch: Callable[[int, int, float], None]) -> None:
        """Copies, checks and opens the family, and runs every engine once.

        Args:
            folder: Of the family.
            options: How.
            on_batch: See `Scheduler`.

        Raises:
            InputError: The family cannot be opened, or has not what the options name.
            OSError: It cannot be copied.
        """
        with contextlib.ExitStack() as made:
            self.folder = Path(tempfile.mkdtemp(prefix="tocom-serving-"))
            made.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _copy(folder, self.folder)
            self.family = Family.read(self.folder)
            degrees = [entry.degree for entry in self.family.engines]
            times = {batch: self._times(batch) for batch in (1, max(options.limits.max_batch, 2))}
            self.points: tuple[Point, ...] = points(self.family, times[1])
            asked = self.resolved(Want(options.degree, None, None, options.budget_ms, options.min_accuracy))
            self.workers: list[EngineProcess] = []
            made.callback(lambda: [worker.close() for worker in self.workers])
            self.scheduler = Scheduler(
                self._infers(options, made),
                degrees,
                self._policy(times, asked, options),
                options.limits,
                on_batch,
            )
            self.tracer = made.enter_context(MergeTracer(self.folder, self.family, threads=options.threads))
            self._made = made.pop_all()

    def _times(self, batch: int) -> dict[int, Times]:
        return local_latencies(self.folder, self.family, batch)

    def _policy(self, times: dict[int, dict[int, Times]], asked: Want, options: ServeOptions) -> DegreePolicy:
        """What load may choose: from where it is to begin, as far as it is accurate enough, what is faster.

        Raises:
            InputError: There is no such degree to begin at.
        """
        (_, ones), (many, manys) = times.items()
        first = self.family.entry(self.points[0].degree if asked.degree is None else asked.degree).degree
        first = max(first, asked.min_degree or 0)
        allowed = [
            point.degree
            for point in self.points
            if Want(min_degree=first, max_degree=asked.max_degree).allows(point.degree)
        ]
        if not allowed:
            raise InputError(f"a server must begin at a degree that is accurate enough, got {first}, and "
                             f"{asked.max_degree} is the highest one")  # fmt: skip
        pays = {degree: manys[degree].p50_ms < manys[first].p50_ms for degree in allowed}
        speeds = {
            degree: Speed.through(ones[degree].p50_ms / 1e3, many, manys[degree].p50_ms / 1e3)
            for degree in useful(allowed, pays)
        }
        objective_s = None if options.objective_ms is None else options.objective_ms / 1e3
        return DegreePolicy(
            speeds, objective_s, max_batch=options.limits.max_batch, workers=max(options.workers, 1),
            hold_s=options.hold_s,
        )  # fmt: skip

    def _infers(self, options: ServeOptions, made: contextlib.ExitStack) -> Sequence[Infer]:
        if options.workers == 0:
            family = made.enter_context(load(self.folder, threads=options.threads))
            family.warm()
            return [_failing_as_engine(family.infer)]
        for _ in range(options.workers):
            self.workers.append(EngineProcess(self.folder, threads=options.threads, timeout_s=options.engine_timeout_s))
        return [worker.infer for worker in self.workers]

    def resolved(self, want: Want) -> Want:
        """What a request asks for, in degrees alone.

        Args:
            want: With a budget or an accuracy, or without.

        Raises:
            InputError: No degree keeps to the budget, or none is as accurate.
        """
        lowest, highest = [want.min_degree or 0], [math.inf if want.max_degree is None else want.max_degree]
        try:
            if want.budget_ms is not None:
                lowest.append(choose(self.points, budget_ms=want.budget_ms).degree)
            if want.min_accuracy is not None:
                highest.append(choose(self.points, min_accuracy=want.min_accuracy).degree)
        except GateError as missed:
            raise InputError(str(missed)) from missed
        if want.budget_ms is None and want.min_accuracy is None:
            return want
        if max(lowest) > min(highest):
            raise InputError(f"no degree keeps to all that is asked for: {max(lowest)} at least for the time, "
                             f"{min(highest)} at most for the accuracy")  # fmt: skip
        most = None if min(highest) == math.inf else int(min(highest))
        return Want(want.degree, max(lowest), most)

    def close(self, *, drain: bool = True) -> None:
        """Answers what was accepted, then frees everything."""
        self.scheduler.close(drain=drain)
        self._made.close()


def _failing_as_engine(infer: Infer) -> Infer:
    def run(pixel_values: np.ndarray, degree: int) -> np.ndarray:
        try:
            return infer(pixel_values, degree)
        except InputError as error:
            raise EngineFailedError(str(error)) from error

    return run


def _copy(folder: Path, to: Path) -> None:
    """Copies the files that the manifest names, checks them, and only then the manifest.

    Raises:
        InputError: A file is missing or has changed.
    """
    family = Family.read(folder)
    if not family.engines:
        raise InputError(f"{one_line(folder)} has no finished engine: compile one with `tocom compile`")
    for name in _files(family):
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(folder / name, target)
        except FileNotFoundError:
            raise InputError(f"{one_line(folder / name)} is missing: compile the family again") from None
    for entry in family.engines:
        family.check_files(to, entry)
    family.write(to)


def _files(family: Family) -> Iterator[str]:
    seen: set[str] = set()
    for entry in family.engines:
        for name in entry.sha256:
            if name not in seen:
                seen.add(name)
                yield name
