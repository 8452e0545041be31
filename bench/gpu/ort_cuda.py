"""ONNX Runtime on a CUDA device."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch  # noqa: F401 - first: its CUDA libraries serve ONNX Runtime as well

from tocom.runtime.engines.base import INPUT_NAME, OUTPUT_NAME
from tocom.runtime.engines.onnxruntime_engine import OrtRunner

_PROVIDER = "CUDAExecutionProvider"


class CudaOrtRunner(OrtRunner):
    """Runs an ONNX file on the current CUDA device; refuses to be one that fell back to the CPU."""

    def __init__(self, path: Path) -> None:
        """Loads the file."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find and others may bring
            onnxruntime.preload_dlls()
        super().__init__(path, provider=_PROVIDER)

    def on_device(self, images: np.ndarray) -> Callable[[], None]:
        """What runs a batch that is on the device already, leaves the logits there, and waits for them."""
        logits = [len(images), self.classes]
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
        binding.bind_ortvalue_output(
            OUTPUT_NAME, onnxruntime.OrtValue.ortvalue_from_shape_and_type(logits, np.float32, "cuda", 0)
        )
        return lambda: self._session.run_with_iobinding(binding)
