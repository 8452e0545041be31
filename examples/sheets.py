"""Sheets of 16 real handwritten digits, whose class is the digit that occurs most often.

The digits are scikit-learn's bundled set (1,797 scans of 8x8 pixels). A sheet is a 4x4 grid of them, 32x32 pixels: with
a patch size of 4 every digit is four tokens, and every token matters. The scans are split into training, validation
and test before anything else, so that a test sheet holds only handwriting that was never seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

MEAN = STD = (0.5, 0.5, 0.5)
GRID, DIGIT = 4, 8
CELLS = GRID * GRID
OFTEN = torch.tensor([4, 4, 5, 5, 6])  # how often the most frequent digit is written on purpose
Split = Literal["train", "val", "test"]
Rendering = Literal["ink", "board"]


@dataclass(frozen=True)
class Handwriting:
    """The scans of one split: pixels [n, 8, 8] in 0..1 and labels [n]."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    @functools.cache
    def of(cls, split: Split) -> Handwriting:
        """60% of the scans are for training, 15% for validation, 25% for testing; stratified, always the same."""
        data = load_digits()
        rest, test = train_test_split(range(len(data.target)), test_size=0.25, stratify=data.target, random_state=0)
        train, val = train_test_split(rest, test_size=0.2, stratify=data.target[rest], random_state=0)
        index = {"train": train, "val": val, "test": test}[split]
        return cls(torch.tensor(data.images[index] / 16, dtype=torch.float32), torch.tensor(data.target[index]))


class Sheets:
    """An endless, seeded stream of sheets.

    Args:
        split: Whose handwriting.
        rendering: "ink" is white on black, as the scans are; "board" is coloured chalk on a coloured, unevenly lit
            ground.
        seed: Of everything that is drawn.
        glyphs: What is written on them, where it is not the scans of the split.
    """

    def __init__(self, split: Split, rendering: Rendering, seed: int, glyphs: Handwriting | None = None) -> None:
        self.digits = glyphs or Handwriting.of(split)
        self.split = split
        self.rendering = rendering
        self.augment = split == "train"
        self.draw = torch.Generator().manual_seed(seed)
        self.by_class = [torch.nonzero(self.digits.labels == digit).flatten() for digit in range(10)]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draws sheets.

        Returns:
            Pixels, [size, 3, 32, 32] uint8; and their classes, [size].
        """
        labels, classes = self._layout(size)
        scans = self._scans(labels)
        sheets = scans.reshape(size, GRID, GRID, DIGIT, DIGIT).permute(0, 1, 3, 2, 4).reshape(size, 1, 32, 32)
        return self._render(sheets), classes

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.draw)

    def _layout(self, size: int) -> tuple[Tensor, Tensor]:
        """Digits of every cell [size, 16], and the most frequent one of each sheet, which is never tied."""
        kept: list[Tensor] = []
        while sum(len(part) for part in kept) < size:
            labels = torch.randint(10, (2 * size, CELLS), generator=self.draw)
            often = torch.randint(10, (2 * size, 1), generator=self.draw)
            count = OFTEN[torch.randint(len(OFTEN), (2 * size, 1), generator=self.draw)]
            labels = torch.where(torch.arange(CELLS) < count, often, labels)
            tally = torch.nn.functional.one_hot(labels, 10).sum(1).sort(dim=1, descending=True).values
            labels = labels[tally[:, 0] > tally[:, 1]]
            order = self._uniform(len(labels), CELLS).argsort(dim=1)
            kept.append(labels.gather(1, order))
        labels = torch.cat(kept)[:size]
        return labels, torch.nn.functional.one_hot(labels, 10).sum(1).argmax(1)

    def _scans(self, labels: Tensor) -> Tensor:
        """A scan for every cell, [size, 16, 8, 8]; training scans are shifted by up to a pixel and vary in ink."""
        index = torch.empty_like(labels)
        for digit, members in enumerate(self.by_class):
            cells = labels == digit
            index[cells] = members[torch.randint(len(members), (int(cells.sum()),), generator=self.draw)]
        scans = self.digits.pixels[index]
        if self.augment:
            padded = torch.nn.functional.pad(scans, (1, 1, 1, 1))
            windows = padded.unfold(2, DIGIT, 1).unfold(3, DIGIT, 1).flatten(2, 3)
            shift = torch.randint(9, labels.shape, generator=self.draw)
            shift = torch.where(self._uniform(*labels.shape) < 0.5, torch.full_like(shift, 4), shift)
            scans = windows.gather(2, shift[..., None, None, None].expand(-1, -1, 1, DIGIT, DIGIT)).squeeze(2)
            scans = (scans * (0.8 + 0.4 * self._uniform(*labels.shape, 1, 1))).clamp(0, 1)
        return scans

    def _render(self, sheets: Tensor) -> Tensor:
        size = len(sheets)
        noise = torch.randn(size, 1, 32, 32, generator=self.draw) * 0.04
        if self.rendering == "ink":
            pixels = sheets * (0.75 + 0.25 * self._uniform(size, 3, 1, 1)) + noise
        else:
            light = torch.nn.functional.interpolate(self._uniform(size, 1, 3, 3), 32, mode="bilinear")
            board = 0.35 * self._uniform(size, 3, 1, 1) * (0.3 + 0.7 * light)
            chalk = 0.6 + 0.4 * self._uniform(size, 3, 1, 1)
            pixels = board * (1 - sheets) + chalk * sheets + noise
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pixels -> what the network is fed, float32 [B, 3, 32, 32]."""
    return (pixels.float() / 255 - 0.5) / 0.5
