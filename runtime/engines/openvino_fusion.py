"""What a graph becomes before OpenVINO compiles it, so that fewer passes over the tokens are made.

- Between its products a block adds, merges and normalizes. With the native library that is one pass: `TokenMerge` takes
  the residual that is added before it and the layer norm behind it, and `AddLayerNorm` does the rest. Keys are averaged
  over heads inside the operator, and the logarithm of the sizes, which attention adds, comes out of it.
- The patch embedding is a product: `CutPatches` lays pixels out as it needs them, in one pass.
- For bfloat16 the graph itself is made bfloat16. Left in float32 with a hint, as OpenVINO has it, every native operator
  stands between conversions that copy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import openvino
from openvino import Node, Output, opset15
from openvino.utils.node_factory import NodeFactory

from ..native import library

NATIVE = "TokenMerge"

_NATIVE_OPERATORS = (NATIVE, "AddLayerNorm", "CutPatches")
_NORMED, _LOG_SIZE = 5, 6  # further outputs of a TokenMerge that takes a residual and a norm
_TOKENS = {NATIVE: ((0, 2, 3), (0, _NORMED, _LOG_SIZE)), "AddLayerNorm": ((0, 1), (0, 1))}  # what may be bfloat16
_IN_EITHER = frozenset({
    "Add", "Broadcast", "Concat", "Constant", "Convolution", "Divide", "Gather", "Gelu", "Log", "MVN", "MatMul",
    "Maximum", "Multiply", "Parameter", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Result", "ShapeOf",
    "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Subtract", "Swish", "Tanh", "Transpose", "Unsqueeze",
    "VariadicSplit",
})  # fmt: skip


@dataclass(frozen=True)
class Merge:
    """A native operator in the model.

    Attributes:
        names: Of its decisions.
        counts: Positions that each of them holds per image.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]

    def split(self, call: np.ndarray, images: int) -> dict[str, np.ndarray]:
        """One recorded call -> each decision, int64 [images, count]; images that were padding are left out."""
        batch = len(call) // sum(self.counts)
        ends = np.cumsum([batch * count for count in self.counts])[:-1]
        parts = np.split(call, ends)
        return {
            name: part.reshape(batch, count)[:images]
            for name, part, count in zip(self.names, parts, self.counts, strict=True)
        }


@dataclass(frozen=True)
class _Norm:
    """A layer norm over channels, as the frontend writes it: its input, its parameters [C] and its output."""

    source: Output
    weight: Output
    bias: Output
    epsilon: float
    output: Output


def fuse(model: openvino.Model, *, half: bool) -> list[Merge]:
    """Rewrites a graph of this project; what it does not know, it leaves as it is.

    Args:
        model: As the ONNX frontend makes it; changed in place.
        half: Whether the engine computes in bfloat16.

    Returns:
        The native merge operators, in the order in which they run.
    """
    merges = []
    if library() is not None:
        embed_patches_by_product(model)
        merges = _fuse_native(model)
    if half and not narrow(model):
        _narrow_native(model)
    model.validate_nodes_and_infer_types()
    return merges


