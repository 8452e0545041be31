"""float32 graph -> a typed graph of a narrow format: what is half, and what stays float32, stands in the graph.

Strongly typed engines (TensorRT 11, TensorRT for RTX) take every number's format from the graph. Products, softmax,
activations and the residual stream become half. These stay float32, where rounding would change what is decided or
counted rather than how precisely: what tokens are matched on and the scores (ToMe, section 3), token sizes and their
logarithms (bfloat16 cannot count beyond 256), pools weighted by them, and what is prepared from weights alone, so that
every weight is rounded once. bfloat16 keeps the residual stream in float32 as well: its 8 bits are too few to sum up
two branches of every block.

Weights stay in the family's shared float32 files and are cast in the graph; engines fold that when they load or build
it.

Quantized products read half from DequantizeLinear, so that nothing stands between it and them, and QuantizeLinear takes
half. Scales are chosen so that float16 holds them exactly; bfloat16 does not, and there both compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import onnx
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import apply
from tocom.export.graph.operators import DOMAIN, point_name

FLOAT = ir.DataType.FLOAT
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
OPSET = {"fp16": 20, "bf16": 22}  # the first in which all operators take the format
FORMATS = ("fp32", *HALF)
WIDE_RESIDUAL = ("bf16",)  # formats whose residual stream stays float32

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_EXACT_SCALES = ir.DataType.FLOAT16  # of the narrow formats the one that holds every scale


class HalfPrecision(InPlacePass):
    """Sets the format of everything that depends on the input, and puts casts between.

    Args:
        precision: A key of `HALF`.
        float_blocks: Blocks that stay float32.
    """

    def __init__(self, precision: str, float_blocks: Collection[int] = ()) -> None:
        self._precision, self._float_blocks = precision, float_blocks

    def requires(self, model: ir.Model) -> None:
        """A float32 graph, with nothing cast to half.

        Raises:
            PreconditionError: If it is not so.
        """
        _require_float_ends(model.graph, PreconditionError)
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() in map(int, HALF.values()):
                raise PreconditionError(f"the graph must be float32, {node.name} casts to half")

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        wide_residual = self._precision in WIDE_RESIDUAL
        kept = self._kept(model.graph)
        _Typing(model, HALF[self._precision], wide_residual=wide_residual, kept=kept).apply()
        parts = (model.graph, *model.functions.values())
        opset = max(OPSET[self._precision], *(part.opset_imports[""] for part in parts))  # int4 is later than float16
        for part in parts:
            part.opset_imports[""] = opset
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Inputs and outputs are float32.

        Products read half, but for those that stay wide; operators get half tokens at most, with all else in float32;
        the opset knows the format.

        Raises:
            PostconditionError: If it is not so.
        """
        _require_float_ends(model.graph, PostconditionError)
        if model.graph.opset_imports[""] < OPSET[self._precision]:
            raise PostconditionError(f"{self._precision} needs opset {OPSET[self._precision]}")
        half, wide = HALF[self._precision], {*_signal_nodes(model.graph), *self._kept(model.graph)}
        images = _made_of(model.graph, model.graph.inputs, any)  # the rest is made of weights alone
        sizes = [node.outputs[1] for node in model.graph if node.domain == DOMAIN]
        wide |= _made_of(model.graph, sizes, all)
        for node in model.graph:
            if node.domain == DOMAIN and any(value.dtype == half for value in node.inputs[1:]):
                raise PostconditionError(f"{node.name} must get sizes and signal in float32")
            is_half = node.op_type in _PRODUCTS and node in images and node not in wide
            if is_half and any(value is not None and value.dtype == FLOAT for value in node.inputs):
                raise PostconditionError(f"{node.name} must read {self._precision} alone")

    def _kept(self, graph: ir.Graph) -> set[ir.Node]:
        return {node for block in self._float_blocks for node in nodes_of_block(graph, block)}


def typed(proto: onnx.ModelProto, precision: str, float_blocks: Collection[int] = ()) -> onnx.ModelProto:
    """A copy of a float32 graph in a narrow format; its inputs and outputs stay float32.

    Args:
        proto: As `tocom.export.graph.lower` makes it; large weights may lie outside.
        precision: One of `FORMATS`; float32 is returned as it is.
        float_blocks: Blocks that stay float32.
    """
    return proto if precision == "fp32" else apply(HalfPrecision(precision, float_blocks), proto)


def precision_of(proto: onnx.ModelProto) -> str:
    """The format of a graph's products by what stands in the graph, not by what was asked for."""
    types = {
        attribute.i
        for node in proto.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    }
    return next((name for name, dtype in HALF.items() if int(dtype) in types), "fp32")


