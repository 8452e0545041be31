"""What Triton is told of each model: its config.pbtxt, as messages that `prototext` writes down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tocom.runtime.backends import BACKENDS
from tocom.runtime.checked_json import Json
from tocom.runtime.engines.base import INPUT_NAME, OUTPUT_NAME
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import EngineEntry, Family
from tocom.runtime.preprocess import MAX_PIXELS
from tocom.serving.triton.prototext import Word, entries

IMAGE_NAME = "image"
LABELS = "labels.txt"

_FP32, _BYTES = Word("TYPE_FP32"), Word("TYPE_STRING")
_DEFAULT_MAX_BATCH = 32


@dataclass(frozen=True)
class TritonOptions:
    """How Triton is to run the models.

    Attributes:
        max_batch: Images of one call, and of one request, at most. Default: 32, or what a plan allows.
        instances: Calls of a model that run at the same time.
        max_queue: Requests of a model that wait at most; further ones are refused.
        queue_delay_us: How long a request waits for others to share a call with, in microseconds.
        queue_timeout_ms: How long a request waits at most before it is refused.
        gpu: Whether ONNX Runtime is to run on a GPU.

    Raises:
        InputError: A number is out of its range, or requests would be refused while they wait for others.
    """

    max_batch: int | None = None
    instances: int = 1
    max_queue: int = 128
    queue_delay_us: int = 1000
    queue_timeout_ms: int = 10_000
    gpu: bool = False

    def __post_init__(self) -> None:
        smallest = {"max_batch": 1, "instances": 1, "max_queue": 1, "queue_delay_us": 0, "queue_timeout_ms": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 1 << 31:
                raise InputError(f"{name.replace('_', '-')} must be {least} or more, got {value}")
        if self.queue_delay_us >= 1000 * self.queue_timeout_ms:  # Triton would refuse what waits for company
            raise InputError(
                f"queue-timeout-ms must be longer than queue-delay-us, got {self.queue_timeout_ms} ms and "
                f"{self.queue_delay_us} us"
            )


def engine_config(
    name: str, family: Family, entry: EngineEntry, backend: str, options: TritonOptions
) -> dict[str, Any]:
    """The model of one degree.

    OpenVINO's backend compiles a model for exactly `max_batch_size` images and pads what is less, so there a request's
    own batch is what runs: dimension 0 is an ordinary one, and the batcher only keeps the queue.

    Args:
        name: The model's.
        family: Whose degree it is.
        entry: The degree.
        backend: One that Triton has, of `tocom.runtime.backends.BACKENDS`.
        options: How it is to run.

    Raises:
        InputError: The engine cannot be run with these batch sizes.
    """
    most, best = _batches(entry, backend, options)
    batch = [] if most else [-1]
    row = BACKENDS[backend]
    return {
        "name": name,
        "backend": row.triton.backend,
        "default_model_filename": row.triton.file,
        "max_batch_size": most,
        "input": {"name": INPUT_NAME, "data_type": _FP32, "dims": [*batch, *family.input.size]},
        "output": _logits(family, batch),
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": _instances(options, gpu=row.builds_plans or (backend == "onnxruntime" and options.gpu)),
        "dynamic_batching": _queue(options, best, options.queue_delay_us if most else None),
        "model_warmup": [_warmup(family, size, batched=bool(most)) for size in dict.fromkeys([1, *best])],
        "parameters": _texts(_about(entry) | _openvino(entry, backend)),
    }


def preprocess_config(name: str, family: Family, options: TritonOptions, most: int) -> dict[str, Any]:
    """The model that turns encoded images into the network's input.

    Args:
        name: The model's.
        family: Whose input it makes.
        options: How it is to run.
        most: Images of one request, at most.
    """
    parameters = {
        "input": json.dumps(family.input.to_json(), sort_keys=True),
        "max_images": str(most),
        "max_pixels": str(MAX_PIXELS),
    }
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": {"name": IMAGE_NAME, "data_type": _BYTES, "dims": [-1]},
        "output": {"name": INPUT_NAME, "data_type": _FP32, "dims": [-1, *family.input.size]},
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": _instances(options, gpu=False),
        "dynamic_batching": _queue(options, [], None),
        "parameters": _texts(parameters),
    }


def ensemble_config(name: str, family: Family, preprocess: str, engine: str) -> dict[str, Any]:
    """The model that sends encoded images through the two others.

    Args:
        name: The model's.
        family: Whose degree it is.
        preprocess: Name of the model that prepares images.
        engine: Name of the model of the degree.
    """

    def step(model: str, input_name: str, output_name: str) -> dict[str, Any]:
        maps = {"input_map": entries({input_name: input_name}), "output_map": entries({output_name: output_name})}
        return {"model_name": model, "model_version": -1, **maps}

    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": {"name": IMAGE_NAME, "data_type": _BYTES, "dims": [-1]},
        "output": _logits(family, [-1]),
        "ensemble_scheduling": {
            "step": [step(preprocess, IMAGE_NAME, INPUT_NAME), step(engine, INPUT_NAME, OUTPUT_NAME)]
        },
    }


def largest_batch(entry: EngineEntry, backend: str, options: TritonOptions) -> int:
    """Images of one request, at most, also where Triton itself sets no limit."""
    return _batches(entry, backend, options)[0] or _DEFAULT_MAX_BATCH


def _batches(entry: EngineEntry, backend: str, options: TritonOptions) -> tuple[int, list[int]]:
    """The largest batch, 0 where Triton is not to batch, and the sizes above 1 that it should rather make.

    Raises:
        InputError: The engine cannot be run with the largest batch that was asked for.
    """
    row = BACKENDS[backend]
    if not row.triton.batches:
        if options.max_batch is not None:
            raise InputError(
                f"max-batch must be left out for Triton's {row.triton.backend} backend, got {options.max_batch}: it "
                "would pad every call to that many images; give --backend onnxruntime to have requests batched"
            )
        return 0, []
    if not row.builds_plans:
        most = options.max_batch or _DEFAULT_MAX_BATCH
        timed = (int(size) for size in entry.latency_ms if size.isascii() and size.isdigit() and len(size) < 10)
        return most, sorted(size for size in timed if 1 < size <= most)
    build = Json(entry.build, "build").key("options").key("batch")
    if len(profile := build.integers(minimum=1)) != 3:
        build.refuse("three numbers, the smallest, best and largest batch")
    smallest, best, largest = profile
    if smallest > 1:
        raise InputError(
            f"the plan of degree {entry.degree} must take single images, got batches of {smallest} to {largest}: "
            f"compile it with --batch 1:{best}:{largest}"
        )
    if (options.max_batch or 0) > largest:
        raise InputError(
            f"max-batch must be at most {largest}, what the plan of degree {entry.degree} was built for, got "
            f"{options.max_batch}: compile it with --batch 1:{best}:{options.max_batch}"
        )
    most = options.max_batch or largest
    return most, [best] if 1 < best <= most else []


def _logits(family: Family, batch: list[int]) -> dict[str, Any]:
    labels = None if family.class_names is None else LABELS
    return {"name": OUTPUT_NAME, "data_type": _FP32, "dims": [*batch, family.classes], "label_filename": labels}


def _instances(options: TritonOptions, *, gpu: bool) -> dict[str, Any]:
    return {"count": options.instances, "kind": Word("KIND_GPU" if gpu else "KIND_CPU")}


def _queue(options: TritonOptions, best: list[int], delay_us: int | None) -> dict[str, Any]:
    policy = {
        "timeout_action": Word("REJECT"),
        "default_timeout_microseconds": options.queue_timeout_ms * 1000,
        "allow_timeout_override": True,
        "max_queue_size": options.max_queue,
    }
    return {
        "preferred_batch_size": best,
        "max_queue_delay_microseconds": delay_us,
        "default_queue_policy": policy,
    }


def _warmup(family: Family, size: int, *, batched: bool) -> dict[str, Any]:
    """Triton's random data are random bytes, NaN among them: zeros, an image of the mean colour, are real numbers."""
    dims = list(family.input.size) if batched else [size, *family.input.size]
    inputs = entries({INPUT_NAME: {"data_type": _FP32, "dims": dims, "zero_data": True}})
    return {"name": f"batch {size}", "batch_size": size, "inputs": inputs}


def _about(entry: EngineEntry) -> dict[str, str]:
    return {
        "degree": str(entry.degree),
        "tokens": ",".join(map(str, entry.tokens)),
        "precision": entry.precision,
        "engine_sha256": entry.sha256[entry.engine],
        "graph_sha256": entry.sha256[entry.onnx],
    }


def _openvino(entry: EngineEntry, backend: str) -> dict[str, str]:
    if backend != "openvino":
        return {}
    half = {"HINT_BF16": "YES"} if entry.precision == "bf16" else {}
    return {"PERFORMANCE_HINT": "LATENCY", **half}


def _texts(parameters: Mapping[str, str]) -> list[dict[str, Any]]:
    return entries({name: {"string_value": text} for name, text in parameters.items()})
