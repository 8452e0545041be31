"""ONNX graph -> engine. Both engines run an ONNX file, so building one means proving that it loads and answers.

OpenVINO does not expand model-local functions: unless its native operator takes the place of all of them, it gets a
copy of the graph with the bodies inlined, which refers to the same weight files.
"""

from __future__ import annotations

import numpy as np
import onnx

from export.lower import inline
from export.operators import DOMAIN
from runtime.artifacts import Engine, OnnxGraph, sha256_file, write_atomically
from runtime.engines import BACKENDS, available, native_operators, open_engine, precisions
from runtime.errors import InputError

AUTO = "auto"

_EXPANDS_FUNCTIONS = ("onnxruntime",)


def build(graph: OnnxGraph, *, backend: str = "onnxruntime", precision: str = "fp32") -> Engine:
    """Builds the engine of a graph.

    Args:
        graph: One degree, lowered.
        backend: One of `runtime.engines.BACKENDS`.
        precision: Number format that the engine computes in.

    Raises:
        InputError: If the backend or precision is not one there is, or the backend does not run here.
        AssertionError: If the engine answers with NaN.
    """
    backends_for(backend, precision)
    proto = onnx.load(graph.file, load_external_data=False)
    file, files = graph.file, dict(graph.files)
    native = runs_natively(proto, backend)
    if needs_inlining(proto, backend):
        file = graph.file.with_suffix(".inlined.onnx")
        write_atomically(file, inline(proto).SerializeToString())
        files[file.name] = sha256_file(file)
    with open_engine(file, backend, precision=precision) as runner:
        logits = runner.infer(np.zeros((1, *runner.input_size), dtype=np.float32))
    if not np.isfinite(logits).all():
        raise AssertionError(f"{graph.file.name} answers a black image with NaN or infinity")
    return Engine(file=file, backend=backend, precision=precision, files=files, source=graph, native=native)


def runs_natively(proto: onnx.ModelProto, backend: str) -> bool:
    """Whether a backend has a native operator for every reduction of a graph, of which there is at least one."""
    used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    return bool(used) and used <= native_operators(backend)


def needs_inlining(proto: onnx.ModelProto, backend: str) -> bool:
    """Whether a backend can only run a copy of the graph without model-local functions."""
    return bool(proto.functions) and backend not in _EXPANDS_FUNCTIONS and not runs_natively(proto, backend)


def backends_for(backend: str, precision: str) -> list[str]:
    """The backend that was asked for; of "auto" all that run here and compute in a precision.

    Raises:
        InputError: If there is no such backend, it does not run here, or it does not compute in the precision.
    """
    asked = [status.name for status in available() if status.usable] if backend == AUTO else [backend]
    if backend != AUTO and backend not in BACKENDS:
        raise InputError(f"backend must be {AUTO} or one of {', '.join(BACKENDS)}, got {backend!r}.")
    found = [name for name in asked if precision in precisions(name)]
    if not found:
        known = ", ".join(dict.fromkeys(each for name in asked for each in precisions(name)))
        raise InputError(f"precision must be one of {known} for {' or '.join(asked)}, got {precision!r}.")
    return found
