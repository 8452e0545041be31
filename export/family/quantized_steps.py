"""What a compile does for one degree of quantized engines: until it loses little enough, with products in float."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from tocom.calib.quantize.network import Quantization
from tocom.export.artifacts import Engine, Notify, OnnxGraph, Report
from tocom.export.engine.build import build
from tocom.export.family.quantizer import Drop, Quantizer
from tocom.export.family.steps import Graphs, Steps
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.debug_copy import runner_of
from tocom.export.proof.findings import QuantizationFindings
from tocom.export.proof.validate import validate
from tocom.export.source.load import Source, validation_batches
from tocom.runtime.backends import BACKENDS
from tocom.runtime.family_files import graph_name
from tocom.vit import ReducedViT


class QuantizedGraphs(Graphs):
    """The graphs of quantized engines; the float ones that they are made from are kept outside the family's folder.

    Attributes:
        quantizer: Calibrates, and measures what quantizing loses.
    """

    def __init__(self, inputs: Source, store: WeightStore, notify: Notify) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="tocom-")
        super().__init__(inputs, WeightStore(Path(self._scratch.name)), notify)
        self._store = store
        self._float_graphs: dict[int, OnnxGraph] = {}
        self.quantizer = Quantizer(inputs, store.folder, lambda text: notify(None, text))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the float graphs."""
        self._scratch.cleanup()

    def graph(self, degree: int, backend: str) -> OnnxGraph:
        """Calibrates, fuses and lowers a degree with all its products quantized."""
        return self.quantized(degree, backend, self.quantization(degree))

    def reference(self, graph: OnnxGraph) -> ReducedViT:
        """The quantized network in PyTorch, all its products quantized."""
        return self.quantizer.network(graph.source.degree, self.quantization(graph.source.degree))

    def plain_reference(self, graph: OnnxGraph) -> ReducedViT:
        """The float network in PyTorch."""
        return self.quantizer.network(graph.source.degree)

    def steps(self, backend: str) -> QuantizedSteps:
        """The steps of one backend."""
        return QuantizedSteps(self, backend)

    def quantization(self, degree: int) -> Quantization:
        """Calibrates a degree, with all its products quantized."""
        self.notify(degree, "calibrating")
        return self.quantizer.quantization(degree)

    def quantized(self, degree: int, backend: str, quantization: Quantization) -> OnnxGraph:
        """Fuses and lowers a degree with some of its products quantized.

        Args:
            degree: Which.
            backend: The one that it is for.
            quantization: Of the degree.
        """
        self.notify(degree, "lowering to ONNX")
        inputs = self.inputs
        recipe = inputs.graph_recipe(degree, backend) + ",".join(sorted(quantization.weights))
        name = graph_name(degree, hashlib.sha256(recipe.encode()).hexdigest())
        plain = self.float_graph(degree)
        graph = quantized_graph(plain, inputs.loaded.model, quantization, self._store, name, BACKENDS[backend].qdq)
        gc.collect()
        return graph

    def float_graph(self, degree: int) -> OnnxGraph:
        """The float32 graph of a degree."""
        if degree not in self._float_graphs:
            fused = self.inputs.fused(degree)
            schedule = self.inputs.schedules[degree]
            self._float_graphs[degree] = self._lowering.lower(schedule, fused, f"r{degree}.onnx")
        return self._float_graphs[degree]


class QuantizedSteps(Steps):
    """The steps of quantized engines: calibrate, and return products to float until a degree is accurate enough."""

    def __init__(self, graphs: QuantizedGraphs, backend: str) -> None:
        super().__init__(graphs, backend)
        self._graphs: QuantizedGraphs = graphs
        self._quantizer = graphs.quantizer

    def validated(self, degree: int) -> Report:
        """Makes a degree's engine; of its products as few return to float as its accuracy needs."""
        allowed, whole = self._quantizer.allowed_drop, self._graphs.quantization(degree)
        sensitivity: dict[str, float] = {}
        returned: list[str] = []
        while True:
            quantization = whole.without(returned)
            report = self._validated_as(degree, quantization)
            if not report:
                return report
            drop = self._drop(degree, report.engine)
            passed = allowed is None or drop.points <= allowed
            if passed or not quantization.weights:
                losses = self._losses(quantization, drop, sensitivity)
                return replace(
                    report, passed=passed, findings=replace(report.findings, passed=passed, quantization=losses)
                )
            loses = f"loses {drop.points:.2f}, may lose {allowed:g}"
            if not sensitivity:
                self._notify(degree, f"{loses}: measuring which products do it")
                sensitivity = self._quantizer.sensitivity(degree)
            returned.append(next(name for name in sensitivity if name not in returned))
            self._notify(degree, f"{loses}: {', '.join(returned)} in float")

    def rival(self, degree: int) -> Engine | None:
        """The float engine of the degree on the same library, in half precision where the library is faster so."""
        precision = BACKENDS[self.backend].float_rival
        if precision is None:
            return None
        return build(self._graphs.float_graph(degree), backend=self.backend, precision=precision)

    def _validated_as(self, degree: int, quantization: Quantization) -> Report:
        """Makes a degree's engine with some of its products quantized."""
        engine = self._built(degree, self._graphs.quantized(degree, self.backend, quantization))
        reference = self._quantizer.network(degree, quantization)
        return validate(engine, reference, validation_batches(self.inputs), self._quantizer.network(degree))

    def _drop(self, degree: int, engine: Engine) -> Drop:
        self._notify(degree, "comparing with float32")
        with runner_of(engine) as runner:
            return self._quantizer.drop(degree, runner.infer)

    def _losses(self, quantization: Quantization, drop: Drop, sensitivity: Mapping[str, float]) -> QuantizationFindings:
        return QuantizationFindings(
            format=quantization.format.name,
            products=len(quantization.weights),
            float_products=[name for name in self._quantizer.products if name not in quantization.weights],
            drop=round(drop.points, 4),
            drop_of="top1" if drop.top1 is not None else "agreement",
            drop_images=drop.images,
            float_top1=drop.float_top1,
            top1=drop.top1,
            max_drop=self._quantizer.allowed_drop,
            sensitivity={name: float(f"{loss:.3g}") for name, loss in sensitivity.items()},
        )
