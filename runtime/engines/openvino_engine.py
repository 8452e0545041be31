"""The OpenVINO engine: the fast one on CPUs, in float32, bfloat16 or int8."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
from openvino.frontend import FrontEndManager

from ..errors import InputError, one_line, readable
from ..native import COMMAND, library, record
from .base import INPUT_NAME, OUTPUT_NAME, EngineRunner, EngineSettings
from .openvino_fusion import NATIVE, fuse

_DEVICE = "CPU"


def describe() -> str:
    """One line: the version, and what merges tokens."""
    capabilities = _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    merging = "native merge operator" if library() else f"no native merge operator ({COMMAND})"
    half = "bf16" if "BF16" in capabilities else "no bf16"
    return f"{openvino.__version__.partition('-')[0]}, {half}, {merging}"


def native_operators() -> frozenset[str]:
    """Operators of this project that the engine runs without their function bodies."""
    return frozenset({NATIVE} if library() else ())


def open_engine(path: Path, settings: EngineSettings) -> OpenVinoRunner:
    """Loads an ONNX file on the CPU; see `OpenVinoRunner`."""
    return OpenVinoRunner(path, settings)


def precision_hint(precision: str) -> str:
    """What OpenVINO is told about the numbers that no format in the graph decides.

    Raises:
        InputError: The processor has no instructions for bf16.
    """
    has_half = "BF16" in _core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not has_half:
        raise InputError("this processor has no bf16 instructions: use an engine in fp32")
    return "bf16" if has_half and precision != "fp32" else "f32"


@functools.cache
def _core() -> openvino.Core:
    return openvino.Core()


def _read(path: Path) -> openvino.Model:
    """Reads an ONNX file by its own frontend: the others would be tried too, and complain on stderr."""
    frontend = FrontEndManager().load_by_framework("onnx")
    if (native := library()) is not None:
        frontend.add_extension(str(native))
    return frontend.convert(frontend.load(str(path)))


class OpenVinoRunner(EngineRunner):
    """Runs an ONNX file with input `pixel_values` [batch, 3, H, W] and output `logits` [batch, classes]."""

    backend = "openvino"

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        """Loads the file.

        Args:
            path: The graph; its external data lie in the same folder or below. Operators of this project are either
                inlined, or `native_operators` has them.
            settings: Precision "fp32", "bf16" or "int8"; with a batch, the engine is compiled for exactly that many
                images, and smaller batches are padded; for throughput, a batch is shared between parallel streams.

        Raises:
            InputError: The file is not a graph this class runs, or the precision is not one this processor has.
        """
        self._name = one_line(path)
        self._batch = settings.batch
        core = _core()
        hint = precision_hint(settings.precision)
        properties: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "THROUGHPUT" if settings.throughput else "LATENCY",
        }
        if settings.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = settings.threads
        try:
            model = _read(path)
        except Exception as error:  # OpenVINO raises RuntimeError, and others for what its frontends throw
            if f"ai.tocom.{NATIVE}" in str(error):
                raise InputError(f"{self._name} needs the native merge operator, which is not there: build it with "
                                 f"`{COMMAND}`, or compile the family again here") from error  # fmt: skip
            raise InputError(f"{self._name} is not a graph that OpenVINO loads: {_reason(error)}") from error
        self.input_size, self.classes = self._contract(model)
        try:
            if settings.batch is not None and not settings.throughput:
                model.reshape([settings.batch, *self.input_size])
            self._merges = fuse(model, half=hint == "bf16")
            self._compiled = core.compile_model(model, _DEVICE, properties)
            streams = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        except Exception as error:  # see above
            raise InputError(f"{self._name} cannot be compiled by OpenVINO: {_reason(error)}") from error
        self._calls = threading.Lock()  # a request runs one call at a time, and one call takes all of them
        self._requests = [self._compiled.create_infer_request() for _ in range(streams if settings.throughput else 1)]
        self._outputs = {name: index for index, port in enumerate(self._compiled.outputs) for name in port.get_names()}

    def _contract(self, model: openvino.Model) -> tuple[tuple[int, int, int], int]:
        """(3, H, W) and the number of classes that the graph declares.

        Raises:
            InputError: Its inputs and outputs are not those of this project's graphs.
        """
        inputs = {name: port for port in model.inputs for name in port.get_names()}
        outputs = {name: port for port in model.outputs for name in port.get_names()}
        shape = inputs[INPUT_NAME].get_partial_shape() if set(inputs) == {INPUT_NAME} else openvino.PartialShape([])
        if len(shape) != 4 or any(side.is_dynamic for side in list(shape)[1:]) or shape[1].get_length() != 3:
            got = ", ".join(f"{name} {port.get_partial_shape()}" for name, port in inputs.items())
            raise InputError(f"{self._name} must take one input, {INPUT_NAME} [batch, 3, H, W], got {one_line(got)}")
        if inputs[INPUT_NAME].get_element_type() != openvino.Type.f32:
            raise InputError(f"{self._name} must take {INPUT_NAME} as f32, got {inputs[INPUT_NAME].get_element_type()}")
        logits = outputs[OUTPUT_NAME].get_partial_shape() if OUTPUT_NAME in outputs else openvino.PartialShape([])
        if len(logits) != 2 or logits[1].is_dynamic:
            got = ", ".join(f"{name} {port.get_partial_shape()}" for name, port in outputs.items())
            raise InputError(f"{self._name} must give {OUTPUT_NAME} [batch, classes], got {one_line(got)}")
        return tuple(side.get_length() for side in list(shape)[1:]), logits[1].get_length()

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        parts = list(self._parts(pixel_values))
        logits = []
        with self._calls:
            for start in range(0, len(parts), len(self._requests)):
                logits += [outputs[OUTPUT_NAME] for outputs in self._run(parts[start : start + len(self._requests)])]
        return np.concatenate(logits) if len(logits) > 1 else logits[0]

    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs, and what the native operator decided, under the names of its outputs."""
        with self._calls:
            return self._outputs_and_decisions(pixel_values)

    def _outputs_and_decisions(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        parts = []
        for part in self._parts(pixel_values):  # one after the other, so that the operator's calls are in order
            outputs = {}
            calls = None
            if self._merges:
                calls = record(lambda part=part, outputs=outputs: outputs.update(self._run([part])[0]))
            if calls is None:
                outputs = self._run([part])[0]
            elif len(calls) != len(self._merges):  # the record is the process's
                raise InputError(f"{self._name}: other engines merged tokens meanwhile, so its decisions are not known")
            for merge, call in zip(self._merges, calls or (), strict=True):
                outputs |= merge.split(call, len(part))
            parts.append(outputs)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, parts: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Every output for each part, each on a request of its own, all at the same time.

        Raises:
            InputError: OpenVINO fails.
        """
        busy = list(zip(self._requests, parts, strict=False))
        try:
            for request, part in busy[1:]:
                request.start_async({INPUT_NAME: self._padded(part)}, share_inputs=True)
            self._requests[0].infer({INPUT_NAME: self._padded(parts[0])}, share_inputs=True)
            for request, _ in busy[1:]:
                request.wait()
            return [
                {name: request.get_output_tensor(at).data[: len(part)].copy() for name, at in self._outputs.items()}
                for request, part in busy
            ]
        except Exception as error:  # see __init__
            batch = sum(map(len, parts))
            raise InputError(f"{self._name}: OpenVINO failed on a batch of {batch}: {_reason(error)}") from error

    def _parts(self, pixel_values: np.ndarray) -> Iterator[np.ndarray]:
        """What one request takes at a time: the compiled batch, or an equal share of each stream's."""
        size = self._batch if len(self._requests) == 1 else -(-len(pixel_values) // len(self._requests))
        size = size or len(pixel_values)
        for start in range(0, len(pixel_values), size):
            yield pixel_values[start : start + size]

    def _padded(self, part: np.ndarray) -> np.ndarray:
        if self._batch is None or len(part) == self._batch or len(self._requests) > 1:
            return part
        return np.concatenate([part, np.zeros((self._batch - len(part), *part.shape[1:]), part.dtype)])

    def _close(self) -> None:
        del self._requests, self._compiled


def _reason(error: Exception) -> str:
    """The last line that OpenVINO gives: the others are places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return readable(lines[-1] if lines else error)
