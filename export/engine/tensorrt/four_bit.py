"""Graph with one scale per output of its 4-bit weights -> with scales in blocks of inputs, which repeat: same numbers.

With one scale per output the plans of TensorRT for RTX have kernels that write whole weights out in half, in every
call; with blocks products read the codes. NVIDIA's TensorRT is documented to take blocks only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

BLOCKS = (128, 64, 32)  # inputs that share a scale, where there are kernels for it


class PutScalesInBlocks(InPlacePass):
    """Changes DequantizeLinear of codes [in, out], where a block divides the inputs."""

    def requires(self, model: ir.Model) -> None:
        """Scales of 4-bit weights are constants, one per output.

        Raises:
            PreconditionError: If it is not so.
        """
        for node, _ in _four_bit_weights(model):
            scales = node.inputs[1].const_value
            if scales is None or len(scales.shape) != 1:
                raise PreconditionError(f"{node.name} must have constant scales, one per output")

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        weights = [(node, block) for node, block in _four_bit_weights(model) if block is not None]
        for node, block in weights:
            _put_in_blocks(model.graph, node, block)
        return PassResult(model, modified=bool(weights))

    def ensures(self, model: ir.Model) -> None:
        """Where a block divides the inputs, scales are in blocks of it.

        Raises:
            PostconditionError: If it is not so.
        """
        for node, block in _four_bit_weights(model):
            inputs, outputs = node.inputs[0].shape.numpy()
            if block is not None and node.inputs[1].const_value.shape.numpy() != (inputs // block, outputs):
                raise PostconditionError(f"{node.name} must have its scales in blocks of {block} inputs")


def _four_bit_weights(model: ir.Model) -> Iterator[tuple[ir.Node, int | None]]:
    """The nodes that dequantize 4-bit weights, and the largest block that divides their inputs."""
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.dtype == ir.DataType.INT4:
            inputs, _ = codes.shape.numpy()
            yield node, next((block for block in BLOCKS if inputs % block == 0), None)


def _put_in_blocks(graph: ir.Graph, node: ir.Node, block: int) -> None:
    codes = node.inputs[0]
    inputs, outputs = codes.shape.numpy()
    repeated = np.broadcast_to(node.inputs[1].const_value.numpy(), (inputs // block, outputs))
    tensor = ir.tensor(np.ascontiguousarray(repeated), name=f"{codes.name}.scales")
    scales = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(scales)
    node.replace_input_with(1, scales)
    node.resize_inputs(2)  # zero is where nothing is said
    node.attributes["axis"] = ir.AttrInt64("axis", 0)
    node.attributes["block_size"] = ir.AttrInt64("block_size", block)