def embed_patches_by_product(model: openvino.Model) -> None:
    """Turns a convolution over patches that do not overlap into a product: [B, 3, H, W] -> [B, patches, C]."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution":
            continue
        pixels, weight = node.input_values()
        attributes = node.get_attributes()
        steps, size = attributes["strides"], list(pixels.get_partial_shape())[2:]
        width, _, *kernel = (side.get_length() for side in weight.get_partial_shape())
        apart = (
            steps == kernel
            and attributes["dilations"] == [1, 1]
            and not any(
                attributes["pads_begin"]
                + attributes["pads_end"]
                + [side.get_length() % step for side, step in zip(size, steps, strict=True)]
            )
        )
        biased = _only_reader(node.output(0), "Add")
        flat = None if biased is None else _only_reader(biased.output(0), "Reshape")
        turned = None if flat is None else _only_reader(flat.output(0), "Transpose")
        bias = None if turned is None else _reshaped_constant(biased.input_value(1))
        if not apart or bias is None:
            continue
        patches = _create("CutPatches", [pixels], {"height": steps[0], "width": steps[1], "half": 0})
        rows = opset15.reshape(weight, np.array([width, -1]), special_zero=False)
        product = opset15.matmul(patches, rows, transpose_a=False, transpose_b=True)
        _replace(turned.output(0), opset15.add(product, bias).output(0))


def narrow(model: openvino.Model) -> bool:
    """Makes the numbers of a graph bfloat16, but those of token sizes and of what native operators take in float32.

    A graph with an operator that is not known to compute in either, such as a quantized one, is left in float32, and
    to OpenVINO's own hint.

    Returns:
        Whether it did.
    """
    kinds = {node.get_type_name() for node in model.get_ordered_ops() if _computes(node)}
    if not kinds <= _IN_EITHER | {*_NATIVE_OPERATORS}:
        return False
    narrowed: dict[tuple[str, int], Output] = {}

    def as_half(value: Output) -> Output:
        return narrowed.setdefault(_key(value), opset15.convert(value, "bf16").output(0))

    nodes = model.get_ordered_ops()
    sizes = {_key(node.input_value(1)) for node in nodes if node.get_type_name() == "TokenMerge"}
    sizes |= {_key(node.output(1)) for node in nodes if node.get_type_name() == "TokenMerge"}
    logs = {_key(node.output(0)) for node in nodes
            if node.get_type_name() == "Log" and _key(node.input_value(0)) in sizes}  # fmt: skip
    kept = {name for name, _ in logs | sizes}
    for node in nodes:
        if node.get_type_name() == "CutPatches":
            cut = _create("CutPatches", node.input_values(), {**node.get_attributes(), "half": 1})
            _replace(node.output(0), cut.output(0))
        if node.get_type_name() in (*_NATIVE_OPERATORS, "Constant", "Result") or node.get_name() in kept:
            continue
        for port in node.inputs():
            value = port.get_source_output()
            wide = value.get_node().get_type_name() in ("Constant", "Parameter") or _key(value) in sizes | logs
            if wide and value.get_element_type() == openvino.Type.f32:
                port.replace_source_output(as_half(value))
    for result in model.get_results():
        value = result.input_value(0)
        names = value.get_names()
        value.set_names(set())
        widened = opset15.convert(value, "f32").output(0)
        widened.set_names(names)
        result.input(0).replace_source_output(widened)
    return True


def _narrow_native(model: openvino.Model) -> None:
    """Puts the conversions of bfloat16 around native operators into a float32 graph that a hint makes bfloat16.

    OpenVINO would have them compute in float32 and copy what goes in and out; these conversions it takes out.
    """
    natives = [node for node in model.get_ordered_ops() if node.get_type_name() in _TOKENS]
    for node in natives:
        for index in _TOKENS[node.get_type_name()][1]:
            if index < node.get_output_size() and (readers := list(node.output(index).get_target_inputs())):
                widened = opset15.convert(node.output(index), "f32").output(0)
                for reader in readers:
                    reader.replace_source_output(widened)
    for node in natives:
        for index in _TOKENS[node.get_type_name()][0]:
            if index < node.get_input_size():
                port = node.input(index)
                port.replace_source_output(opset15.convert(port.get_source_output(), "bf16").output(0))


def _fuse_native(model: openvino.Model) -> list[Merge]:
    merges = []
    norms = {_key(norm.source): norm for node in model.get_ordered_ops() if (norm := _norm(node)) is not None}
    for node in model.get_ordered_ops():
        if node.get_type_name() == NATIVE:
            merges.append(_decisions(node))
            _fuse_merge(node, norms.get(_key(node.output(0))))
        elif _is_residual(node):
            _fuse_residual(node, norms)
    return merges


def _fuse_residual(node: Node, norms: Mapping[tuple[str, int], _Norm]) -> None:
    """Adds and normalizes at once; of the first tokens only, where the others are dropped in between."""
    total = node.output(0)
    if (first := _first_tokens(total)) is not None:
        total = first
    if (norm := norms.get(_key(total))) is None:
        return
    tokens = total.get_partial_shape()[1].get_length()
    attributes = {"tokens": tokens, "epsilon": norm.epsilon}
    fused = _create("AddLayerNorm", [*node.input_values(), norm.weight, norm.bias], attributes)
    _replace(norm.output, fused.output(1))
    _replace(total, fused.output(0))


def _first_tokens(value: Output) -> Output | None:
    """What remains where an only reader takes the first of the tokens [B, N, C]."""
    reader = _only_reader(value, "Slice")
    if reader is None:
        return None
    start, _, step, axes = (operand.get_node() for operand in reader.input_values()[1:5])
    if any(operand.get_type_name() != "Constant" for operand in (start, step, axes)):
        return None
    bounds = [operand.get_data().tolist() for operand in (start, step, axes)]
    return reader.output(0) if bounds == [[0], [1], [1]] and _is_static(reader.output(0)) else None


def _fuse_merge(node: Node, norm: _Norm | None) -> None:
    x, size, metric = node.input_values()
    if (keys := _keys_behind(metric.get_node())) is not None:
        metric = keys
    inputs, attributes = [x, size, metric], {**node.get_attributes()}
    residual = x.get_node()
    fused = norm is not None and _is_residual(residual) and len(x.get_target_inputs()) == 1
    if fused:
        inputs[0], addend = residual.input_values()
        inputs += [addend, norm.weight, norm.bias]
        attributes["epsilon"] = norm.epsilon
    merge = _create(NATIVE, inputs, attributes)
    if fused:
        _replace(norm.output, merge.output(_NORMED))
        if (log_size := _log_of(node.output(1))) is not None:
            _replace(log_size, merge.output(_LOG_SIZE))
    for old, new in zip(node.outputs(), merge.outputs()[:_NORMED], strict=True):
        _replace(old, new)


@functools.cache
def _factory() -> NodeFactory:
    factory = NodeFactory()
    factory.add_extension(str(library()))
    return factory


def _create(kind: str, inputs: list[Output], attributes: dict[str, object]) -> Node:
    return _factory().create(kind, inputs, attributes)


def _replace(old: Output, new: Output) -> None:
    """Lets all readers of a value read another one, outputs of the graph under the same names."""
    if any(reader.get_node().get_type_name() == "Result" for reader in old.get_target_inputs()):
        names = old.get_names()
        old.set_names(set())
        new.set_names(names)
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _computes(node: Node) -> bool:
    return any(port.get_element_type().is_real() for port in (*node.inputs(), *node.outputs()))


def _decisions(node: Node) -> Merge:
    ports = node.outputs()[2:5]
    return Merge(
        tuple(next(iter(port.get_names())) for port in ports),
        tuple(port.get_partial_shape()[1].get_length() for port in ports),
    )


def _key(value: Output) -> tuple[str, int]:
    return value.get_node().get_name(), value.get_index()


def _is_residual(node: Node) -> bool:
    """Whether a node adds two tensors of tokens [B, N, C]."""
    if node.get_type_name() != "Add":
        return False
    one, other = node.input_values()
    return (
        _is_static(one)
        and one.get_partial_shape() == other.get_partial_shape()
        and all(value.get_node().get_type_name() != "Constant" for value in (one, other))
    )


def _is_static(tokens: Output) -> bool:
    shape = tokens.get_partial_shape()
    return len(shape) == 3 and shape[1].is_static and shape[2].is_static


def _norm(mvn: Node) -> _Norm | None:
    """The layer norm that begins with a node: MVN over channels, times a weight, plus a bias."""
    if mvn.get_type_name() != "MVN":
        return None
    attributes = mvn.get_attributes()
    if not attributes["normalize_variance"] or attributes["eps_mode"] != "INSIDE_SQRT":
        return None
    source = mvn.input_value(0)
    channels = source.get_partial_shape()[-1]
    axes = _axes(mvn.input_value(1).get_node())
    scaled = _with_parameter(mvn.output(0), "Multiply", channels)
    if axes not in ([-1], [len(source.get_partial_shape()) - 1]) or scaled is None:
        return None
    shifted = _with_parameter(scaled[0], "Add", channels)
    if shifted is None:
        return None
    return _Norm(source, scaled[1], shifted[1], attributes["eps"], shifted[0])


def _axes(node: Node) -> list[int] | None:
    if node.get_type_name() == "Range":
        bounds = [value.get_node() for value in node.input_values()]
        if all(bound.get_type_name() == "Constant" for bound in bounds):
            return list(range(*(int(bound.get_data()) for bound in bounds)))
    return [int(axis) for axis in node.get_data()] if node.get_type_name() == "Constant" else None


def _with_parameter(value: Output, kind: str, channels: openvino.Dimension) -> tuple[Output, Output] | None:
    """What an only reader makes of a value with a constant [channels]: the result, and the constant."""
    reader = _only_reader(value, kind)
    if reader is None:
        return None
    others = [operand for operand in reader.input_values() if operand.get_node().get_type_name() == "Constant"]
    if len(others) != 1 or others[0].get_partial_shape() != openvino.PartialShape([channels]):
        return None
    return reader.output(0), others[0]


def _only_reader(value: Output, kind: str) -> Node | None:
    readers = [port.get_node() for port in value.get_target_inputs() if port.get_node().get_type_name() != "ShapeOf"]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == kind else None


def _reshaped_constant(value: Output) -> Output | None:
    source = value.get_node().input_value(0) if value.get_node().get_type_name() == "Reshape" else None
    return source if source is not None and source.get_node().get_type_name() == "Constant" else None


def _log_of(size: Output) -> Output | None:
    """The logarithm of sizes [B, N, 1] as attention adds it, [B, 1, 1, N]."""
    for port in size.get_target_inputs():
        log = port.get_node()
        turned = _only_reader(log.output(0), "Transpose") if log.get_type_name() == "Log" else None
        raised = None if turned is None else _only_reader(turned.output(0), "Unsqueeze")
        if raised is not None and list(raised.get_output_partial_shape(0))[1:3] == [1, 1]:
            return raised.output(0)
    return None


def _keys_behind(mean: Node) -> Output | None:
    """The keys [B, N, H, D] whose mean over heads a node takes, before they are turned for attention."""
    if mean.get_type_name() != "ReduceMean":
        return None
    turned = mean.input_value(0).get_node()
    if turned.get_type_name() != "Transpose" or list(turned.input_value(1).get_node().get_data()) != [0, 2, 1, 3]:
        return None
    return turned.input_value(0)
