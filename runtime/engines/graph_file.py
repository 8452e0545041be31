"""An ONNX file as far as a deployed box needs it: where weights lie, and where tokens are removed.

There is no onnx package there, and no more of onnx.proto is needed than the messages below. What they leave out is kept
when a graph is written again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DOMAIN = "ai.tocom"  # of the operators that remove tokens
_DECISIONS = slice(2, None)  # outputs of such an operator that tell what it decided
_BLOCK = re.compile(r"block\.(\d+)\.")
_INT64 = 7  # of onnx.TensorProto.DataType

# Name of a message -> (field, number, type, repeated)
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
    "Attribute": [("name", 1, _FIELD.TYPE_STRING, False), ("i", 3, _FIELD.TYPE_INT64, False)],
    "Node": [
        ("output", 2, _FIELD.TYPE_STRING, True),
        ("attribute", 5, "Attribute", True),
        ("domain", 7, _FIELD.TYPE_STRING, False),
    ],
    "TensorType": [("elem_type", 1, _FIELD.TYPE_INT32, False)],
    "Type": [("tensor_type", 1, "TensorType", False)],
    "Value": [("name", 1, _FIELD.TYPE_STRING, False), ("type", 2, "Type", False)],
    "Graph": [("node", 1, "Node", True), ("initializer", 5, "Tensor", True), ("output", 12, "Value", True)],
    "Model": [("graph", 7, "Graph", False)],
}


@dataclass(frozen=True)
class Removal:
    """An operator of a graph that removes tokens.

    Attributes:
        block: It stands in.
        decisions: Names of its values src, dst and unm, or kept and dropped.
        tokens: That enter it, N.
        protected: Prefix tokens among them.
    """

    block: int
    decisions: tuple[str, ...]
    tokens: int
    protected: int


def read_graph(content: bytes) -> Any:
    """An ONNX file's contents, parsed.

    Raises:
        google.protobuf.message.DecodeError: They are none.
    """
    return _model_message().FromString(content)


def removals(content: bytes) -> tuple[Removal, ...]:
    """Where a graph removes tokens, in order.

    Args:
        content: Of its file.

    Raises:
        ValueError: It is not a graph of this project.
        google.protobuf.message.DecodeError: It is no graph.
    """
    return tuple(_removal(node) for node in read_graph(content).graph.node if node.domain == DOMAIN)


def telling(content: bytes, names: Iterable[str]) -> bytes:
    """A graph that also puts out some of its integer values.

    Args:
        content: Of its file.
        names: Of the values.

    Raises:
        google.protobuf.message.DecodeError: It is no graph.
    """
    model = read_graph(content)
    there = {value.name for value in model.graph.output}
    for name in names:
        if name not in there:
            model.graph.output.add(name=name).type.tensor_type.elem_type = _INT64
    return model.SerializeToString()


def _removal(node: Any) -> Removal:
    names = tuple(node.output[_DECISIONS])
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    blocks = [_BLOCK.match(name) for name in names]
    if not names or None in blocks or not {"tokens", "protected"} <= numbers.keys():
        raise ValueError(f"an operator of {DOMAIN} must have decisions named block.N and say its tokens")
    return Removal(int(blocks[0][1]), names, numbers["tokens"], numbers["protected"])


@functools.cache
def _model_message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="tocom", syntax="proto2")
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
