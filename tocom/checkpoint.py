"""Building a timm model and loading a fine-tuned checkpoint into it, strictly."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tocom.runtime.checked_json import Json, read
from tocom.runtime.errors import InputError, brief
from tocom.tensorfile import read_tensors
from tocom.vit import require_supported

_CONFIG = "config.json"
_CHECKPOINT_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and where it came from.

    Attributes:
        model: The timm model, float32.
        architecture: Its timm architecture name, without the weights' tag.
        checkpoint_sha256: Hash of the weights' names, shapes and bytes.
        data_config: timm's evaluation settings: input_size, mean, std, interpolation, crop_pct, crop_mode.
        label_names: Class names, where the model folder tells them.
    """

    model: nn.Module
    architecture: str
    checkpoint_sha256: str
    data_config: dict[str, Any]
    label_names: tuple[str, ...] | None = None


def load_model(
    name: str, *, checkpoint: Path | None = None, num_classes: int | None = None, **model_args: Any
) -> LoadedModel:
    """Builds a timm model and loads its weights.

    Args:
        name: A timm model name, or a folder in timm's hub layout (config.json beside model.safetensors).
        checkpoint: Weights file; None takes the folder's, or timm's pretrained weights for a model name.
        num_classes: Classes; None takes the number from the folder or from the checkpoint's classifier.
        **model_args: Further arguments of the timm model, such as img_size=384.

    Returns:
        The model and its origin.

    Raises:
        InputError: If the name is unknown, an argument does not fit, the weights do not fit the model, or the model
            has a part that is not modelled.
    """
    folder = Path(name)
    if (folder / _CONFIG).is_file():
        read(folder / _CONFIG, _require_object)  # before timm reads it
        checkpoint = checkpoint or _checkpoint_in(folder)
        model_name, described = f"local-dir:{folder}", True
    else:
        _require_known(name)
        model_name, described = name, False
    tensors = None if checkpoint is None else read_tensors(checkpoint)[0]
    if num_classes is None and tensors is not None and not described:
        num_classes = _classes_in(tensors)
    if num_classes is not None:
        model_args["num_classes"] = num_classes
    model = _create(model_name, name, pretrained=tensors is None, model_args=model_args)
    require_supported(model)
    if tensors is not None:
        _load_strictly(model, tensors, checkpoint)
    label_names = model.pretrained_cfg.get("label_names")
    label_names = tuple(map(str, label_names)) if isinstance(label_names, list | tuple) and label_names else None
    if label_names and len(label_names) != model.num_classes:
        raise InputError(f"a model needs one name per class, got {len(label_names)} for {model.num_classes} classes "
                         f"in {folder / _CONFIG}.")  # fmt: skip
    data_config = resolve_model_data_config(model)
    data_config["input_size"] = (model.in_chans, *model.patch_embed.img_size)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        architecture=model.pretrained_cfg.get("architecture") or name.split(".", maxsplit=1)[0],
        checkpoint_sha256=hash_tensors(model.state_dict()),
        data_config=data_config,
        label_names=label_names,
    )


def _require_object(value: Any) -> None:
    Json(value, "the file").mapping(lambda _: None)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in name order: the same weights hash alike in any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _require_known(name: str) -> None:
    bare = name.split(".", maxsplit=1)[0]
    if timm.is_model(bare):
        return
    near = difflib.get_close_matches(bare, timm.list_models(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else " `timm.list_models()` lists the names."
    raise InputError(f"a model must be a timm model name or a folder with a config.json, got {name!r}.{hint}")


def _checkpoint_in(folder: Path) -> Path:
    for file_name in _CHECKPOINT_NAMES:
        if (folder / file_name).is_file():
            return folder / file_name
    raise InputError(f"a model folder must hold {' or '.join(_CHECKPOINT_NAMES)}, found none in {folder}.")


def _classes_in(tensors: Mapping[str, Tensor]) -> int | None:
    head = tensors.get("head.weight")
    return head.shape[0] if head is not None and head.ndim == 2 else None


def _create(model_name: str, name: str, *, pretrained: bool, model_args: Mapping[str, Any]) -> nn.Module:
    try:
        with _hub_at_hand() if pretrained else nullcontext():
            return timm.create_model(model_name, pretrained=pretrained, **model_args)
    except Exception as error:  # timm meets names, arguments and config files as they were given
        if pretrained and isinstance(error, OSError | RuntimeError):
            why = "no network, and not in the cache" if isinstance(error, OSError) else brief(error)
            raise InputError(
                f"pretrained weights of {name} cannot be had here ({why}). Give the weights with --checkpoint FILE."
            ) from error
        raise InputError(f"timm cannot build {name} with {dict(model_args)}: {brief(error)}.") from error


@contextmanager
def _hub_at_hand() -> Iterator[None]:
    """Without network, looks into the hub's local cache only, instead of retrying for a minute."""
    offline = constants.HF_HUB_OFFLINE
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # noqa: BLE001 - whichever way the network fails, the cache is what is left
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise InputError(f"checkpoint tensor {name} must have shape {list(expected[name].shape)} for this model, "
                             f"got {list(tensor.shape)} in {file}.")  # fmt: skip
        if name in expected and not tensor.is_floating_point():
            raise InputError(f"checkpoint tensor {name} must hold floating-point numbers, got {tensor.dtype} in "
                             f"{file}: quantized checkpoints are not modelled.")  # fmt: skip
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise InputError(f"a checkpoint must hold exactly the model's weights, {file} {what} ({len(missing)} missing, "
                         f"{len(unknown)} unknown).")  # fmt: skip
    model.load_state_dict(dict(tensors))
