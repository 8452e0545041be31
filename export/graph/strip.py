"""Takes reductions, or a compensation, out of a traced graph: what remains is the graph of a degree without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import ProtoPass, copy_of, reductions_of
from tocom.export.graph.operators import DOMAIN
from tocom.export.graph.split_qkv import FACTORS

_TRANSPOSING = ("Transpose", "Unsqueeze")  # what the logarithm of sizes goes through before attention adds it


class StripReductions(ProtoPass):
    """Lets all tokens through, with nothing added to attention; the token counts in the graph are left as they are."""

    def requires(self, model: onnx.ModelProto) -> None:
        """Token sizes are read by attention alone, which adds their logarithm.

        Raises:
            PreconditionError: If it is not so.
        """
        if not can_strip_reductions(model):
            raise PreconditionError("token sizes must be read by attention alone, something else reads them")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        copy = copy_of(model)
        _leave_out(copy.graph, _replaced_without_reductions(copy.graph)[0])
        functions = [function for function in copy.functions if function.domain != DOMAIN]
        del copy.functions[:]
        copy.functions.extend(functions)
        for opset in [opset for opset in copy.opset_import if opset.domain == DOMAIN]:
            copy.opset_import.remove(opset)
        return PassResult(copy, modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """Neither token reductions nor their functions are left, and nothing is read that nobody makes.

        Raises:
            PostconditionError: If it is not so.
        """
        if reductions_of(model) or any(function.domain == DOMAIN for function in model.functions):
            raise PostconditionError("no token reduction must be left, nor its function")
        _ensure_whole(model.graph)


class StripCompensation(ProtoPass):
    """Lets the weights stand for themselves: W in place of W + down . diag(gate) . up."""

    def requires(self, model: onnx.ModelProto) -> None:
        """A compensation is added to weights.

        Raises:
            PreconditionError: If it is not so.
        """
        if not is_compensated(model.graph):
            raise PreconditionError("a compensation must be added to weights, there is none")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        copy = copy_of(model)
        _leave_out(copy.graph, _replaced_without_compensation(copy.graph))
        return PassResult(copy, modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """None of its factors is left, and nothing is read that nobody makes.

        Raises:
            PostconditionError: If it is not so.
        """
        if is_compensated(model.graph):
            raise PostconditionError("no factor of a compensation must be left")
        _ensure_whole(model.graph)


def can_strip_reductions(model: onnx.ModelProto) -> bool:
    """Whether attention alone reads token sizes: those that something else reads, such as a pool, have to stay."""
    return _replaced_without_reductions(model.graph)[1]


def is_compensated(graph: onnx.GraphProto) -> bool:
    """Whether a graph adds a compensation to its weights."""
    return any(_is_factor(initializer.name) for initializer in graph.initializer)


def _is_factor(name: str) -> bool:
    return name.endswith(tuple(factor.replace("_", ".") for factor in FACTORS))


def _replaced_without_reductions(graph: onnx.GraphProto) -> tuple[dict[str, str], bool]:
    """Value -> the one that takes its place once reductions are gone; and whether that is all that reads sizes."""
    replaced: dict[str, str] = {}
    sizes: set[str] = set()
    for node in graph.node:
        sizes_read = sizes & set(node.input)
        if node.domain == DOMAIN:
            replaced[node.output[0]] = node.input[0]
            sizes.add(node.output[1])
        elif node.op_type == "Add" and sizes_read:
            (other,) = set(node.input) - sizes_read
            replaced[node.output[0]] = other
        elif sizes_read and node.op_type in ("Log", *_TRANSPOSING):
            sizes.add(node.output[0])
        elif sizes_read:
            return replaced, False
    return replaced, True


def _replaced_without_compensation(graph: onnx.GraphProto) -> dict[str, str]:
    """Value -> the one that takes its place once the compensation is gone."""
    replaced: dict[str, str] = {}
    made_of_factors = {initializer.name for initializer in graph.initializer if _is_factor(initializer.name)}
    for node in graph.node:
        factors = made_of_factors & set(node.input)
        if factors and factors == set(node.input):
            made_of_factors.update(node.output)
        elif factors:
            (weight,) = set(node.input) - factors
            replaced[node.output[0]] = weight
    return replaced


def _leave_out(graph: onnx.GraphProto, replaced: Mapping[str, str]) -> None:
    """Puts values in the place of others, and takes out what nobody reads then."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            while name in replaced:
                name = replaced[name]
            node.input[index] = name
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if not any(readers[name] for name in node.output):
            readers.subtract(node.input)
            graph.node.remove(node)
    _join_transposes(graph, readers)
    computed = {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input}
    for values, names in ((graph.initializer, read), (graph.value_info, computed)):
        kept = [value for value in values if value.name in names]
        del values[:]
        values.extend(kept)


def _join_transposes(graph: onnx.GraphProto, readers: Mapping[str, int]) -> None:
    """One transpose in place of two, where nothing reads what lies between any more."""
    transposes = {node.output[0]: node for node in graph.node if node.op_type == "Transpose"}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in transposes]:
        first = transposes[node.input[0]]
        if readers[first.output[0]] == 1:
            order = first.attribute[0].ints
            node.attribute[0].ints[:] = [order[axis] for axis in node.attribute[0].ints]
            node.input[0] = first.input[0]
            graph.node.remove(first)


def _ensure_whole(graph: onnx.GraphProto) -> None:
    known = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        if missing := {name for name in node.input if name} - known:
            raise PostconditionError(f"{node.op_type} {node.name} must read what is there, {sorted(missing)} is gone")
        known.update(node.output)
    if missing := {value.name for value in graph.output} - known:
        raise PostconditionError(f"the graph must put out what is there, {sorted(missing)} is gone")
