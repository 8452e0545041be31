"""The form of all graph transforms: onnx_ir's passes, each with what it requires and what it ensures.

A pass checks what it requires, works, and checks what it ensures; `onnx_ir.passes` raises PreconditionError or
PostconditionError otherwise. Most are passes over onnx_ir's models. Some must not change a byte that they do not mean
to change, since files are named and listed by their contents, and onnx_ir does not keep all of a file: it adds
value_info for initializers, and orders value_info as nodes are ordered. Those are the same passes over protos.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes import FunctionalPass, PassBase, PassResult

from tocom.export.graph.operators import DOMAIN


class ProtoPass(FunctionalPass):
    """A pass over `onnx.ModelProto` that leaves what it is given untouched; the rest is as in onnx_ir."""

    @abstractmethod
    def call(self, model: onnx.ModelProto) -> PassResult:  # type: ignore[override]
        """Does the work, on a copy."""

    def requires(self, model: onnx.ModelProto) -> None:  # type: ignore[override]
        """Raises PreconditionError where the pass would not be right."""

    def ensures(self, model: onnx.ModelProto) -> None:  # type: ignore[override]
        """Raises PostconditionError where the pass has not done what it says."""


def apply(graph_pass: PassBase, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Runs a pass of either kind over a proto, which stays untouched.

    Raises:
        PreconditionError: If the graph is not what the pass requires.
        PostconditionError: If the result is not what the pass ensures.
    """
    if isinstance(graph_pass, ProtoPass):
        return graph_pass(proto).model
    return ir.to_proto(graph_pass(ir.from_proto(proto)).model)


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph; weights that lie outside are not read."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def reductions_of(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The token reductions of a graph, in order."""
    return [node for node in proto.graph.node if node.domain == DOMAIN]


def integers_of(node: onnx.NodeProto) -> Mapping[str, int]:
    """The integer attributes of a node."""
    return {attribute.name: attribute.i for attribute in node.attribute}
