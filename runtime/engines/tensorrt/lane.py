"""What one call to a TensorRT engine has for itself while it runs, and the pool that threads take it from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import InputError
from ..base import INPUT_NAME
from .device import Buffer, Graph, Memory, Stream
from .plan import Part

if TYPE_CHECKING:  # the types that this code names are the same in all libraries it serves
    import tensorrt_rtx as trt

_MOST_GRAPHS = 16  # per lane; further batch sizes run without one


class RefusedError(RuntimeError):
    """The library refused a call; it told its logger why."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, shape of one image, and element type."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Lane:
    """What one call has for itself while it runs: a stream, buffers for the largest batch, and execution contexts."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        largest: int,
        new_context: Callable[[], trt.IExecutionContext | None],
        activations: int | None,
    ) -> None:
        """Allocates everything but contexts, which are made when they are needed.

        Args:
            tensors: The input first.
            largest: Images, at most.
            new_context: Makes a context.
            activations: Bytes of them, for contexts that have none of their own; with them, graphs are recorded.

        Raises:
            CudaError: There is not enough memory.
        """
        self._new_context = new_context
        self._records = activations is not None
        self._contexts: list[trt.IExecutionContext] = []
        self._plain: trt.IExecutionContext | None = None
        self._plain_part: tuple[int, int] | None = None
        self._graphs: dict[tuple[int, int], Graph | None] = {}
        with contextlib.ExitStack() as resources:
            self.stream = Stream()
            resources.callback(self.stream.close)
            self._buffers: dict[str, Buffer] = {}
            for tensor in tensors:
                self._buffers[tensor.name] = Buffer((largest, *tensor.shape), tensor.dtype)
                resources.callback(self._buffers[tensor.name].close)
            self._activations = None if activations is None else Memory(activations)
            if self._activations is not None:
                resources.callback(self._activations.close)
            resources.callback(self._forget_contexts)
            self._resources = resources.pop_all()

    def run(self, images: np.ndarray, part: Part, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs one part of a batch and waits for it.

        Args:
            images: float32 [part.images, 3, H, W].
            part: How they run.
            names: Outputs to return.

        Returns:
            Copies of the outputs by name, without what belongs to padding.

        Raises:
            CudaError: CUDA fails.
        """
        self.load(images, part)
        self.queue(part)
        for name in names:
            self._buffers[name].to_host(self.stream, part.images)
        self.stream.synchronize()
        return {name: self._buffers[name].host[: part.images].copy() for name in names}

    def load(self, images: np.ndarray, part: Part) -> None:
        """Queues the copy of images, and of zeros behind them, to the device.

        Raises:
            CudaError: CUDA fails.
        """
        pixels = self._buffers[INPUT_NAME]
        pixels.host[: part.images] = images
        pixels.host[part.images : part.size] = 0
        pixels.to_device(self.stream, part.size)

    def queue(self, part: Part) -> None:
        """Queues the engine on what was loaded. The first time that a size is seen, it records, and may wait.

        Raises:
            RefusedError: The library fails.
        """
        key = (part.size, part.profile)
        if self._records and key not in self._graphs and len(self._graphs) < _MOST_GRAPHS:
            self._graphs[key] = self._recorded(part)
        graph = self._graphs.get(key)
        if graph is not None:
            self.stream.launch(graph)
            return
        if self._plain is None:
            self._plain = self._context()
        if self._plain_part != key:
            self._plain_part = None  # should it fail halfway
            self._shape(self._plain, part)
            self._plain_part = key
        self._execute(self._plain)

    def _recorded(self, part: Part) -> Graph | None:
        """The work of one size; None where it cannot be recorded.

        The context is this graph's from now on: changing one invalidates what was recorded from it.
        """
        context = self._context()
        graph = None
        try:
            self._shape(context, part)
            self._execute(context)  # the first run of a shape prepares what must not be prepared while recording
            self.stream.synchronize()
            graph = self.stream.capture(lambda: self._execute(context))
        finally:
            if graph is None:
                self._contexts.pop()
        if graph is not None:
            self._resources.callback(graph.close)
        return graph

    def _context(self) -> trt.IExecutionContext:
        context = self._new_context()
        if context is None:
            raise RefusedError("there is no execution context")
        self._contexts.append(context)
        if self._activations is not None:
            context.set_device_memory(self._activations.address, self._activations.nbytes)
        return context

    def _shape(self, context: trt.IExecutionContext, part: Part) -> None:
        stream = self.stream.handle
        worked = context.active_optimization_profile == part.profile
        worked = worked or context.set_optimization_profile_async(part.profile, stream)
        image = self._buffers[INPUT_NAME].host.shape[1:]
        worked = worked and context.set_input_shape(INPUT_NAME, (part.size, *image))
        for name, buffer in self._buffers.items():
            worked = worked and context.set_tensor_address(name, buffer.address)
        if not worked:
            raise RefusedError(f"it takes no batch of {part.size}")

    def _execute(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise RefusedError("it does not run")

    def _forget_contexts(self) -> None:
        self._plain = None
        self._contexts.clear()

    def close(self) -> None:
        """Waits for what is queued, then frees graphs, contexts, memory and stream, in this order.

        Raises:
            CudaError: CUDA failed before or fails now.
        """
        try:
            self.stream.synchronize()
        finally:
            self._resources.close()


class Pool:
    """Lanes that wait to be used; a new one is made when none waits, up to a limit."""

    def __init__(self, make: Callable[[], Lane], limit: int) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._idle: list[Lane] = []
        self._count = 0
        self._closed = False

    @contextlib.contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane that no other thread has.

        Raises:
            InputError: The pool was closed meanwhile.
        """
        lane = self._taken()
        try:
            yield lane
        finally:
            self._change(lambda: self._idle.append(lane))

    def _taken(self) -> Lane:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._idle or self._count < self._limit)
            if self._closed:
                raise InputError("the engine must be open, got one that was closed meanwhile: open it again")
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            return self._make()  # slow, so other threads need not wait for it
        except BaseException:
            self._change(self._uncount)
            raise

    def _uncount(self) -> None:
        self._count -= 1

    def _change(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def close(self) -> None:
        """Waits for every lane that is in use, and frees all.

        Raises:
            CudaError: CUDA failed before or fails now.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._idle) == self._count)
        with contextlib.ExitStack() as lanes:
            for lane in self._idle:
                lanes.callback(lane.close)
            self._idle.clear()
