"""Graph with one scale per output of its 4-bit weights -> with scales in blocks of inputs, which repeat: same numbers.

With one scale per output the plans of TensorRT for RTX have kernels that write whole weights out in half, in every
call; with blocks products read the codes. NVIDIA's TensorRT is documented to take blocks only.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

BLOCKS = (128, 64, 32)  # inputs that share a scale, where there are kernels for it


def put_in_blocks(model: ir.Model) -> None:
    """Changes DequantizeLinear of codes [in, out] in place, where a block divides the inputs.

    Args:
        model: Its scales are constants.
    """
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.INT4:
            continue
        inputs, outputs = codes.shape.numpy()
        block = next((each for each in BLOCKS if inputs % each == 0), None)
        if block is None:
            continue
        repeated = np.broadcast_to(node.inputs[1].const_value.numpy(), (inputs // block, outputs))
        tensor = ir.tensor(np.ascontiguousarray(repeated), name=f"{codes.name}.scales")
        scales = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(scales)
        node.replace_input_with(1, scales)
        node.resize_inputs(2)  # zero is where nothing is said
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        node.attributes["block_size"] = ir.AttrInt64("block_size", block)
