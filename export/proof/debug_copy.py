"""An engine's debug copy: its graph once more, which also puts out what it decides and the tokens between its parts."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from tocom.export.artifacts import Engine
from tocom.export.engine.build import as_engine, needs_inlining
from tocom.export.graph.emulate_half import emulate_half
from tocom.export.graph.inline import inline
from tocom.export.graph.operators import DOMAIN, POINTS
from tocom.runtime.engines.base import EngineRunner, open_engine
from tocom.runtime.family_files import debug_affixes

POINT = re.compile(rf"block\.\d+\.({'|'.join(POINTS)})")
_INSIDE_NATIVE = ("attended", "signal")  # never stand outside a native operator: asking for them would undo it


@contextmanager
def debug_copy(engine: Engine, more: Iterable[str] = (), *, points: bool = True) -> Iterator[EngineRunner]:
    """Runs a copy of the engine's graph that also puts out its decisions; the shipped file is not touched.

    Where the engine cannot be run, ONNX Runtime carries the copy out, with the graph's half precision emulated.

    Args:
        engine: As listed.
        more: Further values of the graph to put out.
        points: Whether to put out the tokens between the parts too.
    """
    graph = onnx.load(engine.source.file, load_external_data=False)
    known = {value.name: value for value in (*graph.graph.value_info, *graph.graph.output)}
    for name in dict.fromkeys((*debug_outputs(graph, native=engine.native, points=points), *more)):
        # the formats are the graph's, so that this changes none
        unknown = onnx.helper.make_empty_tensor_value_info(name)
        graph.graph.output.append(known.get(name, unknown))
    backend, precision = engine.backend, engine.precision
    if engine.unrunnable:
        graph, backend, precision = emulate_half(graph), "onnxruntime", "fp32"
    elif needs_inlining(graph, backend):
        graph = inline(graph)
    with (
        temporary_graph(engine.source.file, graph) as file,
        as_engine(file, backend, engine.build) as engine_file,
        open_engine(engine_file, backend, precision=precision) as runner,
    ):
        yield runner


@contextmanager
def runner_of(engine: Engine) -> Iterator[EngineRunner]:
    """Opens an engine; where it cannot run here, its graph on ONNX Runtime."""
    if engine.unrunnable:
        with debug_copy(engine) as runner:
            yield runner
    else:
        with open_engine(engine.file, engine.backend, precision=engine.precision) as runner:
            yield runner


def debug_outputs(graph: onnx.ModelProto, *, native: bool, points: bool = True) -> Iterator[str]:
    """Names of the values that a debug copy also puts out, in order: the tokens between parts, then decisions.

    Args:
        graph: Of one degree.
        native: Whether native operators run it: they put out their decisions themselves.
        points: Whether to put out the tokens between the parts too.
    """
    outputs = {value.name for value in graph.graph.output}
    names = [name for node in graph.graph.node for name in (*node.input, *node.output)]
    for name in dict.fromkeys(names):
        point = POINT.fullmatch(name)
        if points and point and name not in outputs and not (native and point[1] in _INSIDE_NATIVE):
            yield name
    for node in graph.graph.node:
        if node.domain == DOMAIN and not native:
            yield from node.output[2:]


@contextmanager
def temporary_graph(graph: Path, variant: onnx.ModelProto) -> Iterator[Path]:
    """A file with a variant of a graph, in the same folder, because weight files are found relative to it."""
    prefix, suffix = debug_affixes(graph)
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=graph.parent)
    os.close(handle)
    file = Path(name)
    try:
        file.write_bytes(variant.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)
