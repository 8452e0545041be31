"""Merging: `merged, merged_size, src, dst, unm = TokenMerge(x, token_size, metric; r, tokens, protected, keep_order)`.

Merged tokens are taken into the mean by a product with their weights, which stand in a one-hot matrix of destinations.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import nn

from tocom.export.graph.operators.interface import DOMAIN, VERSION, Operator
from tocom.merging import first_positions


@script(Opset(DOMAIN, VERSION), default_opset=op)
def TokenMerge(x, token_size, metric, r: int, tokens: int, protected: int, keep_order: int):  # noqa: N802
    """Merges r tokens of every image (ToMe, section 3).

    x [B, N, C], token_size [B, N, 1], metric [B, N, D] -> merged [B, N - r, C], merged_size [B, N - r, 1], and the
    decisions as positions among the N tokens: src [B, r, 1], dst [B, r, 1], unm [B, A - r, 1] (int64). tokens is N; r
    must not exceed (N - protected) // 2; protected prefix tokens stay first; keep_order 1 leaves unmerged tokens in
    position order.
    """
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    count = op.Reshape(op.Constant(value_int=r), one)
    prefix = op.Reshape(op.Constant(value_int=protected), one)
    end = op.Reshape(op.Constant(value_int=tokens), one)
    odd = op.Mod(prefix, two)
    first_a = op.Add(prefix, odd)
    first_b = op.Sub(op.Add(prefix, one), odd)
    positions = op.Range(op.Squeeze(zero, zero), op.Squeeze(end, zero), op.Squeeze(one, zero))
    a_positions = op.Slice(positions, first_a, end, zero, two)
    b_positions = op.Slice(positions, first_b, end, zero, two)
    a_count = op.Shape(a_positions)

    matched = op.Cast(metric, to=1)
    unit = op.LpNormalization(matched, axis=-1, p=2)
    a = op.Slice(unit, first_a, end, one, two)
    b = op.Slice(unit, first_b, end, one, two)
    scores = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    best = op.ReduceMax(scores, op.Constant(value_ints=[-1]), keepdims=1)
    pick = op.Gather(b_positions, op.ArgMax(scores, axis=-1, keepdims=1, select_last_index=0))

    _, ranked = op.TopK(best, a_count, axis=1, largest=1, sorted=1)
    src_rank = op.Slice(ranked, zero, count, one, one)
    unm_rank = op.Slice(ranked, count, end, one, one)
    in_order, _ = op.TopK(unm_rank, op.Sub(a_count, count), axis=1, largest=0, sorted=1)
    ordered = op.Equal(op.Reshape(op.Constant(value_int=keep_order), one), one)
    unm_rank = op.Where(ordered, in_order, unm_rank)
    src, unm = op.Gather(a_positions, src_rank), op.Gather(a_positions, unm_rank)
    dst = op.GatherND(pick, src_rank, batch_dims=1)

    src_size = op.GatherND(token_size, src, batch_dims=1)
    into = op.CastLike(op.Equal(op.Transpose(dst, perm=[0, 2, 1]), op.Unsqueeze(b_positions, one)), token_size)
    b_size = op.Slice(token_size, first_b, end, one, two)
    size = op.Add(b_size, op.MatMul(into, src_size))
    # weights of the mean, not its sum: no number grows, so that x may be of a narrow format
    own = op.CastLike(op.Div(b_size, size), x)
    weights = op.CastLike(op.Div(op.Mul(into, op.Transpose(src_size, perm=[0, 2, 1])), size), x)
    moved = op.MatMul(weights, op.GatherND(x, src, batch_dims=1))
    mean = op.Add(op.Mul(op.Slice(x, first_b, end, one, two), own), moved)

    merged = op.Concat(op.Slice(x, zero, prefix, one, one), op.GatherND(x, unm, batch_dims=1), mean, axis=1)
    merged_size = op.Concat(
        op.Slice(token_size, zero, prefix, one, one), op.GatherND(token_size, unm, batch_dims=1), size, axis=1
    )
    return merged, merged_size, src, dst, unm


class MergeOperator(Operator):
    """`tocom.reduction.MERGE` in a graph."""

    name = "TokenMerge"
    outputs = ("merged", "merged_size", "src", "dst", "unm")

    def function_proto(self, attributes: Mapping[str, int]) -> onnx.FunctionProto:
        """The body above, less the order of unmerged tokens that is not asked for."""
        function = TokenMerge.to_function_proto()
        (choice,) = [node for node in function.node if node.op_type == "Where"]
        _, in_position_order, in_score_order = choice.input
        chosen = in_position_order if attributes["keep_order"] else in_score_order
        choice.op_type = "Identity"
        choice.input[:] = [chosen]
        for node in reversed(function.node):
            read = {name for reader in function.node for name in reader.input}.union(function.output)
            if not read & set(node.output):
                function.node.remove(node)
        return function

    def attributes(self, model: nn.Module) -> dict[str, int]:
        """The prefix, and whether unmerged tokens keep their order."""
        return {"protected": model.num_prefix_tokens, "keep_order": int(model.has_class_token)}

    def decision_counts(self, model: nn.Module, tokens: int, r: int) -> tuple[int, ...]:
        """Merged tokens and their destinations, and the a-tokens that stay."""
        return r, r, len(range(first_positions(model.num_prefix_tokens)[0], tokens, 2)) - r
