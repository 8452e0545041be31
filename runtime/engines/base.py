"""What every engine offers, whatever library runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..backends import engine_module, require, why_unusable
from ..errors import InputError, one_line

INPUT_NAME = "pixel_values"
OUTPUT_NAME = "logits"


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is to be run.

    Attributes:
        precision: Number format that it computes in, one that its backend has.
        threads: CPU threads for one call; the library's choice by default.
        batch: Images of most calls, where that is known: an engine may prepare for it. Any other number still works.
        throughput: Whether many images a second matter more than the time of one call.
        share_weights: Whether memory matters more than speed: weights that several engines of a process have in common
            are held once, by libraries that can (ONNX Runtime).
    """

    precision: str = "fp32"
    threads: int | None = None
    batch: int | None = None
    throughput: bool = False
    share_weights: bool = False


class EngineRunner(ABC):
    """A loaded engine: a context manager that turns images into logits.

    The checks live here, so that every backend refuses the same things in the same words. Several threads may call at
    the same time; a library that runs one call at a time makes the others wait.

    Attributes:
        backend: One of `tocom.runtime.backends.BACKENDS`.
        input_size: (3, H, W) that it takes.
        classes: Logits per image.
    """

    backend: str
    input_size: tuple[int, int, int]
    classes: int
    _closed: bool = False

    def infer(self, pixel_values: np.ndarray) -> np.ndarray:
        """Runs a batch.

        Args:
            pixel_values: float32 [B, 3, H, W], prepared by `tocom.runtime.preprocess`; not changed.

        Returns:
            Logits, float32 [B, classes].

        Raises:
            InputError: Wrong type or shape, the runner is closed, or the engine fails on the batch.
        """
        logits = self._infer(self._checked(pixel_values))
        expected = (len(pixel_values), self.classes)
        if logits.shape != expected:
            raise InputError(f"{self.backend} must return logits of shape {expected}, got {logits.shape}: rebuild it")
        return logits

    def infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        """Runs a batch and returns every output by name, `logits` and whatever a debug graph adds.

        Args:
            pixel_values: As for `infer`.

        Raises:
            InputError: As for `infer`.
        """
        return self._infer_all(self._checked(pixel_values))

    def close(self) -> None:
        """Frees the engine; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        """Logits of a checked, contiguous batch."""

    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs of a checked batch; a backend without debug outputs has only the logits."""
        return {OUTPUT_NAME: self._infer(pixel_values)}

    @abstractmethod
    def _close(self) -> None:
        """Frees what the backend holds; called once."""

    def _checked(self, pixel_values: np.ndarray) -> np.ndarray:
        if self._closed:
            raise InputError(f"the {self.backend} engine must be open, got a closed one: open it again")
        if not isinstance(pixel_values, np.ndarray) or pixel_values.dtype != np.float32:
            got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise InputError(f"{INPUT_NAME} must be a numpy array of float32, got {got}")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != self.input_size or len(pixel_values) == 0:
            shape = f"[batch, {', '.join(map(str, self.input_size))}]"
            raise InputError(f"{INPUT_NAME} must have shape {shape} with batch 1 or more, got {pixel_values.shape}")
        return np.ascontiguousarray(pixel_values)


def open_engine(
    path: Path | str,
    backend: str,
    *,
    precision: str = "fp32",
    threads: int | None = None,
    batch: int | None = None,
    throughput: bool = False,
    share_weights: bool = False,
) -> EngineRunner:
    """Loads an engine.

    Args:
        path: The engine's file.
        backend: One of `tocom.runtime.backends.BACKENDS`.
        precision: See `EngineSettings`, as for all that follow.
        threads: Likewise.
        batch: Likewise.
        throughput: Likewise.
        share_weights: Likewise.

    Raises:
        InputError: The backend is unknown, not installed or cannot run here, a number is below 1, or the file is not a
            usable engine.
    """
    module = engine_module(backend)
    if (why := why_unusable(backend)) is not None:
        raise InputError(f"backend {backend} cannot run here, {why}")
    for name, number in (("threads", threads), ("batch", batch)):
        if number is not None and number < 1:
            raise InputError(f"{name} must be 1 or more, got {number}")
    require(backend, precision)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"an engine must be a file, got {one_line(path)}, which is not one: compile it again")
    return module.open_engine(path, EngineSettings(precision, threads, batch, throughput, share_weights))
