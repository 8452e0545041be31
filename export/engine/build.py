"""ONNX graph -> engine.

ONNX Runtime and OpenVINO run an ONNX file, so building one means checking that it loads and answers. TensorRT's engines
are plans, built from the graph, here also where they cannot be run. OpenVINO does not expand model-local functions:
unless its native operator takes the place of all of them, it gets a copy of the graph with the bodies inlined, which
refers to the same weight files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tocom.calib.quantize.grids import FORMATS
from tocom.export.artifacts import Engine, OnnxGraph
from tocom.export.engine.tensorrt.plan import (
    PlanOptions,
    build_plan,
    layer_information,
    plan_recipe,
)
from tocom.export.graph.inline import inline
from tocom.export.graph.operators import DOMAIN
from tocom.runtime.backends import AUTO, BACKENDS, available, engine_module, native_operators, require
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import inlined, layers_of, log_of, passing_plan_of, plan_of, timing_of
from tocom.runtime.files import sha256_file, write_atomically
from tocom.runtime.manifest import EngineEntry


def graph_precision(backend: str, precision: str) -> str:
    """The number format that has to stand in the graph for a backend to compute in a precision."""
    if precision in FORMATS:
        form = BACKENDS[backend].qdq
        return "+".join([precision, form.rest, *(["unsigned"] if form.unsigned else [])])
    return precision if BACKENDS[backend].typed else "fp32"


def build(
    graph: OnnxGraph, *, backend: str = "onnxruntime", precision: str = "fp32", plan: PlanOptions | None = None
) -> Engine:
    """Builds the engine of a graph.

    Args:
        graph: One degree, lowered in the backend's `graph_precision`.
        backend: One of `tocom.runtime.backends.BACKENDS`.
        precision: Number format that the engine computes in.
        plan: How plans are built, for backends that have them.

    Raises:
        InputError: If the backend or precision is not one there is, the backend does not run here, or a plan cannot be
            built.
        AssertionError: If the engine answers with NaN.
    """
    backends_for(backend, precision)
    if BACKENDS[backend].builds_plans:
        return _planned(graph, backend, plan or PlanOptions())
    proto = onnx.load(graph.file, load_external_data=False)
    file, files = graph.file, dict(graph.files)
    native = runs_natively(proto, backend)
    if needs_inlining(proto, backend):
        file = inlined(graph.file)
        write_atomically(file, inline(proto).SerializeToString())
        files[file.name] = sha256_file(file)
    if graph_precision(backend, precision) != "fp32":
        precision = graph.precision
    engine = Engine(file=file, backend=backend, precision=precision, files=files, source=graph, native=native)
    _ensure_answers(engine)
    return engine


def _planned(graph: OnnxGraph, backend: str, options: PlanOptions) -> Engine:
    recipe = plan_recipe(backend, options)
    file = plan_of(graph.file, recipe)
    built = build_plan(graph.file, backend, options, timing_of(graph.file, backend))
    write_atomically(file, built.content)
    build_record = {**recipe, "seconds": round(built.seconds, 2), "bytes": len(built.content), "layers": built.layers}
    log = json.dumps({**build_record, "graph": graph.file.name, "log": built.log}, indent=2)
    write_atomically(log_of(file), log.encode())
    engine = Engine(
        file=file,
        backend=backend,
        precision=graph.precision,
        files={**graph.files, file.name: sha256_file(file)},
        source=graph,
        build=build_record,
        unrunnable=_why_unrunnable(file, backend, options),
    )
    if engine.unrunnable is None:
        _ensure_answers(engine)
        layers = layer_information(built.content, backend)
        write_atomically(layers_of(file), layers.encode())
    return engine


def why_unrunnable(entry: EngineEntry, folder: Path) -> str | None:
    """Why a plan of a family cannot be run here, which may be for another GPU; None where it can, or is no plan."""
    if not BACKENDS[entry.backend].builds_plans:
        return None
    return _why_unrunnable(folder / entry.engine, entry.backend, PlanOptions.from_json(entry.build["options"]))


def _why_unrunnable(file: Path, backend: str, options: PlanOptions) -> str | None:
    if options.stripped:
        return "its weights are left out: tocom refit puts them in"
    try:
        open_engine(file, backend).close()
    except InputError as error:
        return str(error)
    return None


def _ensure_answers(engine: Engine) -> None:
    with open_engine(engine.file, engine.backend, precision=engine.precision) as runner:
        logits = runner.infer(np.zeros((1, *runner.input_size), dtype=np.float32))
    if not np.isfinite(logits).all():
        raise AssertionError(f"{engine.file.name} answers a black image with NaN or infinity")


@contextmanager
def as_engine(graph: Path, backend: str, build: Mapping[str, Any]) -> Iterator[Path]:
    """What a backend opens of a graph for the moment: the graph itself, or a plan that is removed afterwards.

    Args:
        graph: A variant of an engine's graph, in the form that the backend runs.
        backend: The engine's.
        build: The engine's, which says how its plan was built.
    """
    if not BACKENDS[backend].builds_plans:
        yield graph
        return
    plan = passing_plan_of(graph)
    try:
        plan.write_bytes(build_plan(graph, backend, PlanOptions.from_json(build["options"])).content)
        yield plan
    finally:
        plan.unlink(missing_ok=True)


def runs_natively(proto: onnx.ModelProto, backend: str) -> bool:
    """Whether a backend has a native operator for every reduction of a graph, of which there is at least one."""
    used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    return bool(used) and used <= native_operators(backend)


def needs_inlining(proto: onnx.ModelProto, backend: str) -> bool:
    """Whether a backend can only run a copy of the graph without model-local functions."""
    return bool(proto.functions) and not BACKENDS[backend].expands_functions and not runs_natively(proto, backend)


def backends_for(backend: str, precision: str) -> list[str]:
    """The backend that was asked for; of "auto" all that run here and compute in a precision.

    Raises:
        InputError: If there is no such backend, it does not run here and does not build plans for elsewhere, or it does
            not compute in the precision.
    """
    require(backend, precision)
    if backend != AUTO:
        engine_module(backend)  # refuses one that is not installed
        return [backend]
    usable = [status.name for status in available() if status.usable]
    names = [name for name in usable if precision in BACKENDS[name].precisions]
    if not names:
        known = ", ".join(dict.fromkeys(known for name in usable for known in BACKENDS[name].precisions))
        raise InputError(f"precision must be one of {known} for {' or '.join(usable)}, got {precision!r}.")
    return names
