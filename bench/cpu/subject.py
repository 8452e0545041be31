"""A model on a CPU: our graphs of it, what a user would pick instead, and runners of both."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import timm
import torch
from torch import Tensor, nn

from bench.plain_tome import PlainToMe
from tocom.calib.quantize.calibrate import OBSERVED, Calibration, Method, calibrate
from tocom.export.artifacts import FusedCheckpoint, OnnxGraph
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import Lowering
from tocom.export.graph.trace import INPUT, OUTPUT
from tocom.export.graph.weight_store import WeightStore
from tocom.export.source.images import default_images
from tocom.runtime.backends import QdqForm
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.schedule import ScheduleFamily
from tocom.vit import ReducedViT, schedule_for

_CALIBRATION_IMAGES = 16


class TorchRunner(EngineRunner):
    """A torch module as an engine."""

    backend = "torch"

    def __init__(self, model: nn.Module, classes: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.model, self.classes, self.input_size, self._dtype = model, classes, size, dtype

    @torch.inference_mode()
    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(pixel_values).to(self._dtype)).float().numpy()

    def _close(self) -> None:
        del self.model


class OpenVinoPeer(EngineRunner):
    """A file as OpenVINO itself runs it, compiled for one batch size; nothing of this project in between."""

    backend = "openvino"

    def __init__(self, file: Path, precision: str, batch: int, classes: int, size: tuple[int, int, int]) -> None:
        self.classes, self.input_size = classes, size
        core = openvino.Core()
        model = core.read_model(file)
        model.reshape([batch, *size])
        hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision), "PERFORMANCE_HINT": "LATENCY"}
        self._request = core.compile_model(model, "CPU", hints).create_infer_request()

    def _infer(self, pixel_values: np.ndarray) -> np.ndarray:
        self._request.infer({INPUT: pixel_values}, share_inputs=True)
        return self._request.get_output_tensor(0).data.copy()

    def _close(self) -> None:
        del self._request


class Subject:
    """One model, with what was lowered and exported of it."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.folder = name, work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = timm.create_model(name).eval().requires_grad_(False)
        self.store = WeightStore(self.folder)
        self.lowering = Lowering(self.model, self.store)

    def reduced(self, degree: int, schedule: str = "constant") -> ReducedViT:
        """The PyTorch reference at a degree."""
        return ReducedViT(self.model, schedule_for(self.model, degree, ScheduleFamily(schedule))).eval()

    def graph(self, degree: int, schedule: str, form: str = "fp32") -> OnnxGraph:
        """Our graph of a degree, in a form of `tocom.export.engine.build.graph_precision`."""
        made_of = FusedCheckpoint(self.model.state_dict(), self.name, degree, 0, None, "random", None)
        planned = schedule_for(self.model, degree, ScheduleFamily(schedule))
        name = f"{degree}-{schedule.replace(':', '')}-{form}.onnx"
        graph = self.lowering.lower(planned, made_of, name)
        if form != "fp32":
            quantization = self.calibration.quantization(self.model)
            unsigned = QdqForm(unsigned=form.endswith("unsigned"))
            graph = quantized_graph(graph, self.model, quantization, self.store, f"quantized-{name}", unsigned)
        gc.collect()
        return graph

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Ranges over the degrees that a family looks at, on patterns."""
        return calibrate([self.reduced(degree) for degree in OBSERVED], self.patterns(), Method())

    def patterns(self) -> Tensor:
        """Images to calibrate on."""
        size = (3, *self.model.patch_embed.img_size)
        return torch.cat([torch.from_numpy(each) for each in default_images(size, _CALIBRATION_IMAGES // 2)])

    def peer_quantized(self, degree: int) -> Path:
        """The plain export, quantized by NNCF's preset for transformers on OpenVINO's model."""
        file = self.folder / f"nncf-{degree}.xml"
        if not file.exists():
            import nncf

            images = nncf.Dataset([image[None].numpy() for image in self.patterns()], lambda image: {INPUT: image})
            model = nncf.quantize(
                openvino.Core().read_model(self.plain_export(degree)),
                images,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=_CALIBRATION_IMAGES,
            )
            openvino.save_model(model, file, compress_to_fp16=False)
        return file

    def plain_export(self, degree: int) -> Path:
        """What torch.onnx.export makes of the reference, without our operator; of the timm model at degree 0."""
        file = self.folder / f"plain-{degree}.onnx"
        if not file.exists():
            network = PlainToMe(self.reduced(degree)) if degree else self.model
            sample = torch.zeros(2, 3, *self.model.patch_embed.img_size)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    network, (sample,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},), opset_version=20,
                )  # fmt: skip
            program.save(file, external_data=True)
            gc.collect()
        return file


def peers(subject: Subject, batch: int, degree: int) -> dict[str, Callable[[], EngineRunner]]:
    """What a user would pick instead, by name."""
    network = PlainToMe(subject.reduced(degree)) if degree else subject.model
    classes, size = subject.model.num_classes, (3, *subject.model.patch_embed.img_size)

    def compiled() -> EngineRunner:
        half = copy.deepcopy(network).to(torch.bfloat16)
        return TorchRunner(torch.compile(half, dynamic=False), classes, size, torch.bfloat16)

    def by_openvino(precision: str) -> EngineRunner:
        return OpenVinoPeer(subject.plain_export(degree), precision, batch, classes, size)

    return {
        "torch eager fp32": lambda: TorchRunner(network, classes, size, torch.float32),
        "torch.compile bf16": compiled,
        "plain export, ONNX Runtime fp32": lambda: open_engine(
            subject.plain_export(degree), "onnxruntime", batch=batch
        ),
        "plain export, OpenVINO fp32": lambda: by_openvino("fp32"),
        "plain export, OpenVINO bf16": lambda: by_openvino("bf16"),
        "plain export, OpenVINO int8": lambda: OpenVinoPeer(
            subject.peer_quantized(degree), "bf16", batch, classes, size
        ),
    }
