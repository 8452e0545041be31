"""Faults as they happen in exports, planted in one block: in a plain export's PyTorch code, and alike in our graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from bench.plain_tome import PlainToMe
from tocom.export.graph.operators import DOMAIN, point_name
from tocom.merging import Matching, cosine_scores, first_positions, merge
from tocom.vit import ReducedViT

Edit = Callable[[onnx.ModelProto, int], None]
"""(float32 graph, block): alters it."""


@dataclass(frozen=True)
class Fault:
    """What is wrong in one block.

    Attributes:
        title: For people.
        block: Where.
        part: Which part of the block, one of `tocom.export.proof.parts.PARTS`.
        module: Alters the block of the model, which both sides are then exported from; None where code is wrong.
        network: The plain export's network, whose attention is at fault or not.
        plain: Its merging, likewise.
        edit: The same in our graph; None where a module is altered.
    """

    title: str
    block: int
    part: str
    module: Callable[[nn.Module], None] | None = None
    network: type[ReducedViT] = ReducedViT
    plain: type[PlainToMe] = PlainToMe
    edit: Edit | None = None

    def model(self, healthy: nn.Module) -> nn.Module:
        """A copy of a model with the fault, or the model itself where that is in the code."""
        if self.module is None:
            return healthy
        model = copy.deepcopy(healthy)
        self.module(model.blocks[self.block])
        return model

    def plain_module(self, healthy: nn.Module, degree: int) -> nn.Module:
        """What is exported as a user would."""
        network = self.network(self.model(healthy), degree)
        network.faulty_block = self.block
        return self.plain(network).eval()


def without_gelu_tail(block: nn.Module) -> None:
    """The approximation by tanh in place of the error function."""
    block.mlp.act = nn.GELU(approximate="tanh")


def with_scaled_values(factor: float) -> Callable[[nn.Module], None]:
    """The values of a block times a number, as by a wrong dequantization scale or gate."""

    def scale(block: nn.Module) -> None:
        qkv = block.attn.qkv
        width = qkv.out_features // 3
        qkv.weight.data[2 * width :] *= factor
        qkv.bias.data[2 * width :] *= factor

    return scale


def with_epsilon(epsilon: float) -> Callable[[nn.Module], None]:
    """Another epsilon in the first LayerNorm."""

    def change(block: nn.Module) -> None:
        block.norm1.eps = epsilon

    return change


def with_scale_of_three_digits(block: nn.Module) -> None:
    """1 / sqrt(D) written down as a rounded number."""
    block.attn.scale = float(f"{block.attn.scale:.3f}")


class _Sizeless(ReducedViT):
    """Attention of one block is not proportional."""

    def attend(
        self, index: int, x: Tensor, token_size: Tensor | None, *others: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """See `ReducedViT`; without sizes."""
        return super().attend(index, x, None if index == self.faulty_block else token_size, *others, **named)


class _FaultyStep(PlainToMe):
    """Merges wrongly in one block."""

    def _step(self, block: int, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        if block != self.reference.faulty_block:
            return super()._step(block, x, token_size, metric, r)
        return self._wrong_step(x, token_size, metric, r)

    def _right_step(self, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return super()._step(0, x, token_size, metric, r)


class _PlainMean(_FaultyStep):
    """The mean of tokens, whatever each stands for; sizes are added up rightly."""

    def _wrong_step(self, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        merged, _ = self._right_step(x, torch.ones_like(token_size), metric, r)
        _, sizes = self._right_step(x, token_size, metric, r)
        return merged, sizes


class _MatchedOnTokens(_FaultyStep):
    """Tokens are matched on themselves instead of on their keys."""

    def _wrong_step(self, x: Tensor, token_size: Tensor, _metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return self._right_step(x, token_size, x, r)


class _LastButOne(_FaultyStep):
    """What should merge into the last b-token merges into the one before: an index that is limited one too low."""

    pairs = slice(None)  # ranks of merged pairs that this happens to

    def _wrong_step(self, x: Tensor, token_size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
        protected = self.reference.model.num_prefix_tokens
        first_a, first_b = first_positions(protected)
        best, pick = cosine_scores(metric, protected).max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True)
        src, unm = ranked[:, :r], ranked[:, r:].sort(dim=-1).values
        dst = first_b + 2 * pick.gather(-1, src)
        dst = dst.minimum(torch.tensor(_limits(x.shape[1], protected, r, self.pairs)))
        return merge(x, token_size, Matching(first_a + 2 * src, dst, first_a + 2 * unm, protected))


class _LastPair(_LastButOne):
    """Likewise, for the pair that is merged last."""

    pairs = slice(-1, None)


class _FirstPair(_LastButOne):
    """Likewise, for the pair that is most alike."""

    pairs = slice(1)


def _limits(tokens: int, protected: int, r: int, pairs: slice) -> list[int]:
    """Last b-token that each of the r pairs, in order of rank, may merge into."""
    b_tokens = range(first_positions(protected)[1], tokens, 2)
    limits = [b_tokens[-1]] * r
    limits[pairs] = [b_tokens[-2]] * len(limits[pairs])
    return limits


def merge_of(graph: onnx.ModelProto, block: int) -> onnx.NodeProto:
    """The merge of a block in our graph."""
    return next(node for node in graph.graph.node if node.name == f"block.{block}.merge")


def _forget_sizes(graph: onnx.ModelProto, block: int) -> None:
    (log,) = [node for node in graph.graph.node
              if node.op_type == "Log" and node.input[0] == point_name(block - 1, "token_size")]  # fmt: skip
    log.op_type = "Sub"
    log.input.append(log.input[0])


def _average_plainly(graph: onnx.ModelProto, block: int) -> None:
    """A second merge with sizes of one, whose tokens are read in place of the right one's."""
    node = merge_of(graph, block)
    index = list(graph.graph.node).index(node)
    ones = helper.make_node("Div", [node.input[1], node.input[1]], ["fault.ones"])
    wrong = copy.deepcopy(node)
    wrong.name = "fault.merge"
    wrong.input[1] = "fault.ones"
    wrong.output[:] = [node.output[0], *(f"fault.{name}" for name in node.output[1:])]
    node.output[0] = "fault.merged"
    graph.graph.node.insert(index, wrong)
    graph.graph.node.insert(index, ones)


