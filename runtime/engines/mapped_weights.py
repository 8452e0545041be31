"""The weights of a graph, mapped: engines of one process that read the same file read the same memory."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DTYPES = {1: np.float32, 7: np.int64, 10: np.float16, 11: np.float64}  # of onnx.TensorProto.DataType
_EXTERNAL = 1  # of onnx.TensorProto.DataLocation

# The part of onnx.proto that says where weights lie: name of a message -> (field, number, type, repeated). A deployed
# box has no onnx package, and needs no more of it than this.
_FIELD = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, int | str, bool]]] = {
    "Entry": [("key", 1, _FIELD.TYPE_STRING, False), ("value", 2, _FIELD.TYPE_STRING, False)],
    "Tensor": [
        ("dims", 1, _FIELD.TYPE_INT64, True),
        ("data_type", 2, _FIELD.TYPE_INT32, False),
        ("name", 8, _FIELD.TYPE_STRING, False),
        ("external_data", 13, "Entry", True),
        ("data_location", 14, _FIELD.TYPE_INT32, False),
    ],
    "Graph": [("initializer", 5, "Tensor", True)],
    "Model": [("graph", 7, "Graph", False)],
}

_mapped: weakref.WeakValueDictionary[tuple[object, ...], np.memmap] = weakref.WeakValueDictionary()


def mapped_weights(graph: Path) -> dict[str, np.memmap]:
    """The external initializers of a graph, by name; the same bytes of the same file are the same array.

    Raises:
        OSError: A file cannot be read.
        ValueError: The graph, or a tensor that it describes, is none.
        google.protobuf.message.DecodeError: Likewise.
    """
    model = _model_message().FromString(graph.read_bytes())
    found = {}
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
        found[tensor.name] = array
    return found


def return_freed_memory() -> None:
    """Gives the system back what loading an engine left free, where the C library can; it would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _model_message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="weights.proto", package="tocom", syntax="proto2")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number)
            field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".tocom.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tocom.Model"))
