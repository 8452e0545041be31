"""Reading tensors out of .safetensors and .pth files, refusing everything that is not plain numbers."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tocom.runtime.errors import InputError, brief

_WRAPPERS = ("model", "state_dict")
_DATA_PARALLEL = "module."
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
           OSError, MemoryError, struct.error)  # fmt: skip


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a checkpoint or compensator file.

    A .pth may hold the state dict bare or under `model` or `state_dict`, with or without the `module.` prefix of data
    parallel training. Pickles are loaded with weights_only=True: one that would run code is refused.

    Args:
        file: A .safetensors file, or a torch file of any other name.

    Returns:
        Tensors by name, on the CPU; and the safetensors metadata (empty for a torch file).

    Raises:
        InputError: If the file is missing, empty, truncated, of another format, would run code, or holds anything but
            plain tensors of finite numbers.
    """
    if not file.is_file():
        raise InputError(f"a weights file must exist, got {file}" + (" (a folder)." if file.is_dir() else "."))
    if not file.stat().st_size:
        raise InputError(f"a weights file must not be empty, {file} has 0 bytes.")
    if file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
    else:
        tensors, metadata = _read_torch(file), {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            raise InputError(f"weights must be plain real numbers, tensor {name!r} is sparse, quantized, complex or "
                             f"without values in {file}.")  # fmt: skip
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # expanded from fewer: a file of bytes could ask for terabytes
            raise InputError(f"weights must be stored number by number, tensor {name!r} of shape {list(tensor.shape)} "
                             f"repeats fewer in {file}. Save its contiguous copy.")  # fmt: skip
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"weights must be finite, tensor {name} holds NaN or infinity in {file}.")
    return tensors, metadata


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"a .safetensors file must be whole and valid, got {file}: {brief(error)}.") from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd pickle protocols: what follows from one is told below
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "not an allowed" in str(error):
            raise InputError(f"a checkpoint must hold tensors only, {file} wants to run code when it is loaded. Save "
                             "its state_dict(), best as .safetensors.") from error  # fmt: skip
        raise InputError(f"a .pth file must be one that torch.save wrote, got {file}: {brief(error)}.") from error
    except _DAMAGE as error:
        # what torch.load raises on a damaged file depends on the byte that is damaged
        raise InputError(f"a .pth file must be whole, got {file}: {brief(error)}.") from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"a checkpoint must be a state dict, bare or under {' or '.join(_WRAPPERS)}, got "
                         f"{type(loaded).__name__} in {file}.")  # fmt: skip
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"a state dict must map names to tensors, {name!r} is {type(value).__name__} in {file}.")
    if all(name.startswith(_DATA_PARALLEL) for name in loaded):
        loaded = {name.removeprefix(_DATA_PARALLEL): value for name, value in loaded.items()}
    return dict(loaded)