class _Typing:
    """Decides the type of every node of one graph, in order, and puts casts between."""

    def __init__(self, model: ir.Model, half: ir.DataType, *, wide_residual: bool, kept: Collection[ir.Node]) -> None:
        self._graph, self._half, self._wide_residual = model.graph, half, wide_residual
        self._types: dict[ir.Value, ir.DataType] = {}  # of the floats that depend on the input
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._sizes: set[ir.Value] = set()  # token sizes, and what is made of them alone
        self._wide = {*_signal_nodes(model.graph), *kept}  # nodes that compute in float32

    def apply(self) -> None:
        for value in self._graph.inputs:
            self._types[value] = FLOAT
        for node in list(self._graph):
            moves = any(value in self._types for value in node.inputs if value is not None)
            if moves or node.op_type == "DequantizeLinear":  # codes are no floats, and weights' do not move
                self._set(node)
        for index, value in enumerate(self._graph.outputs):
            if self._types.get(value, FLOAT) != FLOAT:
                self._widen_output(index, value)

    def _set(self, node: ir.Node) -> None:
        if node.domain == DOMAIN:
            x, *wide = node.inputs
            stream = FLOAT if node in self._wide else self._types[x]
            self._feed(node, {0: stream} | {1 + index: FLOAT for index in range(len(wide))})
            self._declare(node.outputs[0], stream)
            self._declare(node.outputs[1], FLOAT)
            self._sizes.add(node.outputs[1])
            return
        chosen = self._type_of(node)
        floats = [index for index, value in enumerate(node.inputs) if self._is_float(value)]
        self._feed(node, dict.fromkeys(floats, chosen))
        for value in node.outputs:
            if self._is_float(value):
                self._declare(value, chosen)
        if node.op_type == "Conv" and self._wide_residual:
            self._widen(node)  # what it puts out joins the stream

    def _type_of(self, node: ir.Node) -> ir.DataType:
        moving = [value for value in node.inputs if value in self._types]
        if node in self._wide:
            return FLOAT
        if node.op_type in _QUANTIZERS:
            return self._half if self._half == _EXACT_SCALES else FLOAT
        if set(moving) <= self._sizes:
            self._sizes.update(node.outputs)
            return FLOAT
        if node.op_type in _PRODUCTS:
            return self._half
        others = [value for value in moving if value not in self._sizes]
        if node.op_type != "Add" and len(others) < len(moving):
            return FLOAT  # weighted by sizes
        return FLOAT if any(self._types[value] == FLOAT for value in others) else self._half

    def _feed(self, node: ir.Node, types: dict[int, ir.DataType]) -> None:
        """Casts what the node reads where its type is another one."""
        for index, dtype in types.items():
            value = node.inputs[index]
            if self._types.get(value, FLOAT) != dtype:
                node.replace_input_with(index, self._cast(value, dtype, before=node))

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if (value, dtype) not in self._casts:
            cast = cast_of(value, dtype, f"{value.name}.{dtype.name.lower()}")
            self._graph.insert_before(before, cast)
            self._casts[value, dtype] = cast.outputs[0]
        return self._casts[value, dtype]

    def _widen(self, node: ir.Node) -> None:
        (value,) = node.outputs
        cast = cast_of(value, FLOAT, f"{value.name}.float")
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        self._graph.insert_after(node, cast)
        self._types[cast.outputs[0]] = FLOAT

    def _is_float(self, value: ir.Value | None) -> bool:
        return value is not None and (value in self._types or value.dtype == FLOAT)

    def _declare(self, value: ir.Value, dtype: ir.DataType) -> None:
        self._types[value] = dtype
        value.dtype = dtype

    def _widen_output(self, index: int, value: ir.Value) -> None:
        """The output keeps its name and type; what made it gets another name."""
        name, value.name = value.name, f"{value.name}.{self._half.name.lower()}"
        cast = cast_of(value, FLOAT, name)
        self._graph.append(cast)
        self._graph.outputs[index] = cast.outputs[0]


def nodes_of_block(graph: ir.Graph, block: int) -> set[ir.Node]:
    """The nodes between the tokens that enter a block and those that leave it.

    Args:
        graph: With the names of `tocom.export.graph.operators.point_name`.
        block: Which.
    """
    values = {value.name: value for node in graph for value in node.outputs}
    entering = values.get(point_name(block, "tokens"))
    leaving = values.get(point_name(block + 1, "tokens"))
    if entering is None or leaving is None:
        return set()
    behind = {entering.producer()}
    for node in graph:  # in order, so that what a node reads was seen before it
        if any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
    between, waiting = set(), [leaving.producer()]
    while waiting:
        node = waiting.pop()
        if node in behind and node is not entering.producer() and node not in between:
            between.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    return between


def cast_of(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    """A node that casts a value, in no graph yet; its output has that name."""
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast.{name}")
    (result,) = cast.outputs
    result.name, result.shape, result.dtype = name, value.shape, dtype
    return cast


def _require_float_ends(graph: ir.Graph, error: type[Exception]) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype not in (None, FLOAT):  # a debug copy's further outputs may have no type yet
            raise error(f"inputs and outputs must be float32, {value.name} is {value.dtype}")


def _made_of(graph: ir.Graph, values: Iterable[ir.Value], how_many: Callable[[Iterable[bool]], bool]) -> set[ir.Node]:
    """Nodes that read, of the floats that depend on the input, any or all from these values or what is made of them."""
    moving, derived, nodes = set(graph.inputs), set(values), set()
    for node in graph:
        read = moving.intersection(node.inputs)
        floats = [value for value in node.outputs if value.dtype in (FLOAT, *HALF.values())]  # counts do not move
        moving.update(floats if read else ())
        if read and how_many(value in derived for value in read):
            derived.update(floats)
            nodes.add(node)
    return nodes


def _signal_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that nothing but the operators' signal is made of: what tokens are chosen by."""
    nodes: set[ir.Node] = set()
    for node in reversed(list(graph)):
        readers = [(reader, index) for value in node.outputs for reader, index in value.uses()]
        of_signal = [reader in nodes or (reader.domain == DOMAIN and index == 2) for reader, index in readers]
        if readers and all(of_signal):
            nodes.add(node)
    return nodes
