"""float32 graph -> a graph in which the products of the blocks are quantized: explicit Q/DQ, per degree.

A quantized product reads its input through QuantizeLinear and DequantizeLinear, per tensor and symmetric, and its
weight as codes through DequantizeLinear, per output channel and symmetric. Nothing else changes, so keys reach the
metric that tokens are matched on in float. Products that read the same tensor share its pair.

The pairs are put in here rather than by a quantizer of ONNX Runtime, NNCF or ModelOpt: codes come from calibration as
they are, GPTQ's included, instead of from rounding again; only codes are stored, once for all degrees that have them in
common; and what is traced once serves every degree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import Quantization
from tocom.export.artifacts import OnnxGraph
from tocom.export.graph.half_precision import precision_of, typed
from tocom.export.graph.operators import DOMAIN
from tocom.export.graph.weight_store import WeightStore
from tocom.runtime.backends import QdqForm
from tocom.runtime.files import sha256_file, write_atomically

_CODES = {"INT8": np.dtype(np.int8), "FLOAT8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn), "INT4": ml_dtypes.int4}
_OPSETS = {"int4-weights": 21}  # the first that has the format
_UNSIGNED_ZERO = 128
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def quantized_graph(
    plain: OnnxGraph, model: nn.Module, quantization: Quantization, store: WeightStore, name: str, form: QdqForm
) -> OnnxGraph:
    """The graph of a degree with its products quantized.

    Args:
        plain: The float32 graph of the degree; its weights lie beside it.
        model: The timm model that it was made from; its weights are not looked at.
        quantization: Of this degree.
        store: The family folder's weight files, which codes go to.
        name: File name of the graph, within the store's folder.
        form: How the engine library takes it.
    """
    insert_qdq = InsertQDQ(model, plain.source.weights, quantization, unsigned=form.unsigned)
    quantized = insert_qdq(ir.load(plain.file)).model
    weight_files = store.place(quantized)
    proto = typed(ir.to_proto(quantized), form.rest)
    file = store.folder / name
    write_atomically(file, proto.SerializeToString())
    onnx.checker.check_model(file)
    return replace(
        plain,
        file=file,
        files={part: sha256_file(store.folder / part) for part in (name, *weight_files)},
        precision=format_of(proto),
    )


class InsertQDQ(InPlacePass):
    """Quantizes the products of a float32 graph, of the degree that the quantization is for.

    Args:
        model: The timm model that it was made from; its weights are not looked at.
        plain: The weights that stand in the graph, by the model's names.
        quantization: What becomes of its products.
        unsigned: See `tocom.runtime.backends.QdqForm`.
    """

    def __init__(
        self, model: nn.Module, plain: Mapping[str, Tensor], quantization: Quantization, *, unsigned: bool = False
    ) -> None:
        self._model, self._plain, self._quantization, self._unsigned = model, plain, quantization, unsigned

    def requires(self, model: ir.Model) -> None:
        """Nothing in the graph is quantized, and every product that is to be stands in it by its name.

        Raises:
            PreconditionError: If it is not so.
        """
        if quantized := [node.name for node in model.graph if node.op_type in _QDQ]:
            raise PreconditionError(f"a graph must not be quantized twice, has {quantized[0]}")
        names = {node.name for node in model.graph}
        if missing := [name for _, name in self._products() if name not in names]:
            raise PreconditionError(f"the graph must have every product that is to be quantized, has no {missing[0]}")

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        _Insertion(model.graph, self._model, self._plain, self._quantization, self._unsigned).apply()
        RemoveUnusedNodesPass()(model)
        opset = _OPSETS.get(self._quantization.format.name, 0)
        for part in (model.graph, *model.functions.values()):
            part.opset_imports[""] = max(part.opset_imports[""], opset)
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Products read what is dequantized.

        Their weights all, their inputs where they have a scale; and what operators read never is.

        Raises:
            PostconditionError: If it is not so.
        """
        nodes = {node.name: node for node in model.graph}
        for module, name in self._products():
            indices = (0, 1) if module in self._quantization.activations else (1,)
            if not all(_is_dequantized(nodes[name].inputs[index]) for index in indices):
                raise PostconditionError(f"{name} must be quantized")
        for node in model.graph:
            if node.domain == DOMAIN and any(map(_is_dequantized, node.inputs)):
                raise PostconditionError(f"{node.name} must read nothing that is quantized")

    def _products(self) -> Iterator[tuple[str, str]]:
        """What is to be quantized: the model's product, and the name of its node, of which `attn.qkv` has three."""
        for module in self._quantization.weights:
            for name, _, _ in parts_of(self._model, module):
                yield module, f"{name}.MatMul"


def format_of(proto: onnx.ModelProto) -> str:
    """The number format of a graph's products by what stands in it: a quantized one, else the float one."""
    return quantized_format_of(proto) or precision_of(proto)


