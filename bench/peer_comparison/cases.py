"""The cases: engines of one network, healthy or with a fault, measured by Polygraphy and by the proof."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SimpleCompareFunc
from torch import nn

from bench.peer_comparison.faults import Fault
from bench.plain_tome import PlainToMe
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.half_precision import precision_of, typed
from tocom.export.graph.lower import Lowering
from tocom.export.graph.trace import INPUT, OUTPUT
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.gates import GATES
from tocom.export.proof.polygraphy_tools import quiet
from tocom.export.proof.reference import in_format
from tocom.export.proof.validate import validate
from tocom.runtime.engines.openvino_engine import precision_hint
from tocom.vit import ReducedViT, schedule_for

ENGINES = (("openvino", "fp32"), ("onnxruntime", "fp16"), ("openvino", "bf16"))
_BATCH = 250


class OpenVinoRunner(BaseRunner):
    """Polygraphy's view of an ONNX file in OpenVINO, which it has no runner for."""

    def __init__(self, file: Path, precision: str) -> None:
        super().__init__(name=f"openvino {precision}")
        self._file, self._hint = file, precision_hint(precision)

    def activate_impl(self) -> None:
        """Compiles the file."""
        core = openvino.Core()
        options = {"INFERENCE_PRECISION_HINT": self._hint}
        self._compiled = core.compile_model(core.read_model(self._file), "CPU", options)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Images."""
        shape = [None if side.is_dynamic else side.get_length() for side in self._compiled.inputs[0].partial_shape]
        return TensorMetadata().add(INPUT, np.float32, shape)

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output."""
        self.inference_time = 0.0
        found = self._compiled(dict(feed_dict))
        return {min(port.get_names(), key=len): np.array(value) for port, value in found.items()}

    def deactivate_impl(self) -> None:
        """Drops the model."""
        del self._compiled


def plain_export(module: nn.Module, file: Path) -> Path:
    """`torch.onnx.export`, as a user would."""
    size = module.reference.model.patch_embed.img_size
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(2, 3, *size),), file, dynamo=True, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), external_data=False, verbose=False,
        )  # fmt: skip
    return file


def session(file: Path) -> onnxruntime.InferenceSession:
    """On the CPU, without warnings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def runner_of(file: Path, backend: str, precision: str) -> BaseRunner:
    """A plain export in a library and a number format; half precision by ONNX Runtime's converter."""
    if backend == "openvino":
        return OpenVinoRunner(file, precision)
    if precision == "fp16":
        half = file.with_suffix(".fp16.onnx")
        # ONNX Runtime has no half-precision kernel for a scatter that adds
        blocked = [*DEFAULT_OP_BLOCK_LIST, "ScatterElements"]
        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True, op_block_list=blocked), half)
        file = half
    return OnnxrtRunner(functools.partial(session, file), name=f"onnxruntime {precision}")


def run(runner: BaseRunner, sets: Sequence[np.ndarray]) -> RunResults:
    """One iteration per set of images."""
    with quiet():
        return Comparator.run([runner], data_loader=[{INPUT: images} for images in sets])


def compared(reference: RunResults, candidate: RunResults) -> list[dict[str, Any]]:
    """What Polygraphy says of the logits of each set."""
    both = RunResults()
    both.extend(candidate)
    both.extend(reference)
    functions = [SimpleCompareFunc(), SimpleCompareFunc(check_error_stat="quantile"), CosineSimilarityCompareFunc()]
    with quiet():
        elementwise, quantile, cosine = (
            next(iter(found.values()))
            for found in Comparator.compare_accuracy(both, comparisons=[(0, 1)], compare_func=functions)
        )
    return [
        {"default": bool(one[OUTPUT]), "max": float(one[OUTPUT].max_absdiff), "mean": float(one[OUTPUT].mean_absdiff),
         "median": float(one[OUTPUT].median_absdiff), "quantile": float(two[OUTPUT].quantile_absdiff),
         "cosine": 1 - float(three[OUTPUT].cosine_similarity)}
        for one, two, three in zip(elementwise, quantile, cosine, strict=True)
    ]  # fmt: skip


@dataclass
class Bench:
    """One network at one degree.

    Attributes:
        model: Its timm model.
        degree: Tokens merged in every block.
        folder: Where graphs are put.
    """

    model: nn.Module
    degree: int
    folder: Path

    @functools.cached_property
    def reference(self) -> ReducedViT:
        """What the proof compares with, in float64."""
        return in_format(ReducedViT(copy.deepcopy(self.model), self.degree), "fp64")

    def plain(self, name: str, fault: Fault | None) -> Path:
        """The plain export's file."""
        healthy = PlainToMe(ReducedViT(self.model, self.degree)).eval()
        module = healthy if fault is None else fault.plain_module(self.model, self.degree)
        return plain_export(module, self.folder / f"plain-{name}.onnx")

    def ours(self, name: str, fault: Fault | None, backend: str, precision: str, lowered: Any = None) -> Any:
        """Our engine, the fault in its graph."""
        graph = lowered or self.lowered(name, fault)
        proto = onnx.load(graph.file, load_external_data=False)
        if fault is not None and fault.edit is not None:
            fault.edit(proto, fault.block)
        proto = typed(proto, graph_precision(backend, precision))
        file = graph.file.with_name(f"{name}-{backend}-{precision}.onnx")
        file.write_bytes(proto.SerializeToString())
        altered = replace(graph, file=file, precision=precision_of(proto))
        return build(altered, backend=backend, precision=precision)

    def lowered(self, name: str, fault: Fault | None) -> Any:
        """Our float32 graph, with the fault where it is in the model."""
        model = self.model if fault is None else fault.model(self.model)
        folder = self.folder / f"ours-{name}"
        folder.mkdir(parents=True)
        fused = FusedCheckpoint(model.state_dict(), "network", self.degree, 0, None, "", None)
        return Lowering(model, WeightStore(folder)).lower(schedule_for(model, self.degree), fused, "model.onnx")

    def proven(self, engine: Any, images: np.ndarray) -> dict[str, Any]:
        """What the proof says of a set."""
        return summary(validate(engine, self.reference, batches(images)).findings.to_json())


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """A set in pieces.

    Yields:
        float32 [B, 3, H, W].
    """
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the proof's findings: the verdict, the first fault, and how far the worst part is off."""
    first = found["first_fault"]
    blocks = found["blocks"].values()
    parts = max(error for block in blocks for error in block["parts"].values())
    gates = [parts / found["part_allowed"], found["largest_margin"] / found["margin_allowed"]]
    gates += [gate["found"] / gate["allowed"] for gate in found["gates"].values()]
    return {
        "passed": found["passed"],
        "first": None if first is None else [first["block"], first["part"]],
        "flips": found["explained"] + found["unexplained"],
        "unexplained": found["unexplained"],
        "part_u": parts / GATES[found["precision"]].unit_roundoff,
        "gate": max(gates),
    }
