"""How a family is served."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tocom.runtime.errors import InputError
from tocom.runtime.preprocess import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue.

    Attributes:
        max_batch: Images in a batch.
        max_queued: Images that wait.
        max_wait_s: After so long a request is refused instead of begun, in seconds.
    """

    max_batch: int = 32
    max_queued: int = 256
    max_wait_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queued < 1:
            raise InputError(f"max_batch and max_queued must be 1 or more, got {self.max_batch} and {self.max_queued}")
        if not self.max_wait_s > 0:
            raise InputError(f"max_wait_s must be more than 0 seconds, got {self.max_wait_s}")


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
