"""A typed graph emulated in float32, every half value rounded: for engines whose kernels have no such format.

Each operator computes in float32 and its result is rounded to the format, once, as kernels do that accumulate in
float32. ONNX Runtime has no bfloat16 on CPUs, and for float16 leaves roundings out where it can.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import shape_inference
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import ProtoPass, apply
from tocom.export.graph.half_precision import FLOAT, HALF, cast_of
from tocom.export.graph.inline import inline

_HALF = tuple(map(int, HALF.values()))  # as protos have them


class EmulateHalf(ProtoPass):
    """Rounds every half value where it is made, and widens it again for its readers."""

    def requires(self, model: onnx.ModelProto) -> None:
        """Inputs that are not half.

        Raises:
            PreconditionError: If it is not so.
        """
        if names := [value.name for value in model.graph.input if value.type.tensor_type.elem_type in _HALF]:
            raise PreconditionError(f"inputs must not be half, {names} are")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        flat = ir.from_proto(shape_inference.infer_shapes(inline(model), strict_mode=True))
        for node in list(flat.graph):
            for value in node.outputs:
                if value.dtype in HALF.values():
                    _round(flat.graph, node, value, value.dtype)
        return PassResult(ir.to_proto(flat), modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """No functions are left; half values stand between two casts and nowhere else.

        Raises:
            PostconditionError: If it is not so.
        """
        if model.functions:
            raise PostconditionError("the graph must have no functions")
        values = (*model.graph.value_info, *model.graph.output)
        half = {value.name for value in values if value.type.tensor_type.elem_type in _HALF}
        for node in model.graph.node:
            if node.op_type != "Cast" and half.intersection((*node.input, *node.output)):
                raise PostconditionError(f"{node.op_type} {node.name} must compute in float32")


def emulate_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a typed graph that puts out what the graph stands for, on any engine that has float32.

    Args:
        proto: Typed by `tocom.export.graph.half_precision`; large weights may lie outside.
    """
    return apply(EmulateHalf(), proto)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """Rounds a value where it is made; its readers read float32 then."""
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
