"""Graph -> the same without model-local functions, for engines that do not expand them (TensorRT, OpenVINO)."""

from __future__ import annotations

import onnx
import onnx.inliner
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from tocom.export.graph.graph_pass import ProtoPass, apply, reductions_of
from tocom.export.graph.operators import DOMAIN


class Inline(ProtoPass):
    """Puts the body of every function where it is called."""

    def requires(self, model: onnx.ModelProto) -> None:
        """Every token reduction has its function in the model.

        Raises:
            PreconditionError: If it is not so.
        """
        functions = {function.name for function in model.functions if function.domain == DOMAIN}
        without = {node.op_type for node in reductions_of(model)} - functions
        if without:
            raise PreconditionError(f"every operator must have its function in the model, {sorted(without)} have none")

    def call(self, model: onnx.ModelProto) -> PassResult:
        """See the class."""
        return PassResult(onnx.inliner.inline_local_functions(model), modified=bool(model.functions))

    def ensures(self, model: onnx.ModelProto) -> None:
        """Neither functions nor token reductions are left.

        Raises:
            PostconditionError: If it is not so.
        """
        left = [*(function.name for function in model.functions), *(node.op_type for node in reductions_of(model))]
        if left:
            raise PostconditionError(f"a graph must have no functions once they are inlined, has {left}")


def inline(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without model-local functions."""
    return apply(Inline(), graph)
