"""Checkpoints and compensators, as .safetensors and .pth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench.fuzz.case import Entry, entry_of_file
from bench.fuzz.commands import judge, refusing, run_tocom
from bench.fuzz.given import ARGS, NAME, Given, measured_briefly
from bench.fuzz.mutate_tensors import SAFETENSORS, TORCH
from bench.fuzz.outcome import LEFTOVER, WRONG, FaultError, RefusedError
from tocom.checkpoint import hash_tensors, load_model
from tocom.compensator import Compensator


def _require_finite(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not all(torch.isfinite(each).all() for each in state.values()):
        raise FaultError(WRONG, "weights that are not finite were accepted")
    return state


def _load_checkpoint(name: str) -> Callable[[Given, Path], bool]:
    def run(given: Given, folder: Path) -> bool:
        def load() -> bool:
            state = _require_finite(load_model(NAME, checkpoint=folder / name, **ARGS).model.state_dict())
            return hash_tensors(state) == given.source.loaded.checkpoint_sha256

        return refusing(load)

    return run


def _load_compensator(name: str) -> Callable[[Given, Path], bool]:
    def run(given: Given, folder: Path) -> bool:
        def load() -> bool:
            compensator = Compensator.load(folder / name)
            state = _require_finite(compensator.state_dict())
            compensator.between(0, min(4, compensator.info.groups)).delta(0, "q")
            same = hash_tensors(state) == given.source.compensator_sha256
            return same and compensator.info == given.source.compensator.info

        return refusing(load)

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
    return (folder / "model.safetensors").read_bytes() == (given.folder / "model.safetensors").read_bytes()


def _entry(what: str, kind: str, does: str, run: Callable[[Given, Path], bool], weight: float) -> Entry:
    file = {"checkpoint": "model", "compensator": "compensator"}[what] + kind
    kinds = SAFETENSORS if kind == ".safetensors" else TORCH
    return entry_of_file(f"{what} {kind} -> {does}", kinds, file, run, weight)


ENTRIES = (
    _entry("checkpoint", ".safetensors", "load_model", _load_checkpoint("model.safetensors"), 3),
    _entry("checkpoint", ".pth", "load_model", _load_checkpoint("model.pth"), 2.5),
    _entry("checkpoint", ".safetensors", "tocom compile", _compile, 0.1),
    _entry("compensator", ".safetensors", "Compensator.load", _load_compensator("compensator.safetensors"), 1.5),
    _entry("compensator", ".pth", "Compensator.load", _load_compensator("compensator.pth"), 1),
    _entry("compensator", ".safetensors", "tocom inspect", _inspect_compensator, 1),
)
