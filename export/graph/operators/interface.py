"""What the operators of the token reductions have in common: how they are called, and what they put out.

Every operator takes (x [B, N, C], token_size [B, N, 1], the reduction's signal) and puts out the tokens and sizes that
remain, then its decisions: positions among the N tokens, int64 [B, count, 1], as a gather of tokens takes them. Bodies
are free of scatters, of ties left to the engine's mood and of anything TensorRT's parser refuses: moving a token is a
gather. N is also an attribute, tokens, so that engines compute once what follows from it alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, nn

from tocom.vit import ReduceStep

DOMAIN, VERSION = "ai.tocom", 1

# Values between the parts of a block, in every graph under the name of `point_name`: the tokens that enter it; behind
# attention and its residual, where something is removed; what that is decided on; the tokens and sizes that remain.
POINTS = ("tokens", "attended", "signal", "remaining", "token_size")


def point_name(block: int, point: str) -> str:
    """Name in a graph of one of `POINTS`; the tokens that leave the last block are those entering the one behind it.

    >>> point_name(3, "tokens")
    'block.3.tokens'
    """
    return f"block.{block}.{point}"


class Operator(ABC):
    """One token reduction in a graph.

    Attributes:
        name: Within `DOMAIN`.
        outputs: Tokens, sizes, then the decisions.
    """

    name: str
    outputs: tuple[str, ...]

    @abstractmethod
    def function_proto(self, attributes: Mapping[str, int]) -> onnx.FunctionProto:
        """The definition, to be added to a model that uses it; all its nodes there have these attributes in common."""

    @abstractmethod
    def attributes(self, model: nn.Module) -> dict[str, int]:
        """The attributes beside r that a timm model determines."""

    @abstractmethod
    def decision_counts(self, model: nn.Module, tokens: int, r: int) -> tuple[int, ...]:
        """How many positions each decision holds per image, where r of `tokens` tokens go."""

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the outputs that are decisions."""
        return self.outputs[2:]

    def decision_names(self, block: int) -> tuple[str, ...]:
        """Names of a block's decisions in every graph: values that a debug copy can make outputs."""
        return tuple(point_name(block, name) for name in self.decisions)

    def symbolic_step(self, model: nn.Module) -> ReduceStep:
        """A reduce step that puts the operator into the exported graph instead of computing."""
        attributes = self.attributes(model)

        def step(_block: int, x: Tensor, token_size: Tensor, signal: Tensor, r: int) -> tuple[Tensor, Tensor]:
            batch, tokens, width = x.shape
            counts = self.decision_counts(model, tokens, r)
            outputs = torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{self.name}",
                [x, token_size, signal],
                {"r": r, "tokens": tokens, **attributes},
                dtypes=[x.dtype, token_size.dtype, *[torch.int64] * len(counts)],
                shapes=[(batch, tokens - r, width), (batch, tokens - r, 1), *[(batch, count, 1) for count in counts]],
                version=VERSION,
            )
            return outputs[0], outputs[1]

        return step
