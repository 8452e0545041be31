"""The PyTorch reference: in any number format, with an engine's decisions forced on it, and as an observer itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tocom.export.graph.operators import point_name
from tocom.export.proof.decisions import AnyDecision
from tocom.export.proof.observe import Observed, Observer
from tocom.export.proof.side import FORMATS
from tocom.vit import ReducedViT

DTYPES = dict(zip(FORMATS, (torch.float64, torch.float32, torch.bfloat16, torch.float16), strict=True))
EXACT = "fp64"


def in_format(reference: ReducedViT, precision: str) -> ReducedViT:
    """The reference in one of `DTYPES`: itself where it is in that format, else a copy."""
    dtype = DTYPES[precision]
    if next(reference.model.parameters()).dtype == dtype:
        return reference
    model = copy.deepcopy(reference.model).to(dtype)
    return ReducedViT(model.eval(), reference.schedule, reduction=reference.reduction)


@dataclass(frozen=True)
class Replay:
    """What the reference computes with decisions forced on it.

    Attributes:
        logits: [B, classes].
        natural: Block -> what it would have decided itself.
        signals: Block -> what it decided on.
        values: See `Observed`.
    """

    logits: Tensor
    natural: Mapping[int, AnyDecision]
    signals: Mapping[int, Tensor]
    values: Mapping[str, Tensor]


@torch.no_grad()
def replay(
    reference: ReducedViT, pixel_values: Tensor, decisions: Mapping[int, AnyDecision], shake: float = 0.0
) -> Replay:
    """Runs the reference with given decisions forced on it; it decides itself where none are given.

    Args:
        reference: In any number format, on any device.
        pixel_values: [B, 3, H, W], in any format.
        decisions: Block -> what is decided there.
        shake: Every number of the tokens behind every part changes by up to this share, at random but the same each
            time: what roundings of that size do to the network at hand.

    Returns:
        What it computed.
    """
    draw = torch.Generator().manual_seed(0)

    def shaken(x: Tensor) -> Tensor:
        if not shake:
            return x
        noise = torch.rand(x.shape, generator=draw, dtype=torch.float32).to(x.device, x.dtype)
        return x * (1 + shake * (2 * noise - 1))

    parameter = next(reference.model.parameters())
    natural: dict[int, AnyDecision] = {}
    signals: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    x, token_size = shaken(reference.embed(pixel_values.to(parameter.device, parameter.dtype))), None
    for block, r in enumerate(reference.schedule.removed):
        values[point_name(block, "tokens")] = x
        x, signal = reference.attend(block, x, token_size)
        x = shaken(x)
        if r:
            values[point_name(block, "attended")], values[point_name(block, "signal")] = x, signal
            natural[block], signals[block] = reference.reduction.decide(signal, r, reference.model), signal
            token_size = x.new_ones(*x.shape[:2], 1) if token_size is None else token_size
            chosen = decisions.get(block, natural[block])
            x, token_size = reference.reduction.apply(x, token_size, signal, chosen)
            values[point_name(block, "token_size")] = token_size
        values[point_name(block, "remaining")] = x
        x = shaken(reference.feed_forward(block, x))
    values[point_name(len(reference.model.blocks), "tokens")] = x
    return Replay(reference.classify(x, token_size), natural, signals, values)


class TorchObserver(Observer):
    """The PyTorch reference in a number format, deciding by itself.

    Args:
        reference: In any format; untouched.
        precision: One of `DTYPES`.
    """

    def __init__(self, reference: ReducedViT, precision: str) -> None:
        self.precision, self.name = precision, f"torch {precision}"
        self._reference = in_format(reference, precision)

    def observe(self, pixel_values: np.ndarray) -> Observed:
        """See `Observer`."""
        free = replay(self._reference, torch.from_numpy(pixel_values), {})
        decisions = {block: free.natural[block] for block in self._reference.deciding_blocks}
        values, last = dict(free.values), len(self._reference.model.blocks) - 1
        if (read := self._reference.read_tokens) is not None:  # nobody reads what else the last block puts out
            for name in (point_name(last, "remaining"), point_name(last + 1, "tokens")):
                values[name] = values[name][:, :read]
        return Observed(free.logits, decisions, values)
