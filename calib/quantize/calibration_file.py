"""A calibration as a file: made once, used again for the same network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tocom.calib.quantize.calibrate import Calibration, Method
from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.migrations import Migration, require_possible
from tocom.calib.quantize.network import products_of
from tocom.runtime.checked_json import parse
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically
from tocom.tensorfile import read_tensors

_KIND = "tocom calibration 1"
_SMALLEST = 1e-18  # of a scale or a factor: squared, it and its inverse are still numbers of float32


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


def read_calibration(file: Path, made_for: dict[str, str], model: nn.Module) -> Calibration:
    """Reads what was learned.

    Args:
        file: As `write_calibration` wrote it.
        made_for: The network that it is to be used for.
        model: Its float timm model; untouched.

    Raises:
        InputError: If it is no calibration file, one of another network, or holds what cannot be used.
        tocom.runtime.errors.InputError: If it is damaged.
    """
    tensors, metadata = read_tensors(file)
    refusal = InputError(f"{one_line(file)} is not a calibration that `tocom quantize` wrote.")
    parts = {tuple(name.split("/", 1)): tensor for name, tensor in tensors.items()}
    known_parts = all(len(part) == 2 and part[0] in ("scale", "factor", "shift") for part in parts)
    if metadata.get("kind") != _KIND or not known_parts:
        raise refusal
    try:
        method, known = Method(**parse(metadata["method"])), parse(metadata["made_for"])
    except (KeyError, TypeError, ValueError) as error:
        raise refusal from error
    if not isinstance(known, dict) or method.rounding != "nearest" or method.reconstruct:
        raise refusal  # a rounding that looks at the images again is not written
    for name, value in made_for.items():
        if known.get(name) != value:
            raise InputError(f"{one_line(file)} was made for another network: its {name} is "
                             f"{one_line(str(known.get(name))[:20])}, not {value[:20]}. Calibrate again.")  # fmt: skip
    if (wrong := _wrong(parts, model, method)) is not None:
        raise InputError(f"{one_line(file)} cannot be used: {one_line(wrong)}. Calibrate again.")
    scales = {name: float(tensor) for (kind, name), tensor in parts.items() if kind == "scale"}
    migrations = {
        name: Migration(tensor, parts.get(("shift", name)))
        for (kind, name), tensor in parts.items()
        if kind == "factor"
    }
    try:
        require_possible(model, migrations)
    except ValueError as error:
        raise InputError(f"{one_line(file)} cannot be used: {one_line(error)}. Calibrate again.") from error
    return Calibration(method, scales, migrations)


def _wrong(parts: Mapping[tuple[str, ...], Tensor], model: nn.Module, method: Method) -> str | None:
    """What is wrong with the numbers of a file, in words: each must be there once for a product, and usable."""
    products = products_of(model)
    for (kind, name), tensor in parts.items():
        if name not in products:
            return f"the network has no product {name[:80]!r}"
        shape = () if kind == "scale" else (products[name].in_features,)
        if tensor.shape != shape or not tensor.is_floating_point():
            return f"{kind} of {name} must be numbers of shape {list(shape)}, got {list(tensor.shape)}"
        low, high = float(tensor.min()), float(tensor.max())
        if kind != "shift" and (low < _SMALLEST or high > 1 / _SMALLEST):
            return f"{kind} of {name} must lie in {_SMALLEST:g}..{1 / _SMALLEST:g}, got {low:g}..{high:g}"
        if kind == "shift" and ("factor", name) not in parts:
            return f"{name} has a shift, but no factor"
    needed = products if FORMATS[method.format].activation is not None else {}
    missing = [name for name in needed if ("scale", name) not in parts]
    return f"the scale of {missing[0]} is missing" if missing else None
