"""Endless batches from a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from calib.image_batches import endless_batches
from runtime.errors import InputError
from runtime.manifest import InputSpec

SPEC = InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
SHADES = (10, 60, 110, 160, 210)


@pytest.fixture
def folder(tmp_path):
    for number, shade in enumerate(SHADES):
        below = tmp_path / "images" / f"class{number % 2}"
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(below / f"{number}.png")
    return tmp_path / "images"


def shades(batches, count) -> list[list[int]]:
    found = [next(batches) for _ in range(count)]
    assert all(batch.dtype == torch.float32 and batch.shape[1:] == (3, 8, 8) for batch in found)
    return [[round(float(image.mean()) * 255) for image in batch] for batch in found]


def test_every_epoch_has_every_image_once_in_another_order(folder):
    epochs = shades(endless_batches(folder, SPEC, batch=5, seed=0), 6)
    assert all(sorted(epoch) == list(SHADES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_run_across_epochs(folder):
    batches = shades(endless_batches(folder, SPEC, batch=3, seed=0), 5)
    assert [len(batch) for batch in batches] == [3] * 5
    together = [shade for batch in batches for shade in batch]
    assert [sorted(together[start : start + 5]) for start in (0, 5, 10)] == [list(SHADES)] * 3


def test_a_folder_with_fewer_images_than_a_batch_repeats_them(folder):
    (batch,) = shades(endless_batches(folder, SPEC, batch=12, seed=0), 1)
    assert len(batch) == 12
    assert set(batch) == set(SHADES)


def test_a_seed_decides_the_order(folder):
    one, same, other = (shades(endless_batches(folder, SPEC, 5, seed), 3) for seed in (1, 1, 2))
    assert one == same != other


def test_a_folder_without_images_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="must hold images"):
        endless_batches(tmp_path, SPEC, 2, 0)
