"""What the infer command runs: one engine, by its degree or chosen by a budget or an accuracy, or a cascade of some."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from .degrees.cascade import CascadePlan, run
from .degrees.choose import choose, points
from .degrees.local_latency import Tell, local_latencies
from .engines.base import EngineRunner, open_engine
from .errors import InputError
from .manifest import EngineEntry, Family


@dataclass(frozen=True)
class Wish:
    """What the user asks for; at most one of degree, cascade, and budget or accuracy.

    Attributes:
        degree: Degree r.
        budget_ms: What a call may take, in ms.
        min_accuracy: Least top-1, a share in 0..1.
        cascade: Whether the family's cascade is to run.
        batch: Images per call.

    Raises:
        InputError: Two exclude each other.
    """

    degree: int | None = None
    budget_ms: float | None = None
    min_accuracy: float | None = None
    cascade: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        given = [("--degree", self.degree), ("--budget-ms", self.budget_ms), ("--min-accuracy", self.min_accuracy),
                 ("--cascade", self.cascade or None)]  # fmt: skip
        names = [name for name, value in given if value is not None]
        if len(names) > 1 and names != ["--budget-ms", "--min-accuracy"]:
            raise InputError(f"{' and '.join(names)} exclude each other: give a degree, or a budget or an accuracy to "
                             "choose one by, or --cascade")  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """What runs.

    Attributes:
        entries: The engines, in the order in which they may run.
        plan: Of the cascade; None where one engine runs.
        why: How they were chosen; None where the user named them.
        batch: Images of most calls, where the choice rests on it; the first engine is prepared for so many.
    """

    entries: tuple[EngineEntry, ...]
    plan: CascadePlan | None
    why: str | None
    batch: int | None = None

    @property
    def name(self) -> str:
        """In a few words."""
        degrees = ", ".join(str(entry.degree) for entry in self.entries)
        return f"degree {degrees}" if self.plan is None else f"cascade of degrees {degrees}"


def pick(folder: Path, family: Family, wish: Wish, tell: Tell) -> Pick:
    """Finds the engines to run, and makes sure that their files are the ones that were compiled.

    Args:
        folder: Of the family.
        family: With at least one engine.
        wish: What is asked for.
        tell: Given a line when times are measured.

    Raises:
        InputError: There is no such degree or cascade, or a file has changed.
        GateError: No degree keeps to the budget, or none is as accurate.
    """
    picked = _picked(folder, family, wish, tell)
    for entry in picked.entries:
        family.check_files(folder, entry)
    return picked


def _picked(folder: Path, family: Family, wish: Wish, tell: Tell) -> Pick:
    if wish.cascade:
        plan = CascadePlan.read(folder, family)
        thresholds = ", ".join(f"{stage.threshold:.3f} at degree {stage.degree}" for stage in plan.stages[:-1])
        why = f"images go on to the next degree below a confidence of {thresholds}" if thresholds else None
        return Pick(tuple(family.entry(degree) for degree in plan.degrees), plan, why, wish.batch)
    if wish.budget_ms is None and wish.min_accuracy is None:
        return Pick((family.engines[0] if wish.degree is None else family.entry(wish.degree),), None, None)
    found = points(family, local_latencies(folder, family, wish.batch, tell=tell))
    chosen = choose(found, budget_ms=wish.budget_ms, min_accuracy=wish.min_accuracy)
    rule = "the fastest" if wish.budget_ms is None else "the most accurate"
    limits = [] if wish.budget_ms is None else [f"takes {wish.budget_ms:g} ms or less"]
    limits += [] if wish.min_accuracy is None else [f"has an accuracy of {wish.min_accuracy:g} or more"]
    accuracy = "" if chosen.top1 is None else f", accuracy {chosen.top1:.4g}"
    why = (f"chose degree {chosen.degree}, {rule} that {' and '.join(limits)} at batch {wish.batch}: "
           f"{chosen.p50_ms:.3g} ms{accuracy}")  # fmt: skip
    return Pick((family.entry(chosen.degree),), None, why, wish.batch)


class OpenEngines:
    """The engines of a pick, open: a context manager that classifies batches."""

    def __init__(
        self, folder: Path, family: Family, picked: Pick, *, threads: int | None = None, throughput: bool = False
    ) -> None:
        """Opens them.

        Args:
            folder: Of the family.
            family: Its manifest.
            picked: Which engines.
            threads: See `tocom.runtime.engines.base.EngineSettings`.
            throughput: Likewise.

        Raises:
            InputError: An engine cannot be opened, or is not what the manifest says.
        """
        self._plan, self._runners = picked.plan, {}
        with ExitStack() as opened:
            for entry in picked.entries:
                settings = {"precision": entry.precision, "threads": threads, "throughput": throughput}
                batch = picked.batch if entry is picked.entries[0] else None  # fewer images, never the same, go on
                engine = open_engine(folder / entry.engine, entry.backend, batch=batch, **settings)
                runner = opened.enter_context(engine)
                _ensure_matches(runner, family)
                self._runners[entry.degree] = runner
            self._opened = opened.pop_all()

    def classify(self, pixel_values: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Logits [B, classes] of a batch, and the degree that gave each row.

        Args:
            pixel_values: float32 [B, 3, H, W], prepared.
        """
        if self._plan is not None:
            answer = run(self._plan, lambda images, degree: self._runners[degree].infer(images), pixel_values)
            return answer.logits, answer.degrees.tolist()
        ((degree, runner),) = self._runners.items()
        return runner.infer(pixel_values), [degree] * len(pixel_values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()


def _ensure_matches(runner: EngineRunner, family: Family) -> None:
    promised, found = (family.input.size, family.classes), (runner.input_size, runner.classes)
    if promised != found:
        raise InputError(
            f"the engine must take {promised[0]} and give {promised[1]} classes as family.json says, "
            f"got {found[0]} and {found[1]}: compile the family again"
        )
