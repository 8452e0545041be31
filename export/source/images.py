"""Images to validate on where the user gives none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def default_images(size: tuple[int, int, int], images: int = 6, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches for when no images are given: noise, and smooth random patterns with flat areas as photographs have.

    Yields:
        A batch of one and a batch of five, for noise and for patterns; float32 [B, 3, H, W].
    """
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, *size, generator=draw)
    coarse = torch.randn(images, size[0], 5, 5, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size[1:], mode="bicubic").clamp(-2, 1)
    for kind in (noise, smooth):
        yield kind[:1].numpy()
        yield kind[1:].contiguous().numpy()
