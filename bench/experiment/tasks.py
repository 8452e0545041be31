"""The tasks: sheets of 4x4 glyphs on which every token matters.

`ink` is what the backbone and the compensators are trained on. The downstream tasks differ from it in how a sheet looks
(`board`), in what is written on it (`letters`), or in what is asked (`missing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.sheets import CELLS, DIGIT, Handwriting, Sheets, Split, normalize

LETTERS = "AEHKMRSTXZ"
_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
          "DejaVuSerif-Bold", "DejaVuSerif-Italic", "cmr10", "cmss10", "cmtt10", "STIXGeneral")  # fmt: skip
_VARIANTS = {"train": 60, "val": 20, "test": 30}  # drawings of every letter in every typeface


@functools.cache
def _letters(split: Split) -> Handwriting:
    """Drawings of ten letters in twelve typefaces, turned, moved and sized at random; every split has its own."""
    draw = np.random.default_rng({"train": 1, "val": 2, "test": 3}[split])
    folder = Path(get_data_path()) / "fonts" / "ttf"
    glyphs, labels = [], []
    for face in _FACES:
        for label, letter in enumerate(LETTERS):
            for _ in range(_VARIANTS[split]):
                font = ImageFont.truetype(str(folder / f"{face}.ttf"), int(draw.integers(30, 37)))
                canvas = Image.new("L", (4 * DIGIT, 4 * DIGIT))
                at = tuple(2 * DIGIT + draw.uniform(-3, 3, 2))
                ImageDraw.Draw(canvas).text(at, letter, 255, font, anchor="mm")
                canvas = canvas.rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC)
                glyphs.append(np.asarray(canvas.resize((DIGIT, DIGIT), Image.Resampling.BOX), np.float32) / 255)
                labels.append(label)
    pixels = (1.3 * torch.from_numpy(np.stack(glyphs))).clamp(0, 1)
    return Handwriting(pixels, torch.tensor(labels))


class _Letters(Sheets):
    """The most frequent letter instead of the most frequent digit."""

    def __init__(self, split: Split, seed: int) -> None:
        super().__init__(split, "ink", seed, glyphs=_letters(split))


class _Missing(Sheets):
    """Nine of the ten digits are on the sheet: which one is missing?"""

    def _layout(self, size: int) -> tuple[Tensor, Tensor]:
        missing = torch.randint(10, (size, 1), generator=self.draw)
        others = torch.arange(9).expand(size, 9)
        filled = torch.cat([others, torch.randint(9, (size, CELLS - 9), generator=self.draw)], dim=1)
        labels = filled + (filled >= missing)
        order = self._uniform(size, CELLS).argsort(dim=1)
        return labels.gather(1, order), missing[:, 0]


@dataclass(frozen=True)
class Task:
    """A task: ten classes, images of 32x32 pixels."""

    name: str  # as in tables and files
    asks: str  # what it asks, for readers
    open: Callable[[Split, int], Sheets]  # (split, seed) -> an endless stream of sheets

    def sheets(self, split: Split, seed: int, count: int, batch: int = 256) -> tuple[Tensor, Tensor]:
        """Draws sheets: normalized, float32 [count, 3, 32, 32], and their classes [count]."""
        stream = self.open(split, seed)
        drawn = [stream.batch(min(batch, count - start)) for start in range(0, count, batch)]
        return normalize(torch.cat([pixels for pixels, _ in drawn])), torch.cat([classes for _, classes in drawn])


PRETRAINING = Task("ink", "the most frequent digit, white on black", lambda split, seed: Sheets(split, "ink", seed))
DOWNSTREAM = (
    Task("board", "the most frequent digit, coloured chalk on an unevenly lit board",
         lambda split, seed: Sheets(split, "board", seed)),
    Task("letters", "the most frequent of ten letters in twelve typefaces", _Letters),
    Task("missing", "the one digit that is not on the sheet", lambda split, seed: _Missing(split, "ink", seed)),
)  # fmt: skip
TASKS = {task.name: task for task in (PRETRAINING, *DOWNSTREAM)}
