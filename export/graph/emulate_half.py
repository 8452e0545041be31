"""A typed graph carried out in float32, every half value rounded: for engines whose kernels have no such format.

Each operator computes in float32 and its result is rounded to the format, once, as kernels do that accumulate in
float32. ONNX Runtime has no bfloat16 on CPUs, and for float16 leaves roundings out where it can.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import shape_inference

from tocom.export.graph.half_precision import FLOAT, HALF, cast_of
from tocom.export.graph.lower import inline


def rounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a typed graph that puts out what the graph stands for, on any engine that has float32.

    Args:
        proto: Typed by `tocom.export.graph.half_precision`; large weights may lie outside.
    """
    proto = shape_inference.infer_shapes(inline(proto), strict_mode=True)
    model = ir.from_proto(proto)
    graph = model.graph
    for node in list(graph):
        narrow = {value: value.dtype for value in node.outputs if value.dtype in HALF.values()}
        for value, dtype in narrow.items():
            _round(graph, node, value, dtype)
    return ir.to_proto(model)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """Puts a rounding behind a value; whoever reads it reads float32 then."""
    narrow = [] if node.op_type == "Cast" else [cast_of(value, dtype, f"{value.name}.round")]
    last = narrow[-1].outputs[0] if narrow else value
    wide = cast_of(last, FLOAT, f"{value.name}.wide")
    if value.is_graph_output():
        value.name, wide.outputs[0].name = f"{value.name}.narrow", value.name
    value.replace_all_uses_with(wide.outputs[0], replace_graph_outputs=True)
    (narrow[0] if narrow else wide).replace_input_with(0, value)
    if narrow:
        value.dtype = FLOAT
    graph.insert_after(node, [*narrow, wide])
