"""Merging: `merged, merged_size, src, dst, unm = TokenMerge(x, token_size, metric; r, protected, keep_order)`.

A product with a one-hot matrix adds the merged tokens up.
"""

from __future__ import annotations

import onnx
from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset
from torch import nn

from export.operators.interface import DOMAIN, VERSION, Operator
from tocom.merging import first_positions


@script(Opset(DOMAIN, VERSION), default_opset=op)
def TokenMerge(x, token_size, metric, r: int, protected: int, keep_order: int):  # noqa: N802
    """Merges r tokens of every image (ToMe, section 3).

    x [B, N, C], token_size [B, N, 1], metric [B, N, D] -> merged [B, N - r, C], merged_size [B, N - r, 1], and the
    decisions as positions among the N tokens: src [B, r], dst [B, r], unm [B, A - r] (int64). r must not exceed
    (N - protected) // 2; protected prefix tokens stay first; keep_order 1 leaves unmerged tokens in position order.
    """
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    count = op.Reshape(op.Constant(value_int=r), one)
    prefix = op.Reshape(op.Constant(value_int=protected), one)
    odd = op.Mod(prefix, two)
    first_a = op.Add(prefix, odd)
    first_b = op.Sub(op.Add(prefix, one), odd)
    end = op.Constant(value_ints=[9223372036854775807])

    matched = op.Cast(metric, to=1)
    norm = op.ReduceL2(matched, op.Constant(value_ints=[-1]), keepdims=1)
    unit = op.Div(matched, op.Max(norm, op.Constant(value_float=1e-12)))
    a = op.Slice(unit, first_a, end, one, two)
    b = op.Slice(unit, first_b, end, one, two)
    scores = op.MatMul(a, op.Transpose(b, perm=[0, 2, 1]))
    best = op.ReduceMax(scores, op.Constant(value_ints=[-1]), keepdims=0)
    pick = op.ArgMax(scores, axis=-1, keepdims=0, select_last_index=0)

    _, ranked = op.TopK(best, op.Shape(best, start=1, end=2), axis=-1, largest=1, sorted=1)
    src_rank = op.Slice(ranked, zero, count, one, one)
    unm_rank = op.Slice(ranked, count, end, one, one)
    in_order, _ = op.TopK(op.Cast(unm_rank, to=1), op.Shape(unm_rank, start=1, end=2), axis=-1, largest=0, sorted=1)
    ordered = op.Equal(op.Reshape(op.Constant(value_int=keep_order), one), one)
    unm_rank = op.Where(ordered, op.Cast(in_order, to=7), unm_rank)
    slot = op.GatherElements(pick, src_rank, axis=1)

    src = op.Add(op.Mul(src_rank, two), first_a)
    dst = op.Add(op.Mul(slot, two), first_b)
    unm = op.Add(op.Mul(unm_rank, two), first_a)
    src_at = op.Unsqueeze(src, op.Constant(value_ints=[2]))
    unm_at = op.Unsqueeze(unm, op.Constant(value_ints=[2]))

    b_size = op.Slice(token_size, first_b, end, one, two)
    src_size = op.GatherND(token_size, src_at, batch_dims=1)
    slots = op.Range(
        op.Constant(value_int=0), op.Squeeze(op.Shape(b_size, start=1, end=2), zero), op.Constant(value_int=1)
    )
    into = op.CastLike(op.Equal(op.Unsqueeze(slots, one), op.Unsqueeze(slot, one)), x)
    size = op.Add(b_size, op.MatMul(into, src_size))
    moved = op.MatMul(into, op.Mul(op.GatherND(x, src_at, batch_dims=1), src_size))
    mean = op.Div(op.Add(op.Mul(op.Slice(x, first_b, end, one, two), b_size), moved), size)

    merged = op.Concat(op.Slice(x, zero, prefix, one, one), op.GatherND(x, unm_at, batch_dims=1), mean, axis=1)
    merged_size = op.Concat(
        op.Slice(token_size, zero, prefix, one, one), op.GatherND(token_size, unm_at, batch_dims=1), size, axis=1
    )
    return merged, merged_size, src, dst, unm


class MergeOperator(Operator):
    """`tocom.reduction.MERGE` in a graph."""

    name = "TokenMerge"
    outputs = ("merged", "merged_size", "src", "dst", "unm")

    def function_proto(self) -> onnx.FunctionProto:
        """The body above."""
        return TokenMerge.to_function_proto()

    def attributes(self, model: nn.Module) -> dict[str, int]:
        """The prefix, and whether unmerged tokens keep their order."""
        return {"protected": model.num_prefix_tokens, "keep_order": int(model.has_class_token)}

    def decision_counts(self, model: nn.Module, tokens: int, r: int) -> tuple[int, ...]:
        """Merged tokens and their destinations, and the a-tokens that stay."""
        return r, r, len(range(first_positions(model.num_prefix_tokens)[0], tokens, 2)) - r
