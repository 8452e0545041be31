"""A quantized graph -> how its products are quantized: what stands in the file, whatever it was calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import Quantization, QuantizedWeight, products_of
from tocom.export.graph.insert_qdq import parts_of


def read_quantization(graph: Path, model: nn.Module, plain: Mapping[str, Tensor], format_name: str) -> Quantization:
    """Reads the quantization of a degree out of its graph.

    Args:
        graph: A file of this project; its weights lie beside it.
        model: The timm model that it was made from; its weights are not looked at.
        plain: The float weights of the degree; what the graph changed takes their place.
        format_name: Name of the format, one of `tocom.calib.quantize.grids.FORMATS`.
    """
    nodes = {node.name: node for node in ir.load(graph).graph}
    state, activations, weights = dict(plain), {}, {}
    for module, parameter, name in _norms(plain, nodes):
        state[f"{module}.{parameter}"] = _constant(nodes[name].inputs[{"weight": 1, "bias": 2}[parameter]])
    for module in products_of(model):
        parts = parts_of(model, module)
        products = [nodes[f"{name}.MatMul"] for name, _, _ in parts]
        factors = [factor for _, _, factor in parts]
        if f"{module}.bias" in plain:
            biases = [_constant(nodes[f"{name}.Add"].inputs[1]) / factor for name, _, factor in parts]
            state[f"{module}.bias"] = torch.cat(biases)
        if (scale := _scale_of_input(products[0])) is not None:
            activations[module] = scale
        stored = [_codes(product) for product in products]
        if None not in stored:
            codes = torch.cat([part for part, _ in stored])
            scales = torch.cat([part / factor for (_, part), factor in zip(stored, factors, strict=True)])
            weights[module] = QuantizedWeight(codes, scales)
            continue
        constants = [_constant(product.inputs[1]) for product in products]
        if all(constant is not None for constant in constants):  # else it is the degree's, computed in the graph
            rows = [constant.T / factor for constant, factor in zip(constants, factors, strict=True)]
            state[f"{module}.weight"] = torch.cat(rows)
    return Quantization(FORMATS[format_name], state, activations, weights)


def _norms(plain: Mapping[str, Tensor], nodes: Mapping[str, ir.Node]) -> Iterator[tuple[str, str, str]]:
    for key in plain:
        module, _, parameter = key.rpartition(".")
        if (name := f"{module}.LayerNormalization") in nodes:
            yield module, parameter, name


def _source(value: ir.Value) -> ir.Value:
    """What a value was cast from."""
    node = value.producer()
    return value if node is None or node.op_type != "Cast" else _source(node.inputs[0])


def _constant(value: ir.Value) -> Tensor | None:
    value = _source(value)
    return None if value.const_value is None else torch.from_numpy(value.const_value.numpy().astype(np.float32))


def _made_by(value: ir.Value, kind: str) -> ir.Node | None:
    node = _source(value).producer()
    return node if node is not None and node.op_type == kind else None


def _scale_of_input(product: ir.Node) -> float | None:
    pair = _made_by(product.inputs[0], "DequantizeLinear")
    return None if pair is None else float(_constant(pair.inputs[1]))


def _codes(product: ir.Node) -> tuple[Tensor, Tensor] | None:
    """Codes [out, in] and scales [out] of a product's weight; None where it is float."""
    weight = _made_by(product.inputs[1], "DequantizeLinear")
    return None if weight is None else (_constant(weight.inputs[0]).T.contiguous(), _constant(weight.inputs[1]))
