"""One version of a family, open: its own copy of the files, the workers that hold its engines, and their scheduler."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from tocom.serving.service.options import ServeOptions
from tocom.serving.service.request import DegreeRequest
from tocom.serving.service.scheduler import Infer, Scheduler


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
        with contextlib.ExitStack() as resources:
            self.folder = Path(tempfile.mkdtemp(prefix="tocom-serving-"))
            resources.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _copy(folder, self.folder)
            self.family = Family.read(self.folder)
            degrees = [entry.degree for entry in self.family.engines]
            times = {batch: self._times(batch) for batch in (1, max(options.limits.max_batch, 2))}
            self.points: tuple[Point, ...] = points(self.family, times[1])
            asked = self.resolved(DegreeRequest(options.degree, None, None, options.budget_ms, options.min_accuracy))
            self.workers: list[EngineProcess] = []
            resources.callback(lambda: [worker.close() for worker in self.workers])
            self.scheduler = Scheduler(
                self._infers(options, resources),
                degrees,
                self._policy(times, asked, options),
                options.limits,
                on_batch,
            )
            self.tracer = resources.enter_context(MergeTracer(self.folder, self.family, threads=options.threads))
            self._resources = resources.pop_all()

    def _times(self, batch: int) -> dict[int, Times]:
        return local_latencies(self.folder, self.family, batch)

    def _policy(self, times: dict[int, dict[int, Times]], asked: DegreeRequest, options: ServeOptions) -> DegreePolicy:
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
            if DegreeRequest(min_degree=first, max_degree=asked.max_degree).allows(point.degree)
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

    def _infers(self, options: ServeOptions, resources: contextlib.ExitStack) -> Sequence[Infer]:
        if options.workers == 0:
            family = resources.enter_context(load(self.folder, threads=options.threads))
            family.warm()
            return [_failing_as_engine(family.infer)]
        for _ in range(options.workers):
            self.workers.append(EngineProcess(self.folder, threads=options.threads, timeout_s=options.engine_timeout_s))
        return [worker.infer for worker in self.workers]

    def resolved(self, request: DegreeRequest) -> DegreeRequest:
        """What a request asks for, in degrees alone.

        Args:
            request: With a budget or an accuracy, or without.

        Raises:
            InputError: No degree keeps to the budget, or none is as accurate.
        """
        if request.budget_ms is None and request.min_accuracy is None:
            return request
        lowest, highest = request.min_degree or 0, request.max_degree
        try:
            if request.budget_ms is not None:
                lowest = max(lowest, choose(self.points, budget_ms=request.budget_ms).degree)
            if request.min_accuracy is not None:
                accurate = choose(self.points, min_accuracy=request.min_accuracy).degree
                highest = accurate if highest is None else min(highest, accurate)
        except GateError as missed:
            raise InputError(str(missed)) from missed
        if highest is not None and lowest > highest:
            raise InputError(f"no degree keeps to all that is asked for: {lowest} at least for the time, {highest} at "
                             "most for the accuracy")  # fmt: skip
        return DegreeRequest(request.degree, lowest, highest)

    def close(self, *, drain: bool = True) -> None:
        """Answers what was accepted, then frees everything."""
        self.scheduler.close(drain=drain)
        self._resources.close()


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
