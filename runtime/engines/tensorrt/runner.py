"""The TensorRT engine, for TensorRT and TensorRT for RTX alike: their modules hand their library in.

What a call needs for itself while it runs is a lane (`.lane`), which it takes from a pool.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ...errors import InputError, one_line
from ..base import INPUT_NAME, OUTPUT_NAME, EngineRunner
from . import device
from .device import CudaError
from .lane import Lane, Pool, Tensor
from .plan import TITLES, Profile, check_header, cut

if TYPE_CHECKING:  # the types that this code names are the same in all libraries it serves
    import tensorrt_rtx as trt

_listeners: dict[int, list[str]] = {}


@functools.cache
def logger(library: ModuleType) -> trt.ILogger:
    """The one logger of a library in this process, which prints nothing.

    It is never freed, because a library keeps the first logger that it is given for as long as any of its objects live.
    """

    class Logger(library.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                for lines in list(_listeners.values()):
                    lines.append(one_line(msg))

    return Logger()


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects what is told to any `logger` as an error meanwhile, in any thread: one printable line each."""
    lines: list[str] = []
    _listeners[id(lines)] = lines
    try:
        yield lines
    finally:
        del _listeners[id(lines)]


class TensorRtRunner(EngineRunner):
    """Runs a plan with input `pixel_values` [batch, 3, H, W] and output `logits` [batch, classes], both float32.

    Any number of threads may call it at once. A batch that no optimization profile of the plan allows is cut, and what
    is too small is padded with zeros.
    """

    _records_graphs = True  # whether CUDA graphs are this class's task, not the library's

    def __init__(
        self, path: Path | str, library: ModuleType, backend: str, *, cuda_graphs: bool = True, lanes: int = 4
    ) -> None:
        """Loads the file on the current CUDA device.

        Args:
            path: The plan.
            library: `tensorrt` or `tensorrt_rtx`.
            backend: Its name, one of `tocom.runtime.engines.tensorrt.plan.TITLES`.
            cuda_graphs: Whether the work of a batch size is recorded at its first call and replayed from then on,
                which spares the time of launching kernels one by one. What cannot be recorded runs all the same.
            lanes: Calls that may run at the same time, 1 or more; further threads wait. A lane has its own buffers
                and activations on the device, from the first moment that it is needed.

        Raises:
            InputError: The file is not a plan that this library runs on this device, or there is no device.
        """
        self.backend, self._library = backend, library
        self._name, self._title = one_line(path), f"{TITLES[backend]} {library.__version__}"
        self._cuda_graphs = cuda_graphs
        if (why := device.unusable()) is not None:
            raise InputError(f"{self._title} cannot run {self._name}: {why}")
        self._device = device.current()
        device.use(self._device)
        self._runtime: trt.Runtime
        self._engine: trt.ICudaEngine
        self._load(Path(path))
        self._tensors = self._checked_tensors()
        image, logits = self._tensors[:2]
        self.input_size, self.classes = image.shape, logits.shape[0]
        self._profiles = self._checked_profiles()
        self._pool = Pool(self._new_lane, lanes)

    def device_ms(self, pixel_values: np.ndarray, runs: int = 20) -> list[float]:
        """Times the engine alone: on the device, without copies of images or logits.

        Args:
            pixel_values: As for `infer`, no more images than a profile allows. They are copied once, before.
            runs: How often it runs, 1 or more, each time right behind the time before.

        Returns:
            Time of each run by CUDA events, in ms. The run that warms up and records is not among them.

        Raises:
            InputError: As for `infer`, or the batch does not fit a profile.
        """
        images = self._checked(pixel_values)
        first, *others = cut(len(images), self._profiles)
        if others:
            raise InputError(f"a batch to time must be {first.size} images or fewer, got {len(images)}")
        with self._lane(len(images)) as lane:
            lane.load(images, first)
            lane.queue(first)
            return lane.stream.time(lambda: lane.queue(first), runs)

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._run(pixel_values, [OUTPUT_NAME])[OUTPUT_NAME]

    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(pixel_values, [tensor.name for tensor in self._tensors[1:]])

    def _run(self, pixel_values: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        with self._lane(len(pixel_values)) as lane:
            outputs = [
                lane.run(pixel_values[part.start : part.start + part.images], part, names)
                for part in cut(len(pixel_values), self._profiles)
            ]
        return {name: np.concatenate([part[name] for part in outputs]) for name in names} if outputs[1:] else outputs[0]

    @contextlib.contextmanager
    def _lane(self, batch: int) -> Iterator[Lane]:
        """A lane of the pool on this runner's device.

        Raises:
            InputError: The library or CUDA fails in it.
        """
        with complaints() as lines:
            try:
                device.use(self._device)  # every thread has its own current device
                with self._pool.lane() as lane:
                    yield lane
            except RuntimeError as error:  # CUDA's, a refusal, or what pybind11 makes of a C++ exception
                reason = lines[0] if lines else one_line(error)
                raise InputError(f"{self._name}: {self._title} failed on a batch of {batch}: {reason}") from error

    def _close(self) -> None:
        with contextlib.suppress(CudaError):  # a device that failed has told so already
            device.use(self._device)
            self._pool.close()
        del self._pool, self._engine, self._runtime

    def _load(self, path: Path) -> None:
        """Has the library open the plan.

        Raises:
            InputError: It is for another library, version or GPU, or cut off.
        """
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise InputError(f"{self._name} cannot be read: {one_line(error.strerror or error)}") from error
        version = check_header(plan, self.backend, self._name)
        failure: Exception | None = None
        with complaints() as lines:
            try:
                self._runtime = self._library.Runtime(logger(self._library))
                self._engine = self._runtime.deserialize_cuda_engine(plan)
            except Exception as error:  # noqa: BLE001  # pybind11's own, where the library hands it nothing
                failure = error
        if failure is not None or self._engine is None:
            built = f"{self._name}, built by {TITLES[self.backend]} {version}, does not load"
            reason = lines[0] if lines else one_line(failure or "no reason given")
            where = f"in {self._title} on {device.describe()}"
            raise InputError(f"{built} {where}: {reason}; compile it again with this version for this GPU") from failure

    def _checked_tensors(self) -> list[Tensor]:
        """The input, the logits, and the other outputs.

        Raises:
            InputError: They are not those of this project's graphs.
        """
        engine, library = self._engine, self._library
        shapes: dict[str, tuple[int, ...]] = {}
        inputs: list[str] = []
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            shapes[name] = tuple(engine.get_tensor_shape(name))
            if engine.get_tensor_mode(name) == library.TensorIOMode.INPUT:
                inputs.append(name)
        outputs = [name for name in shapes if name not in inputs]
        image = shapes[INPUT_NAME] if inputs == [INPUT_NAME] else ()
        if len(image) != 4 or image[1] != 3 or min(image[1:]) < 1:
            got = one_line(", ".join(f"{name} {list(shapes[name])}" for name in inputs))
            raise InputError(f"{self._name} must take one input, {INPUT_NAME} [batch, 3, H, W], got {got}")
        logits = shapes[OUTPUT_NAME] if OUTPUT_NAME in outputs else ()
        if len(logits) != 2 or logits[1] < 1:
            got = one_line(", ".join(f"{name} {list(shapes[name])}" for name in outputs))
            raise InputError(f"{self._name} must give {OUTPUT_NAME} [batch, classes], got {got}")
        for name in (INPUT_NAME, OUTPUT_NAME):
            if engine.get_tensor_dtype(name) != library.DataType.FLOAT:
                got = engine.get_tensor_dtype(name).name
                raise InputError(f"{self._name} must have {name} in FLOAT, got {got}: compile it again")
        tensors = []
        for name in (INPUT_NAME, OUTPUT_NAME, *(name for name in outputs if name != OUTPUT_NAME)):
            batch, *shape = shapes[name] or (None,)
            if batch != image[0] or any(side < 0 for side in shape):
                got = f"{one_line(name)} {list(shapes[name])}"
                raise InputError(f"{self._name} must give outputs [batch, ...] of known sizes, got {got}")
            try:
                dtype = np.dtype(library.nptype(engine.get_tensor_dtype(name)))
            except TypeError as error:  # bfloat16 and narrower floats, which numpy does not have
                got = f"{one_line(name)} in {engine.get_tensor_dtype(name).name}"
                raise InputError(f"{self._name} must give outputs of types that numpy has, got {got}") from error
            tensors.append(Tensor(name, tuple(shape), dtype))
        return tensors

    def _checked_profiles(self) -> list[Profile]:
        engine = self._engine
        batch = engine.get_tensor_shape(INPUT_NAME)[0]
        if batch > 0:
            return [Profile(0, batch, batch, batch)]
        profiles = []
        for index in range(engine.num_optimization_profiles):
            smallest, best, largest = (shape[0] for shape in engine.get_tensor_profile_shape(INPUT_NAME, index))
            profiles.append(Profile(index, smallest, best, largest))
        return profiles

    def _new_lane(self) -> Lane:
        """A lane of its own for one more thread.

        Raises:
            CudaError: There is not enough memory.
        """
        strategies = self._library.ExecutionContextAllocationStrategy
        records = self._cuda_graphs and self._records_graphs
        # contexts that graphs were recorded from run one at a time, so they can share their activations
        strategy = strategies.USER_MANAGED if records else strategies.STATIC
        activations = self._engine.device_memory_size_v2 if records else None
        largest = max(profile.largest for profile in self._profiles)
        return Lane(self._tensors, largest, functools.partial(self._new_context, strategy), activations)

    def _new_context(self, strategy: trt.ExecutionContextAllocationStrategy) -> trt.IExecutionContext | None:
        """One more execution context; None where the library fails. A library with more options has them here."""
        return self._engine.create_execution_context(strategy)
