"""Dropout by counting: whether an activation is kept follows from where it stands, however a batch is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_START = 0x9E3779B9
_FACTOR = 0x45D9F3B  # below 2^27, so that a product with a 32-bit number fits in int64

Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True)
class DropoutKey:
    """What decides the masks of one batch, apart from the place inside it.

    Attributes:
        seed: Of the run.
        step: Training step.
        first_image: Number, within the step's total batch, of the batch's first image.
        rate: Share of activations that are dropped; at least 0, below 1.
    """

    seed: int
    step: int
    first_image: int = 0
    rate: float = 0.1

    def mask(self, hidden: Tensor, block: int, which: str) -> Tensor:
        """The factors of a low-rank activation: 0 where it is dropped, 1 / (1 - rate) where it is kept.

        Each is a hash of (seed, step, image, block, which, token, rank), in integers: the same on every device and for
        every division of the total batch. Two places share a hash by chance once in 2^32.

        Args:
            hidden: The activation, [B, N, G*k]; only its shape, device and type matter.
            block: Block index.
            which: "q" or "v".

        Returns:
            [B, N, G*k], in the type of `hidden`, without gradient.
        """
        batch, tokens, ranks = (torch.arange(size, device=hidden.device) for size in hidden.shape)
        place = _START
        for number in (self.seed & _WORD, self.seed >> 32 & _WORD, self.step, block, "qv".index(which)):
            place = _mixed(place + number & _WORD)
        images = _mixed(place + self.first_image + batch & _WORD)[:, None, None]
        positions = _mixed(images + tokens[:, None] & _WORD)
        kept = _mixed(positions + ranks & _WORD) >= round(self.rate * (_WORD + 1))
        return kept.to(hidden.dtype) / (1 - self.rate)


def _mixed(x: Number) -> Number:
    """Spreads every bit of a 32-bit number over all its bits, one to one."""
    x = (x ^ x >> 16) * _FACTOR & _WORD
    x = (x ^ x >> 16) * _FACTOR & _WORD
    return x ^ x >> 16
