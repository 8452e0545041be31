"""The ONNX Runtime engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from ..errors import InputError, one_line, readable
from .base import INPUT_NAME, OUTPUT_NAME, EngineRunner, EngineSettings
from .mapped_weights import mapped_weights, return_freed_memory

CPU = "CPUExecutionProvider"

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_FATAL = 4  # errors reach the caller as exceptions, so that nothing needs to be logged to stderr as well


def describe() -> str:
    """One line: the version and the providers this build of ONNX Runtime has."""
    return f"{onnxruntime.__version__}, built with {', '.join(onnxruntime.get_available_providers())}"


def open_engine(path: Path, settings: EngineSettings) -> OrtRunner:
    """Loads an ONNX file on the CPU; see `OrtRunner`. It prepares for no batch and knows one way to be fast."""
    return OrtRunner(path, threads=settings.threads, share_weights=settings.share_weights)


class OrtRunner(EngineRunner):
    """Runs an ONNX file with input `pixel_values` [batch, 3, H, W] and output `logits` [batch, classes]."""

    backend = "onnxruntime"

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        provider: str = CPU,
        share_weights: bool = False,
        content: bytes | None = None,
    ) -> None:
        """Loads the file.

        Args:
            path: The graph; its external data lie in the same folder or below.
            threads: CPU threads for one call; ONNX Runtime's choice by default.
            provider: The execution provider that has to run the graph.
            share_weights: Whether to read weights from memory that all such runners of the process share, instead of
                packing them, which is faster.
            content: Another graph to run in the place of the file's, such as a debug copy; its external data are found
                where the file's are.

        Raises:
            InputError: The file is not a graph this class runs, or the provider does not work here.
        """
        self._name = one_line(path)
        self._weights: dict[str, onnxruntime.OrtValue] = {}
        self._session = self._load(Path(path), threads, provider, share_weights, content)
        if self._session.get_providers()[0] != provider:  # ONNX Runtime falls back to the CPU without raising
            raise InputError(f"provider {provider} does not work here: ONNX Runtime fell back to {CPU}; ask for {CPU}")
        self.input_size, self.classes = self._contract()

    def _load(
        self, path: Path, threads: int | None, provider: str, share_weights: bool, content: bytes | None
    ) -> onnxruntime.InferenceSession:
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise InputError(f"provider must be one this build has ({', '.join(available)}), got {one_line(provider)}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        # Providers log through the process-wide logger before a session exists.
        onnxruntime.set_default_logger_severity(_FATAL)
        # Idle threads otherwise spin for a while, on the cores that the family's other engines in this process need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            if share_weights:
                # packed for its products, a weight would be in memory once more for every session
                options.add_session_config_entry("session.disable_prepacking", "1")
                for name, array in mapped_weights(path).items():
                    self._weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
                    options.add_initializer(name, self._weights[name])
            if content is not None:
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
            # CPU after it: a few operators, such as shape arithmetic, are only implemented there.
            providers = list(dict.fromkeys((provider, CPU)))
            session = onnxruntime.InferenceSession(content or str(path), options, providers=providers)
            if share_weights:
                return_freed_memory()
            return session
        except Exception as error:  # ONNX Runtime's exceptions have no common base class below Exception
            raise InputError(f"{self._name} is not a graph that ONNX Runtime loads: {readable(error)}") from error

    def _contract(self) -> tuple[tuple[int, int, int], int]:
        """(3, H, W) and the number of classes that the graph declares.

        Raises:
            InputError: Its inputs and outputs are not those of this project's graphs.
        """
        inputs, outputs = self._session.get_inputs(), {node.name: node for node in self._session.get_outputs()}
        shape = inputs[0].shape if [node.name for node in inputs] == [INPUT_NAME] else []
        if len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[1:]):
            got = ", ".join(f"{node.name} {node.shape}" for node in inputs)
            raise InputError(f"{self._name} must take one input, {INPUT_NAME} [batch, 3, H, W], got {one_line(got)}")
        if inputs[0].type != "tensor(float)":
            raise InputError(f"{self._name} must take {INPUT_NAME} as tensor(float), got {inputs[0].type}")
        shape_out = outputs[OUTPUT_NAME].shape if OUTPUT_NAME in outputs else []
        if len(shape_out) != 2 or not isinstance(shape_out[1], int):
            got = ", ".join(f"{node.name} {node.shape}" for node in outputs.values())
            raise InputError(f"{self._name} must give {OUTPUT_NAME} [batch, classes], got {one_line(got)}")
        return tuple(shape[1:]), shape_out[1]

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._run([OUTPUT_NAME], pixel_values)[0]

    def _infer_all(self, pixel_values: np.ndarray) -> dict[str, np.ndarray]:
        names = [node.name for node in self._session.get_outputs()]
        return dict(zip(names, self._run(names, pixel_values), strict=True))

    def _run(self, names: list[str], pixel_values: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(names, {INPUT_NAME: pixel_values})
        except Exception as error:  # see _load
            message = f"ONNX Runtime failed on a batch of {len(pixel_values)}: {readable(error)}"
            raise InputError(f"{self._name}: {message}") from error

    def _close(self) -> None:
        del self._session, self._weights  # frees them and the thread pool
