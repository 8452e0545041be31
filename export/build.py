"""ONNX graph -> engine. ONNX Runtime runs the graph itself, so building it means proving that it loads and answers."""

from __future__ import annotations

import numpy as np

from runtime.artifacts import Engine, OnnxGraph
from runtime.engines import BACKENDS, open_engine
from runtime.errors import InputError

PRECISIONS = ("fp32",)


def build(graph: OnnxGraph, *, backend: str = "auto", precision: str = "fp32") -> Engine:
    """Builds the engine of a graph.

    Args:
        graph: One degree, lowered.
        backend: One of `runtime.engines.BACKENDS`; "auto" takes the default.
        precision: Number format of the weights and activations.

    Raises:
        InputError: If the backend or precision is not one there is, or the backend does not run here.
        AssertionError: If the engine answers with NaN.
    """
    backend = resolve_backend(backend)
    require_precision(precision)
    with open_engine(graph.file, backend) as runner:
        logits = runner.infer(np.zeros((1, *runner.input_size), dtype=np.float32))
    if not np.isfinite(logits).all():
        raise AssertionError(f"{graph.file.name} answers a black image with NaN or infinity")
    return Engine(file=graph.file, backend=backend, precision=precision, files=graph.files, source=graph)


def resolve_backend(backend: str) -> str:
    """The backend that "auto" stands for, or the one named.

    Raises:
        InputError: If there is none of that name.
    """
    if backend == "auto":
        return next(iter(BACKENDS))
    if backend not in BACKENDS:
        raise InputError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}.")
    return backend


def require_precision(precision: str) -> None:
    """Checks that a precision is one that can be built.

    Raises:
        InputError: If it is not.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
