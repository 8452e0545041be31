"""Single files that a compile reads: checkpoints, compensators, scales, calibrations, and a model folder's config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.fuzz.case import LEFTOVER, WRONG, FaultError, RefusedError, entry_of_file
from bench.fuzz.commands import judge, refusing, run_tocom
from bench.fuzz.given import ARGS, DEGREE, NAME, Given, measured_briefly
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_json import STRUCTURE
from bench.fuzz.mutate_tensors import SAFETENSORS, TORCH
from tocom.calib.quantize.calibrate import quantize
from tocom.calib.quantize.calibration_file import read_calibration
from tocom.calib.quantize.network import quantized_model
from tocom.checkpoint import hash_tensors, load_model
from tocom.compensator import Compensator
from tocom.export.family.scales import at_chosen_scales
from tocom.export.source.load import input_spec, made_for
from tocom.vit import ReducedViT, schedule_for

Run = Callable[[Given, Path], bool]


def _require_finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not all(torch.isfinite(each).all() for each in tensors.values()):
        raise FaultError(WRONG, f"numbers that are not finite were accepted, or made: {', '.join(tensors):.80}")
    return tensors


def _load_checkpoint(name: str) -> Run:
    @refusing
    def run(given: Given, folder: Path) -> bool:
        state = _require_finite(load_model(NAME, checkpoint=folder / name, **ARGS).model.state_dict())
        return hash_tensors(state) == given.source.loaded.checkpoint_sha256

    return run


def _load_compensator(name: str) -> Run:
    @refusing
    def run(given: Given, folder: Path) -> bool:
        compensator = Compensator.load(folder / name)
        state = _require_finite(compensator.state_dict())
        compensator.between(0, min(4, compensator.info.groups)).delta(0, "q")
        same = hash_tensors(state) == given.source.compensator_sha256
        return same and compensator.info == given.source.compensator.info

    return run


def _inspect_compensator(_: Given, folder: Path) -> bool:
    judge(run_tocom("inspect", folder / "compensator.safetensors"))
    return True


def _compile(given: Given, folder: Path) -> bool:
    """The whole command: what is refused must leave nothing, what is accepted must have passed validation."""
    out = folder / "out"
    arguments = [f"--model-arg={name}={value}" for name, value in ARGS.items()]
    try:
        with measured_briefly():
            judge(run_tocom("compile", "--model", NAME, *arguments, "--checkpoint", folder / "model.safetensors",
                            "--degrees", 4, "--backend", "onnxruntime", "--out", out), folder)  # fmt: skip
    except RefusedError as refused:
        listed = json.loads((out / "family.json").read_text())["engines"] if (out / "family.json").exists() else []
        if out.exists() and "validation" not in str(refused) and not listed:
            raise FaultError(LEFTOVER, f"refused, but {out.name} was written: {refused}") from refused
        raise
    engines = json.loads((out / "family.json").read_text())["engines"]
    if [each["degree"] for each in engines if each["validation"]["passed"]] != [0, 4]:
        raise FaultError(WRONG, "status 0, but not every engine is listed as passed")
    return _is_whole(given, folder, "model.safetensors")


def _is_whole(given: Given, folder: Path, name: str) -> bool:
    return (folder / name).read_bytes() == (given.folder / name).read_bytes()


@refusing
def _take_scales(given: Given, folder: Path) -> bool:
    source = given.source
    found = at_chosen_scales(replace(source, options=replace(source.options, out=folder)))
    if not all(np.isfinite(scale) for scale in found.scales.values()):
        raise FaultError(WRONG, f"scales must be finite, got {dict(found.scales)}")
    found.fused(DEGREE)
    return found.scales[DEGREE] == 0.05


@refusing
def _use_calibration(given: Given, folder: Path) -> bool:
    source, model = given.source, given.source.loaded.model
    calibration = read_calibration(folder / "calibration.safetensors", made_for(source), model)
    pixels, schedule = torch.from_numpy(given.pixels), schedule_for(model, DEGREE)
    quantization = quantize(model, schedule, calibration, pixels)
    with torch.inference_mode():
        _require_finite({"logits": ReducedViT(quantized_model(model, quantization), schedule)(pixels)})
    return _is_whole(given, folder, "calibration.safetensors")


@refusing
def _load_folder(given: Given, folder: Path) -> bool:
    shutil.copy(given.folder / "model.safetensors", folder / "model.safetensors")
    loaded = load_model(str(folder))
    spec = input_spec(loaded)
    with torch.inference_mode():
        _require_finite({"logits": loaded.model(torch.zeros(1, *spec.size))})
    return spec.to_json()["mean"] == [0.5, 0.4, 0.3]


ENTRIES = (
    entry_of_file("checkpoint .safetensors -> load_model", SAFETENSORS, "model.safetensors",
                  _load_checkpoint("model.safetensors"), 3),
    entry_of_file("checkpoint .pth -> load_model", TORCH, "model.pth", _load_checkpoint("model.pth"), 2.5),
    entry_of_file("checkpoint .safetensors -> tocom compile", SAFETENSORS, "model.safetensors", _compile, 0.1),
    entry_of_file("compensator .safetensors -> Compensator.load", SAFETENSORS, "compensator.safetensors",
                  _load_compensator("compensator.safetensors"), 1.5),
    entry_of_file("compensator .pth -> Compensator.load", TORCH, "compensator.pth",
                  _load_compensator("compensator.pth"), 1),
    entry_of_file("compensator .safetensors -> tocom inspect", SAFETENSORS, "compensator.safetensors",
                  _inspect_compensator, 1),
    entry_of_file("scales.json -> compile", STRUCTURE | BYTES, "scales.json", _take_scales, 1.5),
    entry_of_file("calibration .safetensors -> quantize", SAFETENSORS, "calibration.safetensors", _use_calibration,
                  1.5),
    entry_of_file("config.json -> load_model", STRUCTURE | BYTES, "config.json", _load_folder, 2),
)  # fmt: skip
