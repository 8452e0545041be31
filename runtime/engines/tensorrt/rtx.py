"""The TensorRT engine on TensorRT for RTX, which compiles its plans to kernels just in time, when they are loaded.

What it compiled is kept beside the plan, so that this is done once per GPU.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import tensorrt_rtx

from ...family_files import kernels_of
from ...files import write_atomically
from ..base import EngineSettings
from . import device
from .runner import TensorRtRunner

if TYPE_CHECKING:
    import tensorrt_rtx as trt

__all__ = ["RtxRunner", "describe", "open_engine", "unusable"]


def describe() -> str:
    """One line: the version and the GPU, or why there is none."""
    return f"{tensorrt_rtx.__version__}, {unusable() or device.describe()}"


def unusable() -> str | None:
    """Why no plan can run here; None where one can."""
    why = device.unusable()
    return why and f"{why}: plans can be built here, not run"


def open_engine(path: Path, settings: EngineSettings) -> RtxRunner:
    """Loads a plan on the current CUDA device; see `RtxRunner`. It is eager where the batch of most calls is known."""
    return RtxRunner(path, eager=settings.batch is not None)


class RtxRunner(TensorRtRunner):
    """Runs a plan of TensorRT for RTX; CUDA graphs are the library's task.

    What was compiled for a GPU is read from, and written to, the file PLAN.GPU.cache. One that cannot be read or
    written, or is of another version, costs time only.
    """

    _records_graphs = False

    def __init__(self, path: Path | str, *, cuda_graphs: bool = True, lanes: int = 4, eager: bool = False) -> None:
        """Loads the file on the current CUDA device.

        Args:
            path: The plan.
            cuda_graphs: As for `TensorRtRunner`.
            lanes: Likewise.
            eager: Whether the first call of a batch size waits for kernels of its own. Otherwise kernels for any size
                serve until these are compiled, in the background.

        Raises:
            InputError: As for `TensorRtRunner`.
        """
        super().__init__(path, tensorrt_rtx, "tensorrt-rtx", cuda_graphs=cuda_graphs, lanes=lanes)
        self._eager = eager
        self._cache_file = kernels_of(Path(path), device.name())
        compiled: trt.IRuntimeCache = self._engine.create_runtime_config().create_runtime_cache()
        self._compiled = compiled
        self._keeping = threading.Lock()
        self._kept = b""
        with contextlib.suppress(OSError):
            self._kept = self._cache_file.read_bytes()
            compiled.deserialize(self._kept)

    def _new_context(self, strategy: trt.ExecutionContextAllocationStrategy) -> trt.IExecutionContext | None:
        graphs = tensorrt_rtx.CudaGraphStrategy
        specialization = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy
        config: trt.IRuntimeConfig = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if self._cuda_graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            specialization.EAGER if self._eager else specialization.LAZY
        )
        config.set_runtime_cache(self._compiled)
        context: trt.IExecutionContext | None = self._engine.create_execution_context(config)
        self._keep()  # most is compiled by now, and not every process gets as far as closing
        return context

    def _keep(self) -> None:
        """Writes what was compiled beside the plan, unless that lies there already."""
        with self._keeping:
            memory: trt.IHostMemory | None = self._compiled.serialize()
            content = b"" if memory is None else bytes(memory)
            if content not in (b"", self._kept):
                self._kept = content
                with contextlib.suppress(OSError):
                    write_atomically(self._cache_file, content)

    def _close(self) -> None:
        with contextlib.suppress(device.CudaError):
            device.use(self._device)
            self._keep()
        super()._close()
        del self._compiled