def quantized_format_of(proto: onnx.ModelProto) -> str | None:
    """The format that a graph's products are quantized to, by what stands in the graph; None where none is."""
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    stored = {ir.DataType(types[node.input[0]]).name for node in proto.graph.node
              if node.op_type == "DequantizeLinear" and node.input[0] in types}  # fmt: skip
    activations = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    return next(
        (
            known.name
            for known in FORMATS.values()
            if {known.weight.name} == stored and (known.activation is not None) == activations
        ),
        None,
    )


class _Insertion:
    def __init__(
        self,
        graph: ir.Graph,
        model: nn.Module,
        plain: Mapping[str, Tensor],
        quantization: Quantization,
        unsigned: bool,
    ) -> None:
        self._graph, self._model, self._plain = graph, model, plain
        self._quantization, self._unsigned = quantization, unsigned
        self._nodes = {node.name: node for node in graph}
        self._pairs: dict[tuple[ir.Value, float], ir.Value] = {}

    def apply(self) -> None:
        for name, tensor in self._quantization.state.items():
            module, _, parameter = name.rpartition(".")
            is_quantized = parameter == "weight" and module in self._quantization.weights
            if is_quantized or not tensor.equal(self._plain[name]):
                self._set(module, parameter, tensor)

    def _set(self, module: str, parameter: str, tensor: Tensor) -> None:
        """Puts a parameter of a block into the graph, quantized where it is to be."""
        if f"{module}.LayerNormalization" in self._nodes:
            index = {"weight": 1, "bias": 2}[parameter]
            self._constant(self._nodes[f"{module}.LayerNormalization"], index, f"{module}.{parameter}", tensor)
            return
        weight = self._quantization.weights.get(module)
        for name, rows, factor in parts_of(self._model, module):
            if parameter == "bias":
                add = self._nodes[f"{name}.Add"]
                self._constant(add, 1, f"{name}.bias", tensor[rows] * factor)
                continue
            product = self._nodes[f"{name}.MatMul"]
            if weight is None:
                self._constant(product, 1, f"{name}.weight", (tensor[rows] * factor).T)
                continue
            scale = self._quantization.activations.get(module)
            if scale is not None:
                product.replace_input_with(0, self._pair(product, scale))
            product.replace_input_with(
                1, self._dequantized(product, f"{name}.weight", weight.codes[rows].T, weight.scale[rows] * factor)
            )

    def _pair(self, product: ir.Node, scale: float) -> ir.Value:
        """The product's input, quantized and dequantized."""
        value = product.inputs[0]
        if (value, scale) not in self._pairs:
            grid = self._quantization.format.activation
            name = f"{value.name}.quantized"
            zero = np.zeros((), _CODES[grid.name])
            if self._unsigned and grid.name == "INT8":
                zero = np.array(_UNSIGNED_ZERO, np.uint8)
            inputs = [self._initializer(f"{name}.scale", np.float32(scale)), self._initializer(f"{name}.zero", zero)]
            codes = self._insert(product, "QuantizeLinear", [value, *inputs], name, inputs[1].dtype)
            self._pairs[value, scale] = self._insert(
                product, "DequantizeLinear", [codes, *inputs], f"{value.name}.dequantized", ir.DataType.FLOAT
            )
        return self._pairs[value, scale]

    def _dequantized(self, product: ir.Node, name: str, codes: Tensor, scale: Tensor) -> ir.Value:
        """A weight [in, out], from codes."""
        dtype = _CODES[self._quantization.format.weight.name]
        inputs = [
            self._initializer(f"{name}.codes", codes.contiguous().numpy().astype(dtype)),
            self._initializer(f"{name}.scale", scale.numpy()),
            self._initializer(f"{name}.zero", np.zeros(len(scale), dtype)),
        ]
        return self._insert(product, "DequantizeLinear", inputs, f"{name}.dequantized", ir.DataType.FLOAT, axis=1)

    def _insert(
        self, before: ir.Node, kind: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=name)
        (value,) = node.outputs
        value.name, value.shape, value.dtype = name, inputs[0].shape, dtype
        self._graph.insert_before(before, node)
        return value

    def _constant(self, node: ir.Node, index: int, name: str, tensor: Tensor) -> None:
        node.replace_input_with(index, self._initializer(f"{name}.own", tensor.detach().contiguous().numpy()))

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def parts_of(model: nn.Module, module: str) -> list[tuple[str, slice, float]]:
    """Products in the graph that a product of the model is: their names, rows and factors (`.split_qkv`)."""
    block, _, part = module.rpartition(".")
    if part != "qkv":
        return [(module, slice(None), 1.0)]
    attn = model.get_submodule(block)
    width = attn.qkv.out_features // 3
    scale = attn.scale if isinstance(attn.q_norm, nn.Identity) else 1.0
    return [
        (f"{block}.{letter}", slice(index * width, (index + 1) * width), scale if letter == "q" else 1.0)
        for index, letter in enumerate("qkv")
    ]
