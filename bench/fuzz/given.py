"""The whole files that are damaged: made once, with every part that a reader may look at, and small."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tocom.export.source.load import Source
    from tocom.export.source.options import CompileOptions

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLASSES = 5
DEGREE = 4
BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Given:
    """Where the whole files lie, and what they hold."""

    folder: Path  # `make` has filled it

    def family(self, backend: str) -> Path:
        """A compiled family."""
        return self.folder / f"family-{backend}"

    def options(self, **changes: Any) -> CompileOptions:
        """What the families were compiled with."""
        from tocom.export.source.options import CompileOptions

        options = CompileOptions(
            model=NAME, out=self.folder / "nowhere", degrees=(DEGREE,), checkpoint=self.folder / "model.safetensors",
            compensator=self.folder / "compensator.safetensors", source_degree=0, model_args=ARGS,
        )  # fmt: skip
        return replace(options, **changes)

    @functools.cached_property
    def source(self) -> Source:
        """The loaded checkpoint and compensator."""
        from tocom.export.source.load import load_source

        return load_source(self.options())

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """Two images as the network takes them."""
        return np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """What the untouched engine makes of them."""
        from tocom.runtime.engines.base import open_engine
        from tocom.runtime.manifest import Family

        folder = self.family("onnxruntime")
        with open_engine(folder / Family.read(folder).entry(DEGREE).engine, "onnxruntime") as runner:
            return runner.infer(self.pixels)


def make(folder: Path) -> Given:
    """Makes the files, unless they are there."""
    if not folder.is_dir():
        making = folder.with_name(f".{folder.name}.{os.getpid()}")
        making.mkdir(parents=True)
        try:
            _fill(Given(making))
            making.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its files stand
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return Given(folder)


def _fill(given: Given) -> None:
    import torch

    torch.set_num_threads(1)
    _photographs(given.folder)
    _weights(given.folder)
    _families(given)
    _tables(given)


def _photographs(folder: Path) -> None:
    draw = np.random.default_rng(0)
    shades = np.linspace(0, 200, 48)[:, None, None] + draw.integers(0, 50, (48, 40, 3))
    image = Image.fromarray(shades.astype(np.uint8))
    for suffix in ("png", "jpg", "bmp", "gif", "webp", "tiff", "ppm"):
        image.save(folder / f"image.{suffix}")


def _weights(folder: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    from tocom.compensator import Compensator, CompensatorInfo

    torch.manual_seed(0)
    state = timm.create_model(NAME, num_classes=CLASSES, **ARGS).state_dict()
    save_file(state, folder / "model.safetensors")
    torch.save({"model": state}, folder / "model.pth")
    compensator = Compensator(CompensatorInfo(width=32, depth=2, backbone=NAME))
    for weight in compensator.parameters():
        weight.data.normal_(0, 0.3)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())
    torch.save(compensator.to_original(), folder / "compensator.pth")


def _families(given: Given) -> None:
    from tocom.export.family.compile import compile_family

    with measured_briefly():
        for backend in BACKENDS:
            compile_family(given.options(out=given.family(backend), backend=backend))


@contextmanager
def measured_briefly() -> Iterator[None]:
    """Compiles inside measure latencies by three calls: nobody looks at how fast anything is."""
    from tocom.export.engine import measure_latency as module

    before = module._SECONDS, module._ROUNDS
    module._SECONDS, module._ROUNDS = 0.0, 3
    try:
        yield
    finally:
        module._SECONDS, module._ROUNDS = before


def _tables(given: Given) -> None:
    """A model folder's config.json, scales.json, and a calibration with everything that one may hold."""
    import json

    import torch

    from tocom.calib.quantize.calibrate import Method, calibrate
    from tocom.calib.quantize.calibration_file import write_calibration
    from tocom.calib.scales_file import ScaleChoice, ScaleChoices, Trial, name_of_set
    from tocom.export.family.scales import _made_for as chosen_for
    from tocom.export.source.load import made_for as quantized_for
    from tocom.vit import ReducedViT

    config = {
        "architecture": NAME, "num_classes": CLASSES, "num_features": 32, "model_args": ARGS,
        "pretrained_cfg": {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9,
                           "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "num_classes": CLASSES,
                           "label_names": [f"class {index}" for index in range(CLASSES)]},
    }  # fmt: skip
    (given.folder / "config.json").write_text(json.dumps(config))
    source, trials = given.source, (Trial(0.05, 0.5, 1.0), Trial(0.1, 0.75, 0.9))
    images, labels = ("0123456789abcdef", "fedcba9876543210"), (0, 1)
    choice = ScaleChoice(0.05, trials, 2, name_of_set(images, labels))
    ScaleChoices(chosen_for(source), {}, {}).with_choice(DEGREE, choice, images).write(given.folder)
    method = Method(smooth=True, reparameterize=True, images=4)
    calibration = calibrate([ReducedViT(source.loaded.model, 0)], torch.from_numpy(given.pixels), method)
    write_calibration(given.folder / "calibration.safetensors", calibration, quantized_for(source))
