"""What a compile does for one degree: fuse, lower, build, prove; and for quantized engines, until they lose little."""

from __future__ import annotations

import copy
import gc
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tocom.calib.quantize.network import Quantization
from tocom.export.artifacts import Engine, Notify, OnnxGraph, Report
from tocom.export.engine.build import build, graph_precision
from tocom.export.family.quantizer import Drop, Quantizer
from tocom.export.graph.insert_qdq import forms, quantized_graph
from tocom.export.graph.lower import Lowering, reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.debug_copy import runner_of
from tocom.export.proof.validate import validate
from tocom.export.source.load import Source, validation_batches
from tocom.export.source.options import QUANTIZED
from tocom.vit import ReducedViT


class Steps:
    """The steps of float engines; a context manager.

    Args:
        source: What is compiled.
        store: The family folder's weight files.
        notify: Told of every step.
    """

    def __init__(self, source: Source, store: WeightStore, notify: Notify) -> None:
        self.source, self._store, self._notify = source, store, notify
        self._lowering = Lowering(source.loaded.model, store, source.reduction)

    def with_backend(self, backend: str) -> Self:
        """The same for another backend."""
        own = copy.copy(self)
        own.source = replace(self.source, options=replace(self.source.options, backend=backend))
        return own

    def graph(self, degree: int, backend: str | None = None) -> OnnxGraph:
        """Fuses and lowers a degree, for the options' backend or another one."""
        self._notify(degree, "fusing")
        fused = self.source.fused(degree)
        self._notify(degree, "lowering to ONNX")
        backend = backend or self.source.options.backend
        name = graph_name(degree, self.source.graph_recipe(degree, backend))
        precision = graph_precision(backend, self.source.options.precision)
        kept = self.source.options.float_blocks
        graph = self._lowering.lower(self.source.schedules[degree], fused, name, precision, kept)
        gc.collect()  # the exporter leaves cycles that hold copies of the weights
        return graph

    def reference(self, graph: OnnxGraph) -> ReducedViT:
        """What engines of a graph are compared with."""
        source = self.source
        schedule = source.schedules[graph.source.degree]
        return reference_model(source.loaded.model, schedule, graph.source, source.reduction)

    def plain_reference(self, _graph: OnnxGraph) -> ReducedViT | None:
        """The reference that is not quantized, of graphs that are."""
        return None

    def proven(self, degree: int) -> Report:
        """Makes a degree's engine, and says whether it may be listed."""
        return self._proven(degree, self.graph(degree))

    def rival(self, _degree: int) -> Engine | None:
        """The fastest engine of a degree on the same library that is not quantized, where the degree's is."""
        return None

    def _proven(self, degree: int, graph: OnnxGraph) -> Report:
        self._notify(degree, "building")
        options = self.source.options
        engine = build(graph, backend=options.backend, precision=options.precision, plan=options.plan)
        self._notify(degree, "validating")
        report = validate(engine, self.reference(graph), validation_batches(self.source))
        return replace(report, findings={**report.findings, "float_blocks": list(options.float_blocks)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Keeps nothing to give back."""


class QuantizedSteps(Steps):
    """The steps of quantized engines: calibrate, and return products to float until a degree is accurate enough."""

    def __init__(self, source: Source, store: WeightStore, notify: Notify) -> None:
        super().__init__(source, store, notify)
        self._scratch = tempfile.TemporaryDirectory(prefix="tocom-")
        self._lowering = Lowering(source.loaded.model, WeightStore(Path(self._scratch.name)), source.reduction)
        self._float_graphs: dict[int, OnnxGraph] = {}
        self.quantizer = Quantizer(source, store.folder, lambda text: notify(None, text))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the float graphs."""
        self._scratch.cleanup()

    def graph(self, degree: int, backend: str | None = None) -> OnnxGraph:
        """Calibrates, fuses and lowers a degree with all its products quantized."""
        return self._graph(degree, self._quantization(degree), backend or self.source.options.backend)

    def reference(self, graph: OnnxGraph) -> ReducedViT:
        """The quantized network in PyTorch, all its products quantized."""
        return self.quantizer.network(graph.source.degree, self._quantization(graph.source.degree))

    def plain_reference(self, graph: OnnxGraph) -> ReducedViT:
        """The float network in PyTorch."""
        return self.quantizer.network(graph.source.degree)

    def proven(self, degree: int) -> Report:
        """Makes a degree's engine; of its products as few return to float as its accuracy needs."""
        allowed, whole = self.quantizer.allowed_drop, self._quantization(degree)
        order: dict[str, float] = {}
        returned: list[str] = []
        while True:
            kept = whole.without(returned)
            report = self._proven_as(degree, kept)
            if not report:
                return report
            self._notify(degree, "comparing with float32")
            with runner_of(report.engine) as runner:
                drop = self.quantizer.drop(degree, runner.infer)
            holds = allowed is None or drop.points <= allowed
            left = [name for name in self.quantizer.products if name not in kept.weights]
            findings = {
                **report.findings,
                "passed": holds,
                "quantization": _summary(kept, left, drop, allowed, order),
            }
            if holds or not kept.weights:
                return replace(report, passed=holds, findings=findings)
            if not order:
                self._notify(degree, f"loses {drop.points:.2f}, may lose {allowed:g}: measuring which products do it")
                order = self.quantizer.sensitivity(degree)
            returned.append(next(name for name in order if name not in returned))
            self._notify(degree, f"loses {drop.points:.2f}, may lose {allowed:g}: {', '.join(returned)} in float")

    def rival(self, degree: int) -> Engine | None:
        """The float engine of the degree on the same library, in half precision where the library is faster so."""
        backend = self.source.options.backend
        precision = {"openvino": "bf16", "onnxruntime": "fp32"}.get(backend)
        if precision is None:
            return None
        return build(self._float_graph(degree), backend=backend, precision=precision)

    def _float_graph(self, degree: int) -> OnnxGraph:
        if degree not in self._float_graphs:
            fused = self.source.fused(degree)
            self._float_graphs[degree] = self._lowering.lower(self.source.schedules[degree], fused, f"r{degree}.onnx")
        return self._float_graphs[degree]

    def _quantization(self, degree: int) -> Quantization:
        self._notify(degree, "calibrating")
        return self.quantizer.quantization(degree)

    def _proven_as(self, degree: int, quantization: Quantization) -> Report:
        graph = self._graph(degree, quantization, self.source.options.backend)
        self._notify(degree, "building")
        options = self.source.options
        engine = build(graph, backend=options.backend, precision=options.precision, plan=options.plan)
        self._notify(degree, "validating")
        reference = self.quantizer.network(degree, quantization)
        return validate(engine, reference, validation_batches(self.source), self.quantizer.network(degree))

    def _graph(self, degree: int, quantization: Quantization, backend: str) -> OnnxGraph:
        self._notify(degree, "lowering to ONNX")
        source = self.source
        recipe = source.graph_recipe(degree, backend) + ",".join(sorted(quantization.weights))
        name = graph_name(degree, hashlib.sha256(recipe.encode()).hexdigest())
        plain = self._float_graph(degree)
        graph = quantized_graph(plain, source.loaded.model, quantization, self._store, name, forms(backend))
        gc.collect()
        return graph


def steps_of(source: Source, store: WeightStore, notify: Notify) -> Steps:
    """The steps that a source's precision needs."""
    return (QuantizedSteps if source.options.precision in QUANTIZED else Steps)(source, store, notify)


def graph_name(degree: int, recipe: str) -> str:
    """File name of a degree's graph."""
    return f"r{degree:02d}-{recipe[:12]}.onnx"


def _summary(
    quantization: Quantization, left: list[str], drop: Drop, allowed: float | None, order: dict[str, float]
) -> dict[str, Any]:
    """For the manifest."""
    return {
        "format": quantization.format.name,
        "products": len(quantization.weights),
        "float_products": left,
        "drop": round(drop.points, 4),
        "drop_of": "top1" if drop.top1 is not None else "agreement",
        "drop_images": drop.images,
        "float_top1": drop.float_top1,
        "top1": drop.top1,
        "max_drop": allowed,
        "sensitivity": {name: float(f"{each:.3g}") for name, each in order.items()},
    }
