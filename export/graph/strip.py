"""Takes reductions, or a compensation, out of a traced graph: what remains is the graph of a degree without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx

from tocom.export.graph.operators import DOMAIN
from tocom.export.graph.split_qkv import FACTORS

_TURNED = ("Transpose", "Unsqueeze")  # what the logarithm of sizes goes through before attention adds it


def strip_reductions(graph: onnx.GraphProto) -> bool:
    """Lets all tokens through, with nothing added to attention.

    Args:
        graph: Changed in place; the token counts in it are left as they are.

    Returns:
        Whether that was possible: sizes that something else reads, such as a pool, cannot be taken out.
    """
    same: dict[str, str] = {}  # a value -> the one that takes its place
    sizes: set[str] = set()
    for node in graph.node:
        of_sizes = sizes & set(node.input)
        if node.domain == DOMAIN:
            same[node.output[0]] = node.input[0]
            sizes.add(node.output[1])
        elif node.op_type == "Add" and of_sizes:
            (kept,) = set(node.input) - of_sizes
            same[node.output[0]] = kept
        elif of_sizes and node.op_type in ("Log", *_TURNED):
            sizes.add(node.output[0])
        elif of_sizes:
            return False
    _leave_out(graph, same)
    return True


def strip_compensation(graph: onnx.GraphProto) -> None:
    """Lets the weights stand for themselves: W in place of W + down . diag(gate) . up."""
    factors = {each.name for each in graph.initializer if _is_factor(each.name)}
    same: dict[str, str] = {}
    made_of_factors = set(factors)
    for node in graph.node:
        found = made_of_factors & set(node.input)
        if found and found == set(node.input):
            made_of_factors.update(node.output)
        elif found:
            (weight,) = set(node.input) - found
            same[node.output[0]] = weight
    _leave_out(graph, same)


def is_compensated(graph: onnx.GraphProto) -> bool:
    """Whether a graph adds a compensation to its weights."""
    return any(_is_factor(each.name) for each in graph.initializer)


def _is_factor(name: str) -> bool:
    return name.endswith(tuple(each.replace("_", ".") for each in FACTORS))


def _leave_out(graph: onnx.GraphProto, same: dict[str, str]) -> None:
    """Puts values in the place of others, and takes out what nobody reads then."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            while name in same:
                name = same[name]
            node.input[index] = name
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if not any(readers[name] for name in node.output):
            readers.subtract(node.input)
            graph.node.remove(node)
    _join_transposes(graph, readers)
    made = {name for node in graph.node for name in node.output}
    read = {name for node in graph.node for name in node.input}
    for values, known in ((graph.initializer, read), (graph.value_info, made)):
        kept = [value for value in values if value.name in known]
        del values[:]
        values.extend(kept)


def _join_transposes(graph: onnx.GraphProto, readers: Mapping[str, int]) -> None:
    """One transpose in place of two, where nothing reads what lies between any more."""
    turned = {node.output[0]: node for node in graph.node if node.op_type == "Transpose"}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in turned]:
        first = turned[node.input[0]]
        if readers[first.output[0]] == 1:
            order = first.attribute[0].ints
            node.attribute[0].ints[:] = [order[axis] for axis in node.attribute[0].ints]
            node.input[0] = first.input[0]
            graph.node.remove(first)
