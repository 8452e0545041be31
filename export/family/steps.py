"""What a compile does for one degree of float engines: fuse, lower, build, validate."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import TracebackType
from typing import Self

from tocom.export.artifacts import Engine, Notify, OnnxGraph, Report
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.lower import Lowering, reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.validate import validate
from tocom.export.source.load import Source, validation_batches
from tocom.runtime.family_files import graph_name
from tocom.vit import ReducedViT


class Graphs:
    """The graphs of float engines, for any backend, and what engines of them are compared with; a context manager.

    Args:
        inputs: What is compiled.
        store: The family folder's weight files.
        notify: Told of every step.
    """

    def __init__(self, inputs: Source, store: WeightStore, notify: Notify) -> None:
        self.inputs, self.notify = inputs, notify
        self._lowering = Lowering(inputs.loaded.model, store, inputs.reduction)

    def graph(self, degree: int, backend: str) -> OnnxGraph:
        """Fuses and lowers a degree.

        Args:
            degree: Which.
            backend: The one that it is for.
        """
        inputs = self.inputs
        self.notify(degree, "fusing")
        fused = inputs.fused(degree)
        self.notify(degree, "lowering to ONNX")
        name = graph_name(degree, inputs.graph_recipe(degree, backend))
        precision = graph_precision(backend, inputs.options.precision)
        graph = self._lowering.lower(inputs.schedules[degree], fused, name, precision, inputs.options.float_blocks)
        gc.collect()  # the exporter leaves cycles that hold copies of the weights
        return graph

    def reference(self, graph: OnnxGraph) -> ReducedViT:
        """What engines of a graph are compared with."""
        inputs = self.inputs
        schedule = inputs.schedules[graph.source.degree]
        return reference_model(inputs.loaded.model, schedule, graph.source, inputs.reduction)

    def plain_reference(self, _graph: OnnxGraph) -> ReducedViT | None:
        """The reference that is not quantized, of graphs that are."""
        return None

    def steps(self, backend: str) -> Steps:
        """The steps of one backend."""
        return Steps(self, backend)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Keeps nothing to give back."""


class Steps:
    """The steps of float engines.

    Args:
        graphs: What is compiled, and its graphs.
        backend: The engines' library.
    """

    def __init__(self, graphs: Graphs, backend: str) -> None:
        self.inputs, self.backend = graphs.inputs, backend
        self._graphs, self._notify = graphs, graphs.notify

    def validated(self, degree: int) -> Report:
        """Makes a degree's engine, and says whether it may be listed."""
        graph = self._graphs.graph(degree, self.backend)
        engine = self._built(degree, graph)
        report = validate(engine, self._graphs.reference(graph), validation_batches(self.inputs))
        return replace(report, findings=replace(report.findings, float_blocks=self.inputs.options.float_blocks))

    def rival(self, _degree: int) -> Engine | None:
        """The fastest engine of a degree on the same library that is not quantized, where the degree's is."""
        return None

    def _built(self, degree: int, graph: OnnxGraph) -> Engine:
        """The engine of a graph, about to be validated."""
        self._notify(degree, "building")
        options = self.inputs.options
        engine = build(graph, backend=self.backend, precision=options.precision, plan=options.plan)
        self._notify(degree, "validating")
        return engine
