"""Checkpoints and compensators, as .safetensors and .pth."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

from bench.fuzz.case import Entry
from bench.fuzz.commands import judge, require_clear, tocom
from bench.fuzz.given import ARGS, NAME, Given
from bench.fuzz.mutate_tensors import SAFETENSORS, TORCH
from bench.fuzz.outcome import LEFTOVER, WRONG, FaultError, RefusedError
from tocom.checkpoint import hash_tensors, load_model
from tocom.compensator import Compensator
from tocom.runtime.errors import InputError, readable


def refusing(run: Callable[[], bool]) -> bool:
    """Runs something of a room whose errors the command prints as one line.

    Raises:
        RefusedError: It refused, clearly.
    """
    try:
        return run()
    except InputError as error:
        raise RefusedError(require_clear(readable(" ".join(str(error).split())))) from error


def _whole(name: str) -> Callable[[Given, random.Random], bytes]:
    return lambda given, _: (given.folder / name).read_bytes()


def _place(name: str) -> Callable[[Given, Path, bytes], None]:
    def place(_: Given, folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)

    return place


def _load_checkpoint(name: str) -> Callable[[Given, Path], bool]:
    def run(given: Given, folder: Path) -> bool:
        def load() -> bool:
            loaded = load_model(NAME, checkpoint=folder / name, **ARGS)
            state = loaded.model.state_dict()
            if not all(torch.isfinite(each).all() for each in state.values()):
                raise FaultError(WRONG, "weights that are not finite were accepted")
            return hash_tensors(state) == given.source.loaded.checkpoint_sha256

        return refusing(load)

    return run


def _load_compensator(name: str) -> Callable[[Given, Path], bool]:
    def run(given: Given, folder: Path) -> bool:
        def load() -> bool:
            compensator = Compensator.load(folder / name)
            state = compensator.state_dict()
            if not all(torch.isfinite(each).all() for each in state.values()):
                raise FaultError(WRONG, "weights that are not finite were accepted")
            compensator.between(0, min(4, compensator.info.groups)).delta(0, "q")
            same = hash_tensors(state) == given.source.compensator_sha256
            return same and compensator.info == given.source.compensator.info

        return refusing(load)

    return run


def _inspect_compensator(_: Given, folder: Path) -> bool:
    judge(tocom("inspect", folder / "compensator.safetensors"))
    return True


def _compile(given: Given, folder: Path) -> bool:
    """The whole command: what is refused must leave nothing, what is accepted must have passed validation.

    Raises:
        FaultError: It is otherwise.
        RefusedError: It is refused.
    """
    import tocom.export.engine.measure_latency

    tocom.export.engine.measure_latency._SECONDS, tocom.export.engine.measure_latency._ROUNDS = 0.0, 3
    out = folder / "out"
    arguments = [f"--model-arg={name}={value}" for name, value in ARGS.items()]
    try:
        judge(tocom("compile", "--model", NAME, *arguments, "--checkpoint", folder / "model.safetensors", "--degrees",
                    4, "--backend", "onnxruntime", "--out", out), folder)  # fmt: skip
    except RefusedError as refused:
        listed = json.loads((out / "family.json").read_text())["engines"] if (out / "family.json").exists() else []
        if out.exists() and "validation" not in str(refused) and not listed:
            raise FaultError(LEFTOVER, f"refused, but {out.name} was written: {refused}") from refused
        raise
    engines = json.loads((out / "family.json").read_text())["engines"]
    if [each["degree"] for each in engines if each["validation"]["passed"]] != [0, 4]:
        raise FaultError(WRONG, "status 0, but not every engine is listed as passed")
    return (folder / "model.safetensors").read_bytes() == (given.folder / "model.safetensors").read_bytes()


ENTRIES = (
    Entry("checkpoint .safetensors -> load_model", SAFETENSORS, _whole("model.safetensors"),
          _place("model.safetensors"), _load_checkpoint("model.safetensors"), 3),
    Entry("checkpoint .pth -> load_model", TORCH, _whole("model.pth"), _place("model.pth"),
          _load_checkpoint("model.pth"), 2.5),
    Entry("checkpoint .safetensors -> tocom compile", SAFETENSORS, _whole("model.safetensors"),
          _place("model.safetensors"), _compile, 0.1),
    Entry("compensator .safetensors -> Compensator.load", SAFETENSORS, _whole("compensator.safetensors"),
          _place("compensator.safetensors"), _load_compensator("compensator.safetensors"), 1.5),
    Entry("compensator .pth -> Compensator.load", TORCH, _whole("compensator.pth"), _place("compensator.pth"),
          _load_compensator("compensator.pth"), 1),
    Entry("compensator .safetensors -> tocom inspect", SAFETENSORS, _whole("compensator.safetensors"),
          _place("compensator.safetensors"), _inspect_compensator, 1),
)  # fmt: skip
