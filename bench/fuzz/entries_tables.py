"""The other files that a compile reads: scales.json, a calibration, and config.json of a model folder."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.fuzz.case import Entry
from bench.fuzz.entries_weights import refusing
from bench.fuzz.given import DEGREE, Given
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_json import STRUCTURE
from bench.fuzz.mutate_tensors import SAFETENSORS
from bench.fuzz.outcome import WRONG, FaultError
from tocom.calib.quantize.calibrate import quantize
from tocom.calib.quantize.calibration_file import read_calibration
from tocom.calib.quantize.network import quantized_model
from tocom.checkpoint import load_model
from tocom.export.family.scales import at_chosen_scales
from tocom.export.source.load import input_spec, made_for
from tocom.vit import ReducedViT, schedule_for


def _whole(name: str) -> Callable[[Given, random.Random], bytes]:
    def whole(given: Given, _: random.Random) -> bytes:
        return (given.folder / name).read_bytes()

    return whole


def _place(name: str) -> Callable[[Given, Path, bytes], None]:
    def place(_: Given, folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)

    return place


def _take_scales(given: Given, folder: Path) -> bool:
    def take() -> bool:
        source = given.source
        found = at_chosen_scales(replace(source, options=replace(source.options, out=folder)))
        if not all(np.isfinite(scale) for scale in found.scales.values()):
            raise FaultError(WRONG, f"scales must be finite, got {dict(found.scales)}")
        found.fused(DEGREE)
        return found.scales[DEGREE] == 0.05

    return refusing(take)


def _use_calibration(given: Given, folder: Path) -> bool:
    def use() -> bool:
        source, model = given.source, given.source.loaded.model
        calibration = read_calibration(folder / "calibration.safetensors", made_for(source), model)
        pixels, schedule = torch.from_numpy(given.pixels), schedule_for(model, DEGREE)
        quantization = quantize(model, schedule, calibration, pixels)
        with torch.inference_mode():
            logits = ReducedViT(quantized_model(model, quantization), schedule)(pixels)
        if not torch.isfinite(logits).all():
            raise FaultError(WRONG, "a calibration was accepted that makes numbers that are not finite")
        return (folder / "calibration.safetensors").read_bytes() == (
            given.folder / "calibration.safetensors"
        ).read_bytes()

    return refusing(use)


def _load_folder(given: Given, folder: Path) -> bool:
    shutil.copy(given.folder / "model.safetensors", folder / "model.safetensors")

    def load() -> bool:
        loaded = load_model(str(folder))
        spec = input_spec(loaded)
        with torch.inference_mode():
            logits = loaded.model(torch.zeros(1, *spec.size))
        if not torch.isfinite(logits).all():
            raise FaultError(WRONG, "a model was accepted whose logits are not finite")
        return spec.to_json()["mean"] == [0.5, 0.4, 0.3]

    return refusing(load)


ENTRIES = (
    Entry("scales.json -> compile", STRUCTURE | BYTES, _whole("scales.json"), _place("scales.json"), _take_scales, 1.5),
    Entry("calibration .safetensors -> quantize", SAFETENSORS, _whole("calibration.safetensors"),
          _place("calibration.safetensors"), _use_calibration, 1.5),
    Entry("config.json -> load_model", STRUCTURE | BYTES, _whole("config.json"), _place("config.json"), _load_folder,
          2),
)  # fmt: skip
