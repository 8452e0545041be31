"""Damage to ONNX graphs that knows their structure: what comes out is a graph in form, and often not in meaning."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from bench.fuzz.case import Mutate

_COUNTS = (-(2**63), -1, 0, 1, 2, 3, 5, 17, 1000, 2**31, 2**40, 2**63 - 1)
_PLACES = ("../weights.bin", "/etc/passwd", "/dev/zero", "nowhere.bin", "", ".", "family.json", "..", "a\0b",
           "x" * 5000, "\x1b[2J", "file:///etc/passwd")  # fmt: skip


def _graph(change: Callable[[random.Random, ModelProto], None]) -> Mutate:
    def mutate(draw: random.Random, whole: bytes) -> bytes:
        model = onnx.load_model_from_string(whole)
        change(draw, model)
        return model.SerializeToString()

    return mutate


def _nodes(model: ModelProto) -> list[NodeProto]:
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def _with_inputs(model: ModelProto, least: int) -> list[NodeProto]:
    return [node for node in _nodes(model) if len(node.input) >= least]


def _drop_node(draw: random.Random, model: ModelProto) -> None:
    where = draw.choice([model.graph.node, model.graph.node, *(function.node for function in model.functions)])
    del where[draw.randrange(len(where))]


def _exchange_inputs(draw: random.Random, model: ModelProto) -> None:
    node = draw.choice(_with_inputs(model, 2))
    one, other = draw.sample(range(len(node.input)), 2)
    node.input[one], node.input[other] = node.input[other], node.input[one]


def _rewire(draw: random.Random, model: ModelProto) -> None:
    node = draw.choice(_with_inputs(model, 1))
    values = [name for each in _nodes(model) for name in each.output if name]
    weights = [each.name for each in model.graph.initializer]
    name = draw.choice((draw.choice(values), draw.choice(weights), node.output[0], "", "nobody", "x" * 3000))
    node.input[draw.randrange(len(node.input))] = name


def _make_cycle(draw: random.Random, model: ModelProto) -> None:
    nodes = list(model.graph.node)
    early, late = sorted(draw.sample(range(len(nodes)), 2))
    if nodes[early].input:
        nodes[early].input[0] = nodes[late].output[0]


def _change_dims(draw: random.Random, model: ModelProto) -> None:
    tensor = draw.choice(model.graph.initializer)
    dims = draw.choice((
        [*tensor.dims, 1], list(tensor.dims)[::-1], [], [draw.choice(_COUNTS)],
        [draw.choice(_COUNTS) for _ in tensor.dims], [side + draw.choice((-1, 1)) for side in tensor.dims],
        [2**31, 2**31], [0] * len(tensor.dims), [1] * 300,
    ))  # fmt: skip
    del tensor.dims[:]
    tensor.dims.extend(dims)


def _change_dtype(draw: random.Random, model: ModelProto) -> None:
    draw.choice(model.graph.initializer).data_type = draw.choice((*range(27), 99, 2**31 - 1, -1))


def _change_external(draw: random.Random, model: ModelProto) -> None:
    outside = [each for each in model.graph.initializer if each.data_location == TensorProto.EXTERNAL]
    tensor = draw.choice(outside or model.graph.initializer)
    key = draw.choice(("location", "offset", "length", "checksum"))
    kept = [each for each in tensor.external_data if each.key != key]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)
    tensor.data_location = TensorProto.EXTERNAL
    if draw.random() < 0.9:  # else the key is missing
        value = draw.choice(_PLACES) if key == "location" else str(draw.choice((*_COUNTS, "x", "", "1e3", "9" * 40)))
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))


def _recurse(draw: random.Random, model: ModelProto) -> None:
    function = draw.choice(model.functions)
    call = helper.make_node(function.name, list(function.input), [f"again{i}" for i in range(len(function.output))],
                            domain=function.domain)  # fmt: skip
    if draw.random() < 0.5:
        other = copy.deepcopy(function)
        other.name = "Other"
        call.op_type = "Other"
        back = copy.deepcopy(call)
        back.op_type = function.name
        other.node.insert(0, back)
        model.functions.append(other)
    if not any(each.domain == function.domain for each in function.opset_import):
        function.opset_import.append(helper.make_opsetid(function.domain, 1))
    function.node.insert(0, call)
    function.node[-1].input[0] = call.output[0]


def _change_operator(draw: random.Random, model: ModelProto) -> None:
    node, other = draw.choice(_nodes(model)), draw.choice(_nodes(model))
    names = (other.op_type, "Nonsense", "", "TokenMerge", "ai.tocom.TokenMerge", "x" * 3000, "\x1b[2J")
    node.op_type = draw.choice(names)
    if draw.random() < 0.3:
        node.domain = draw.choice(("com.example", "ai.tocom", "com.microsoft", "ai.onnx.ml", "\n"))


def _change_functions(draw: random.Random, model: ModelProto) -> None:
    function = draw.choice(model.functions)
    draw.choice((
        lambda: model.functions.remove(function), lambda: model.functions.append(copy.deepcopy(function)),
        lambda: _clear(function.node), lambda: function.input.pop(), lambda: function.output.pop(),
        lambda: _clear(function.opset_import),
    ))()  # fmt: skip


def _clear(repeated: Any) -> None:
    del repeated[:]


def _change_attribute(draw: random.Random, model: ModelProto) -> None:
    ours = [node for node in model.graph.node if node.domain == "ai.tocom"]
    node = draw.choice(ours) if ours and draw.random() < 0.5 else draw.choice([n for n in _nodes(model) if n.attribute])
    attribute = draw.choice(node.attribute)
    if draw.random() < 0.2:
        node.attribute.remove(attribute)
    elif draw.random() < 0.2:
        attribute.type = draw.choice((0, 1, 2, 3, 4, 6, 7, 8, 11, 99))
    elif attribute.ints:
        attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(_COUNTS)
    elif attribute.HasField("t"):
        del attribute.t.dims[:]
        attribute.t.dims.extend(draw.choice(([], [2], [2**40], [-1], [0], [2**31, 2**31])))
    else:
        attribute.i, attribute.f = draw.choice(_COUNTS), draw.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))


def _change_interface(draw: random.Random, model: ModelProto) -> None:
    graph = model.graph
    value = draw.choice((graph.input[0], graph.output[0]))
    tensor, further = value.type.tensor_type, helper.make_tensor_value_info("further", TensorProto.FLOAT, [1])
    inner = helper.make_tensor_value_info(graph.node[3].output[0], TensorProto.FLOAT, None)
    name = draw.choice(("other", "", graph.node[0].output[0], "\x1b[2J", "a\nb"))
    side, count = draw.choice(tensor.shape.dim), draw.choice((-1, 0, 1, 7, 33, 10**6, 2**40))
    draw.choice((
        lambda: _clear(graph.output), lambda: _clear(graph.input), lambda: value.type.Clear(),
        lambda: setattr(tensor, "elem_type", draw.choice((*range(24), 99))), lambda: setattr(value, "name", name),
        lambda: graph.output.append(inner), lambda: graph.input.append(further),
        lambda: graph.output.append(copy.deepcopy(graph.output[0])), lambda: setattr(side, "dim_value", count),
    ))()  # fmt: skip


def _change_names(draw: random.Random, model: ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.output]
    one, other = draw.sample(nodes, 2)
    if draw.random() < 0.5:
        one.name = other.name
    else:
        one.output[0] = draw.choice((other.output[0], "", "\ufffd\x00", "x" * 5000))


def _change_versions(draw: random.Random, model: ModelProto) -> None:
    opset = draw.choice(model.opset_import)
    draw.choice((
        lambda: setattr(opset, "version", draw.choice((-1, 0, 1, 6, 12, 999, 2**62))),
        lambda: setattr(model, "ir_version", draw.choice((0, 1, 3, 8, 99, 2**62))),
        lambda: _clear(model.opset_import), lambda: model.opset_import.append(copy.deepcopy(opset)),
    ))()  # fmt: skip


def _reorder(draw: random.Random, model: ModelProto) -> None:
    nodes = list(model.graph.node)
    nodes.reverse() if draw.random() < 0.3 else draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _cut_values(draw: random.Random, model: ModelProto) -> None:
    inside = [each for each in model.graph.initializer if each.raw_data]
    if inside:
        tensor = draw.choice(inside)
        tensor.raw_data = draw.choice((b"", tensor.raw_data[:-1], tensor.raw_data * 3, tensor.raw_data[:3]))


def _ask_for_memory(draw: random.Random, model: ModelProto) -> None:
    size = helper.make_tensor("size", TensorProto.INT64, [2], [draw.choice((2**20, 2**31, 2**40)), 2**22])
    model.graph.initializer.append(size)
    made = helper.make_node("ConstantOfShape", ["size"], ["much"])
    least = helper.make_node("ReduceSum", ["much"], ["little"], keepdims=0)
    model.graph.node.extend([made, least])
    model.graph.output.append(helper.make_tensor_value_info("little", TensorProto.FLOAT, []))


def _nest(draw: random.Random, whole: bytes) -> bytes:
    depth, inner = draw.choice((5, 25, 90, 1000, 100_000)), b""
    for _ in range(depth):  # node.attribute.g.node: protobuf's own writer refuses such a depth
        inner = _field(5, _field(1, b"then_branch") + _field(6, _field(1, inner)))
        if len(inner) > 2_000_000:
            break
    return whole + _field(7, _field(1, _field(4, b"If") + inner))  # one more node of the graph


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field that holds bytes."""
    length, left = bytearray(), len(content)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes([number << 3 | 2, *length, left]) + content


_CHANGES = {
    "node missing": _drop_node, "inputs exchanged": _exchange_inputs, "input rewired": _rewire, "cycle": _make_cycle,
    "weight's shape": _change_dims, "weight's type": _change_dtype, "weight elsewhere": _change_external,
    "weight's bytes": _cut_values, "function recursive": _recurse, "function changed": _change_functions,
    "operator changed": _change_operator, "attribute changed": _change_attribute,
    "interface changed": _change_interface, "names changed": _change_names, "versions changed": _change_versions,
    "nodes reordered": _reorder, "huge tensor": _ask_for_memory,
}  # fmt: skip
GRAPHS: dict[str, Mutate] = {**{name: _graph(change) for name, change in _CHANGES.items()}, "nested deeply": _nest}
