"""The TensorRT engine, on its library: NVIDIA's for every GPU, whose plans are for one version and one kind of GPU."""

from __future__ import annotations

from pathlib import Path

import tensorrt

from ..base import EngineSettings
from . import device
from .runner import TensorRtRunner

__all__ = ["describe", "open_engine", "unusable"]

_OLDEST = (10, 13)

if tuple(map(int, tensorrt.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(f"TensorRT must be {'.'.join(map(str, _OLDEST))} or later, got {tensorrt.__version__}")


def describe() -> str:
    """One line: the version and the GPU, or why there is none."""
    return f"{tensorrt.__version__}, {unusable() or device.describe()}"


def unusable() -> str | None:
    """Why no plan can run here; None where one can."""
    why = device.unusable()
    return why and f"{why}: run it where there is an NVIDIA GPU with its driver"


def open_engine(path: Path, settings: EngineSettings) -> TensorRtRunner:  # noqa: ARG001  # a plan has them built in
    """Loads a plan on the current CUDA device; see `TensorRtRunner`."""
    return TensorRtRunner(path, tensorrt, "tensorrt")
