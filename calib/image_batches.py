"""Endless batches of prepared images from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.manifest import InputSpec
from runtime.preprocess import find_images, load_image, preprocess


def endless_batches(folder: Path, spec: InputSpec, batch: int, seed: int) -> Iterator[Tensor]:
    """Yields batches in a new random order every epoch, prepared as for evaluation.

    Args:
        folder: Searched recursively.
        spec: How images are prepared.
        batch: Images per batch B; a folder with fewer gives them repeatedly.
        seed: Of the order.

    Returns:
        Normalized images, float32 [B, 3, H, W], without end.

    Raises:
        InputError: If there is no image.
    """
    paths = find_images([folder])

    def stream() -> Iterator[Path]:
        draw = np.random.default_rng(seed)
        while True:
            yield from (paths[index] for index in draw.permutation(len(paths)))

    def batches() -> Iterator[Tensor]:
        images = stream()
        while True:
            yield torch.from_numpy(np.stack([preprocess(load_image(next(images)), spec) for _ in range(batch)]))

    return batches()
