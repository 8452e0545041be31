"""Graph -> its slice bound: the blocks simply drop the last r tokens, and nothing is matched or merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import ProtoPass, apply, copy_of, integers_of, reductions_of
from tocom.export.graph.operators import DOMAIN
from tocom.runtime.family_files import slice_bound_of

_ZERO, _ONE = "slice_bound.zero", "slice_bound.one"


class SliceBound(ProtoPass):
    """Puts a slice of the tokens, and one of their sizes, in the place of every token reduction."""

    def requires(self, model: onnx.ModelProto) -> None:
        """Nothing reads what the reductions decide.

        Raises:
            PreconditionError: If it is not so.
        """
        decisions = {name for node in reductions_of(model) for name in node.output[2:]}
        read = {name for node in model.graph.node for name in node.input}
        read.update(value.name for value in model.graph.output)
        if decisions & read:
            raise PreconditionError(f"decisions must be read by nobody, {sorted(decisions & read)} are")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        copy = copy_of(model)
        constants = {_ZERO: 0, _ONE: 1} | {_end_of(node): -integers_of(node)["r"] for node in reductions_of(model)}
        nodes = [part for node in model.graph.node for part in (_slices(node) if node.domain == DOMAIN else [node])]
        copy.graph.initializer.extend(
            numpy_helper.from_array(np.array([value], np.int64), name) for name, value in constants.items()
        )
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        del copy.functions[:]
        return PassResult(copy, modified=True)

    def ensures(self, model: onnx.ModelProto) -> None:
        """Neither functions nor token reductions are left.

        Raises:
            PostconditionError: If it is not so.
        """
        if model.functions or reductions_of(model):
            raise PostconditionError("a slice bound must hold neither functions nor token reductions")


@contextmanager
def slice_bound(graph: Path) -> Iterator[Path]:
    """The slice bound of a graph file, beside it; removed afterwards."""
    proto = apply(SliceBound(), onnx.load(graph, load_external_data=False))
    file = slice_bound_of(graph)  # its weight files are found relative to it
    try:
        file.write_bytes(proto.SerializeToString())
        yield file
    finally:
        file.unlink(missing_ok=True)


def _end_of(node: onnx.NodeProto) -> str:
    return f"slice_bound.end.{integers_of(node)['r']}"


def _slices(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Slice", [node.input[index], _ZERO, _end_of(node), _ONE], [node.output[index]])
        for index in (0, 1)  # tokens and their sizes
    ]
