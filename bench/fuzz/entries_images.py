"""Image files at `tocom.runtime.preprocess`, beside timm's own transform, and at `runtime/infer.py`."""

from __future__ import annotations

import functools
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from bench.fuzz.case import WRONG, Entry, FaultError
from bench.fuzz.commands import judge, refusing, run_infer
from bench.fuzz.entries_family import expected
from bench.fuzz.given import Given
from bench.fuzz.mutate_images import IMAGES, largest
from tocom.runtime.manifest import InputSpec
from tocom.runtime.preprocess import find_images, load_image, preprocess

_SPEC = InputSpec((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9, "center")
_CLOSE = 1e-4
_SUFFIXES = ("png", "jpg", "bmp", "gif", "webp", "tiff", "ppm")


def _whole(given: Given, draw: random.Random) -> bytes:
    return (given.folder / f"image.{draw.choice(_SUFFIXES)}").read_bytes()


def _place(_: Given, folder: Path, content: bytes) -> None:
    (folder / "image.png").write_bytes(content)


@functools.cache
def _transform() -> Any:
    return create_transform((3, 32, 32), is_training=False, mean=_SPEC.mean, std=_SPEC.std, interpolation="bicubic",
                            crop_pct=_SPEC.crop_pct, crop_mode="center")  # fmt: skip


@refusing
def _prepare(given: Given, folder: Path) -> bool:
    (file,) = find_images([folder])
    pixels = preprocess(load_image(file), _SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            theirs = _transform()(opened.convert("RGB"))
    if not isinstance(theirs, torch.Tensor) or not np.allclose(pixels, theirs.numpy(), rtol=0, atol=_CLOSE):
        raise FaultError(WRONG, "the image is prepared otherwise than by timm's transform")
    return np.array_equal(pixels, preprocess(load_image(given.folder / "image.png"), _SPEC))


def _classify(given: Given, folder: Path) -> bool:
    """Beside a good image, whose answer must not suffer."""
    good = shutil.copy(given.folder / "image.png", folder / "good.png")
    family = given.family("onnxruntime")
    answer = run_infer("--engines", family, "--degree", 4, "--json", "--top-k", 99, folder / "image.png", good)
    lines = [json.loads(line) for line in answer.out.splitlines()]
    if not lines or lines[-1]["predictions"] != expected(given.folder, "onnxruntime"):
        raise FaultError(WRONG, "a good image beside a damaged one is not answered as it is alone")
    judge(answer)
    return len(lines) == 2 and lines[0]["predictions"] == lines[1]["predictions"]


ENTRIES = (
    Entry("image -> preprocess", IMAGES, _whole, _place, _prepare, 3),
    Entry("image -> infer", IMAGES, _whole, _place, _classify, 2),
    Entry("largest image -> infer", {"whole": largest}, _whole, _place, _classify, 0.001),
)
