"""A calibration as a file: made once, used again for the same network."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from calib.quantize.calibrate import Calibration, Method
from calib.quantize.migrations import Migration
from runtime.artifacts import write_atomically
from runtime.errors import InputError, one_line
from tocom.tensorfile import read_tensors

_KIND = "tocom calibration 1"


def write_calibration(file: Path, calibration: Calibration, made_for: dict[str, str]) -> None:
    """Writes what was learned.

    Args:
        file: A .safetensors file.
        calibration: Without rows: second-order rounding looks at the images again.
        made_for: What identifies the network, such as the hash of its checkpoint.
    """
    tensors = {f"scale/{name}": torch.tensor(scale) for name, scale in calibration.activations.items()}
    for name, migration in calibration.migrations.items():
        tensors[f"factor/{name}"] = migration.factor.contiguous()
        if migration.shift is not None:
            tensors[f"shift/{name}"] = migration.shift.contiguous()
    metadata = {"kind": _KIND, "method": json.dumps(asdict(calibration.method)), "made_for": json.dumps(made_for)}
    write_atomically(file, save(tensors, metadata))


def read_calibration(file: Path, made_for: dict[str, str]) -> Calibration:
    """Reads what was learned.

    Args:
        file: As `write_calibration` wrote it.
        made_for: The network that it is to be used for.

    Raises:
        InputError: If it is no calibration file, or one of another network.
        tocom.errors.InputError: If it is damaged.
    """
    tensors, metadata = read_tensors(file)
    refusal = InputError(f"{one_line(file)} is not a calibration that `tocom quantize` wrote.")
    parts = {tuple(name.split("/", 1)): tensor for name, tensor in tensors.items()}
    if metadata.get("kind") != _KIND or not {part[0] for part in parts} <= {"scale", "factor", "shift"}:
        raise refusal
    try:
        method, known = Method(**json.loads(metadata["method"])), json.loads(metadata["made_for"])
    except (KeyError, TypeError, ValueError) as error:
        raise refusal from error
    for name, value in made_for.items():
        if known.get(name) != value:
            raise InputError(f"{one_line(file)} was made for another network: its {name} is "
                             f"{one_line(str(known.get(name))[:20])}, not {value[:20]}. Calibrate again.")  # fmt: skip
    scales = {name: float(tensor) for (kind, name), tensor in parts.items() if kind == "scale"}
    migrations = {
        name: Migration(tensor, parts.get(("shift", name)))
        for (kind, name), tensor in parts.items()
        if kind == "factor"
    }
    return Calibration(method, scales, migrations)
