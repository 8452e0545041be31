"""Graph -> its slice bound: the blocks simply drop the last r tokens, and nothing is matched or merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tocom.export.graph.operators import DOMAIN

_ZERO, _ONE = "slice_bound.zero", "slice_bound.one"


@contextmanager
def slice_bound(graph: Path) -> Iterator[Path]:
    """A copy of a graph that drops the last r tokens where the graph reduces them; removed afterwards."""
    proto = onnx.load(graph, load_external_data=False)
    reductions = [node for node in proto.graph.node if node.domain == DOMAIN]
    constants = {_ZERO: 0, _ONE: 1} | {_end_of(node): -_removed(node) for node in reductions}
    nodes = [part for node in proto.graph.node for part in (_slices(node) if node.domain == DOMAIN else [node])]
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name) for name, value in constants.items()
    )
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    del proto.functions[:]
    file = graph.with_name(f".{graph.stem}.slice.onnx")  # its weight files are found relative to it
    try:
        file.write_bytes(proto.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)


def _removed(node: onnx.NodeProto) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "r")


def _end_of(node: onnx.NodeProto) -> str:
    return f"slice_bound.end.{_removed(node)}"


def _slices(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Slice", [node.input[index], _ZERO, _end_of(node), _ONE], [node.output[index]])
        for index in (0, 1)  # tokens and their sizes
    ]
