"""A CUDA device as the TensorRT engines use it: streams, memory on both sides, graphs, and times by events.

The CUDA bindings are imported when they are first needed, so that a machine without them can say so. Whoever makes a
thing here closes it; a closed one is not used again.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import one_line

_ALIGNED = 256  # bytes; TensorRT asks for activations to start at a multiple of this, which cudaMalloc gives


class CudaError(RuntimeError):
    """A call to CUDA failed; the message is one line."""


def unusable() -> str | None:
    """Why no CUDA device can be used here, in a few words; None where one can."""
    try:
        count = _call("cudaGetDeviceCount")
    except ModuleNotFoundError:
        return "the CUDA bindings are not installed: pip install cuda-bindings"
    except ImportError as error:
        return f"the CUDA bindings do not load: {one_line(error)}"
    except CudaError as error:
        return f"no usable CUDA device ({error if _call('cudaDriverGetVersion') else 'no NVIDIA driver'})"
    return None if count else "no usable CUDA device"


def describe() -> str:
    """The current device, like "NVIDIA H200 (compute capability 9.0)".

    Raises:
        CudaError: There is none.
    """
    properties = _call("cudaGetDeviceProperties", current())
    return f"{name()} (compute capability {properties.major}.{properties.minor})"


def name() -> str:
    """The product's name of the current device.

    Raises:
        CudaError: There is none.
    """
    return one_line(_call("cudaGetDeviceProperties", current()).name.decode(errors="replace"))


def current() -> int:
    """The number of this thread's device.

    Raises:
        CudaError: There is none.
    """
    return _call("cudaGetDevice")


def use(number: int) -> None:
    """Makes a device this thread's, and its context current.

    Raises:
        CudaError: There is no such device.
    """
    _call("cudaSetDevice", number)


@functools.cache
def _cudart() -> ModuleType:
    from cuda.bindings import runtime

    return runtime


def _call(function: str, *arguments: object) -> Any:
    """Calls a function of CUDA's runtime and returns what it returns behind its status.

    Raises:
        CudaError: The status is not success.
    """
    cudart = _cudart()
    status, *values = getattr(cudart, function)(*arguments)
    if status != cudart.cudaError_t.cudaSuccess:
        cudart.cudaGetLastError()  # forgets it, so that whoever asks next is not told of it
        _, words = cudart.cudaGetErrorString(status)
        raise CudaError(f"{function}: {words.decode()}")
    return values[0] if values else None


class Stream:
    """A queue of work that runs in order, beside that of other streams.

    Attributes:
        handle: Its address, as libraries take it.
    """

    def __init__(self) -> None:
        """Creates it on the current device.

        Raises:
            CudaError: CUDA fails.
        """
        self._stream = _call("cudaStreamCreateWithFlags", _cudart().cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        """Waits for everything that was queued.

        Raises:
            CudaError: Something in the queue failed.
        """
        _call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], object]) -> Graph | None:
        """Records what a function queues, instead of running it.

        Args:
            work: Queues on this stream and does not wait; it ran at least once before.

        Returns:
            What was recorded; None where the work cannot be recorded. The stream is usable in both cases.

        Raises:
            CudaError: Recording cannot even begin.
        """
        cudart = _cudart()
        _call("cudaStreamBeginCapture", self._stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        failed = False
        try:
            work()
        except RuntimeError:
            failed = True
        try:
            graph = _call("cudaStreamEndCapture", self._stream)
        except CudaError:
            return None
        try:
            return None if failed else Graph(_call("cudaGraphInstantiate", graph, 0))
        except CudaError:
            return None
        finally:
            _call("cudaGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        """Queues what was recorded.

        Raises:
            CudaError: CUDA fails.
        """
        _call("cudaGraphLaunch", graph.executable, self._stream)

    def time(self, work: Callable[[], object], runs: int) -> list[float]:
        """Runs a function several times, one run right behind the other, and waits for the last.

        Args:
            work: Queues on this stream and does not wait.
            runs: How often, 1 or more.

        Returns:
            Time of each run on the device, from the end of the run before, in ms.

        Raises:
            CudaError: CUDA fails.
        """
        events = []
        try:
            for number in range(runs + 1):
                events.append(_call("cudaEventCreate"))
                if number:
                    work()
                _call("cudaEventRecord", events[-1], self._stream)
            self.synchronize()
            return [_call("cudaEventElapsedTime", start, end) for start, end in itertools.pairwise(events)]
        finally:
            for event in events:
                _call("cudaEventDestroy", event)

    def close(self) -> None:
        """Waits for what is queued, and frees the stream.

        Raises:
            CudaError: Something in the queue failed.
        """
        try:
            self.synchronize()
        finally:
            _call("cudaStreamDestroy", self._stream)


class Graph:
    """Recorded work, ready to be launched."""

    def __init__(self, executable: object) -> None:
        """Takes over a `cudaGraphExec_t`."""
        self.executable = executable

    def close(self) -> None:
        """Frees it.

        Raises:
            CudaError: CUDA fails.
        """
        _call("cudaGraphExecDestroy", self.executable)


class Memory:
    """Memory on the device.

    Attributes:
        address: Where it starts.
        nbytes: How much there is.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocates it on the current device.

        Raises:
            CudaError: There is not enough.
        """
        self.nbytes = max(nbytes, _ALIGNED)
        self.address = int(_call("cudaMalloc", self.nbytes))

    def close(self) -> None:
        """Frees it.

        Raises:
            CudaError: CUDA fails.
        """
        _call("cudaFree", self.address)


class Buffer:
    """An array on the device and its twin in pinned host memory, which copies fast and without waiting.

    Attributes:
        host: The twin, zero at first; its first axis is the batch.
        address: Where the device's array starts.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Allocates both.

        Args:
            shape: With the largest batch first.
            dtype: Element type.

        Raises:
            CudaError: There is not enough memory.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self._memory = Memory(nbytes)
        self.address = self._memory.address
        try:
            self._pinned = int(_call("cudaMallocHost", self._memory.nbytes))
        except CudaError:
            self._memory.close()
            raise
        raw = (ctypes.c_byte * nbytes).from_address(self._pinned)
        self.host = np.frombuffer(raw, dtype).reshape(shape)
        self.host[...] = 0

    def to_device(self, stream: Stream, images: int) -> None:
        """Queues the copy of the first images to the device.

        Raises:
            CudaError: CUDA fails.
        """
        kind = _cudart().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpyAsync", self.address, self._pinned, self.host[:images].nbytes, kind, stream.handle)

    def to_host(self, stream: Stream, images: int) -> None:
        """Queues the copy of the first images to the host.

        Raises:
            CudaError: CUDA fails.
        """
        kind = _cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call("cudaMemcpyAsync", self._pinned, self.address, self.host[:images].nbytes, kind, stream.handle)

    def close(self) -> None:
        """Frees both; views of `host` must be gone.

        Raises:
            CudaError: CUDA fails.
        """
        del self.host
        try:
            self._memory.close()
        finally:
            _call("cudaFreeHost", self._pinned)
