"""The weights of a graph, mapped: engines of one process that read the same file read the same memory."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import numpy as np

from .graph_file import read_graph

_DTYPES = {1: np.float32, 7: np.int64, 10: np.float16, 11: np.float64}  # of onnx.TensorProto.DataType
_EXTERNAL = 1  # of onnx.TensorProto.DataLocation

_mapped: weakref.WeakValueDictionary[tuple[object, ...], np.memmap] = weakref.WeakValueDictionary()


def mapped_weights(graph: Path) -> dict[str, np.memmap]:
    """The external initializers of a graph, by name; the same bytes of the same file are the same array.

    Raises:
        OSError: A file cannot be read.
        ValueError: The graph, or a tensor that it describes, is none.
        google.protobuf.message.DecodeError: Likewise.
    """
    model = read_graph(graph.read_bytes())
    arrays = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        file = (graph.parent / place.get("location", "")).resolve()
        # what lies elsewhere is left to the engine, which refuses it
        if tensor.data_location != _EXTERNAL or not file.is_relative_to(graph.parent.resolve()):
            continue
        dtype, offset, shape = _DTYPES[tensor.data_type], int(place.get("offset", 0)), tuple(tensor.dims)
        key = (file, file.stat().st_mtime_ns, offset, dtype, shape)
        array = _mapped.get(key)
        if array is None:
            array = _mapped[key] = np.memmap(file, dtype, "r", offset, shape)
        arrays[tensor.name] = array
    return arrays


def return_freed_memory() -> None:
    """Gives the system back what loading an engine left free, where the C library can; it would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
