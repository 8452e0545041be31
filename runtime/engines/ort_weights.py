"""Weights that several ONNX Runtime sessions of one process read from the same memory.

A session normally packs every weight for its matrix products, into memory of its own. Sessions of several degrees then
hold the same numbers several times. Here they read the family's weight file where it is mapped, once, and pack nothing:
products are slower by what packing on the way costs.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import numpy as np
import onnxruntime

_mapped: weakref.WeakValueDictionary[tuple[object, ...], onnxruntime.OrtValue] = weakref.WeakValueDictionary()


def shared_weights(graph: Path) -> dict[str, onnxruntime.OrtValue]:
    """The external initializers of a graph, by name; the same bytes of the same file are the same object.

    Whoever uses them has to hold them for as long as it does.

    Raises:
        OSError: A file cannot be read.
        ValueError: The graph, or a tensor that it describes, is none.
    """
    import onnx  # parses protobuf; nothing else in this package needs it

    proto = onnx.load(graph, load_external_data=False)
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        file, offset = (graph.parent / place["location"]).resolve(), int(place.get("offset", 0))
        if not file.is_relative_to(graph.parent.resolve()):
            continue  # left to ONNX Runtime, which refuses it
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        key = (file, file.stat().st_mtime_ns, offset, dtype, tuple(tensor.dims))
        value = _mapped.get(key)
        if value is None:
            array = np.memmap(file, dtype, "r", offset, tuple(tensor.dims))
            value = _mapped[key] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        found[tensor.name] = value
    return found


def return_freed_memory() -> None:
    """Gives the system back what loading a session left free, where the C library can; it would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
