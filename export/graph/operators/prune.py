"""Pruning: `pruned, pruned_size, kept, dropped = TokenPrune(x, token_size, attention; r, tokens, protected)`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import nn

from tocom.export.graph.operators.interface import DOMAIN, VERSION, Operator


@script(Opset(DOMAIN, VERSION), default_opset=op)
def TokenPrune(x, token_size, attention, r: int, tokens: int, protected: int):  # noqa: N802
    """Fuses the r + 1 tokens that the class token attends least into one (EViT, section 3).

    x [B, N, C], token_size [B, N, 1], attention [B, N] -> pruned [B, N - r, C], pruned_size [B, N - r, 1], and the
    decisions as positions among the N tokens, in position order: kept [B, N - protected - r - 1, 1], dropped
    [B, r + 1, 1] (int64). tokens is N; r must not exceed N - protected - 1; protected prefix tokens stay first, the
    fused token stands last. Of tokens attended equally, those at lower positions are kept.
    """
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    prefix = op.Reshape(op.Constant(value_int=protected), one)
    end = op.Reshape(op.Constant(value_int=tokens), one)
    count = op.Sub(end, prefix)

    free = op.Slice(op.Cast(attention, to=1), prefix, end, one, one)
    stay = op.Sub(count, op.Add(op.Reshape(op.Constant(value_int=r), one), one))
    _, ranked = op.TopK(free, count, axis=-1, largest=1, sorted=1)
    # one sort puts both kinds into position order: dropped tokens behind all kept ones
    ranks = op.Range(op.Constant(value_int=0), op.Squeeze(count, zero), op.Constant(value_int=1))
    behind = op.Mul(op.Cast(op.GreaterOrEqual(ranks, stay), to=7), count)
    in_order, _ = op.TopK(op.Cast(op.Add(ranked, behind), to=1), count, axis=-1, largest=0, sorted=1)
    position = op.Add(op.Sub(op.Cast(in_order, to=7), behind), prefix)
    kept = op.Unsqueeze(op.Slice(position, zero, stay, one, one), two)
    dropped = op.Unsqueeze(op.Slice(position, stay, end, one, one), two)

    floor = op.CastLike(op.Constant(value_float=1e-12), x)
    weight = op.Add(op.GatherND(op.CastLike(attention, x), dropped, batch_dims=1), floor)
    total = op.MatMul(op.Unsqueeze(weight, one), op.GatherND(x, dropped, batch_dims=1))
    fused = op.Div(total, op.Unsqueeze(op.ReduceSum(weight, one, keepdims=1), one))
    size = op.ReduceSum(op.GatherND(token_size, dropped, batch_dims=1), one, keepdims=1)

    pruned = op.Concat(op.Slice(x, zero, prefix, one, one), op.GatherND(x, kept, batch_dims=1), fused, axis=1)
    pruned_size = op.Concat(
        op.Slice(token_size, zero, prefix, one, one), op.GatherND(token_size, kept, batch_dims=1), size, axis=1
    )
    return pruned, pruned_size, kept, dropped


class PruneOperator(Operator):
    """`tocom.reduction.PRUNE` in a graph."""

    name = "TokenPrune"
    outputs = ("pruned", "pruned_size", "kept", "dropped")

    def function_proto(self, attributes: Mapping[str, int]) -> onnx.FunctionProto:  # noqa: ARG002
        """The body above."""
        return TokenPrune.to_function_proto()

    def attributes(self, model: nn.Module) -> dict[str, int]:
        """The prefix."""
        return {"protected": model.num_prefix_tokens}

    def decision_counts(self, model: nn.Module, tokens: int, r: int) -> tuple[int, ...]:
        """Tokens that stay behind the prefix, and tokens that are fused."""
        return tokens - model.num_prefix_tokens - r - 1, r + 1