def _match_on_tokens(graph: onnx.ModelProto, block: int) -> None:
    node = merge_of(graph, block)
    node.input[2] = node.input[0]


def _limit_destinations(graph: onnx.ModelProto, block: int, pairs: slice = slice(None)) -> None:
    """A copy of the operator's body for this block alone, whose destinations end one too early."""
    node = merge_of(graph, block)
    (right,) = [function for function in graph.functions if function.domain == DOMAIN]
    wrong = copy.deepcopy(right)
    wrong.name = node.op_type = "LimitedTokenMerge"
    known = {each.name: each.i for each in node.attribute}
    gather = next(each for each in wrong.node if "dst" in each.output)
    index = list(wrong.node).index(gather) + 1
    gather.output[0] = "unlimited"
    limits = _limits(known["tokens"], known["protected"], known["r"], pairs)
    for each in reversed((
        helper.make_node("Constant", [], ["limits"], value_ints=limits),
        helper.make_node("Unsqueeze", ["limits", "one"], ["limit"]),
        helper.make_node("Min", ["unlimited", "limit"], ["dst"]),
    )):  # fmt: skip
        wrong.node.insert(index, each)
    graph.functions.append(wrong)


def _limit_last_pair(graph: onnx.ModelProto, block: int) -> None:
    _limit_destinations(graph, block, _LastPair.pairs)


def _limit_first_pair(graph: onnx.ModelProto, block: int) -> None:
    _limit_destinations(graph, block, _FirstPair.pairs)


FAULTS = {
    "no log-size": Fault("log-size missing in block 5", 5, "attention", network=_Sizeless, edit=_forget_sizes),
    "plain mean": Fault("plain mean in block 1", 1, "reduction", plain=_PlainMean, edit=_average_plainly),
    "v 1.01": Fault("v times 1.01 in block 2", 2, "attention", module=with_scaled_values(1.01)),
    "v 1.1": Fault("v times 1.1 in block 4", 4, "attention", module=with_scaled_values(1.1)),
    "scale": Fault("1/sqrt(D) of three digits in block 3", 3, "attention", module=with_scale_of_three_digits),
    "epsilon": Fault("LayerNorm epsilon 1e-5, not 1e-6, in block 1", 1, "attention", module=with_epsilon(1e-5)),
    "tanh": Fault("GELU by tanh in block 2", 2, "mlp", module=without_gelu_tail),
    "last b-token": Fault("destinations limited one too low in block 4", 4, "decision", plain=_LastButOne,
                          edit=_limit_destinations),
    "last pair": Fault("one destination off by one in block 0, 4% of images", 0, "decision", plain=_LastPair,
                       edit=_limit_last_pair),
    "first pair": Fault("one destination off by one in block 3, 1% of images", 3, "decision", plain=_FirstPair,
                        edit=_limit_first_pair),
    "on tokens": Fault("matched on tokens, not keys, in block 3", 3, "decision", plain=_MatchedOnTokens,
                       edit=_match_on_tokens),
}  # fmt: skip
