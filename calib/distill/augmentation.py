"""From a decoded image to the network's input while training, in timm's ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_model_data_config
from torch import Tensor, nn

from tocom.runtime.manifest import InputSpec
from tocom.runtime.preprocess import preprocess

PRESETS = ("none", "light", "timm")
_RAND_AUGMENT = "rand-m9-mstd0.5-mmax9-inc1"  # timm's usual one, but at magnitude 10 posterize keeps 0 bits and raises
_MIXUP_ALPHA, _CUTMIX_ALPHA = 0.8, 1.0  # as timm's recipes for ViTs


@dataclass(frozen=True)
class Augmentation:
    """How images are prepared, each by itself and then the two of a pair with each other.

    Attributes:
        prepare: PIL image -> normalized float32 [3, H, W].
        mix: A pair [2, 3, H, W] -> likewise; None leaves it as it is.
    """

    prepare: Callable[[Image.Image], Tensor]
    mix: Callable[[Tensor], Tensor] | None

    @classmethod
    def for_model(cls, model: nn.Module, preset: str, *, flip: bool = True, erasing: float = 0.0) -> Augmentation:
        """The augmentation of a preset, for a timm model's image size and normalization.

        Args:
            model: The timm model.
            preset: "none" prepares as for evaluation; "light" crops, resizes and mirrors at random; "timm" adds
                RandAugment, which brings the colour changes, random erasing, and mixup or cutmix.
            flip: Whether images may be mirrored.
            erasing: Probability of random erasing, with the timm preset.
        """
        spec = input_spec_of(model)
        if preset == "none":
            return cls(partial(_as_for_evaluation, spec=spec), None)
        full = preset == "timm"
        transform = create_transform(
            input_size=spec.size,
            is_training=True,
            hflip=0.5 if flip else 0.0,
            color_jitter=None,
            auto_augment=_RAND_AUGMENT if full else None,
            interpolation="bicubic",
            mean=spec.mean,
            std=spec.std,
            re_prob=erasing if full else 0.0,
            re_mode="pixel",
        )
        return cls(transform, mixed if full else None)


def input_spec_of(model: nn.Module) -> InputSpec:
    """How images are prepared for a timm model: its evaluation settings, at its own image size.

    Raises:
        InputError: If the settings are not such.
    """
    config = {**resolve_model_data_config(model), "size": (model.in_chans, *model.patch_embed.img_size)}
    return InputSpec.from_json(json.loads(json.dumps(config)))


def mixed(pair: Tensor) -> Tensor:
    """Mixup or cutmix of a pair's two images, [2, 3, H, W]; labels are not needed, the teacher sees the same."""
    mixup = Mixup(mixup_alpha=_MIXUP_ALPHA, cutmix_alpha=_CUTMIX_ALPHA, num_classes=1)
    return mixup(pair, torch.zeros(len(pair), dtype=torch.int64))[0]


def _as_for_evaluation(image: Image.Image, spec: InputSpec) -> Tensor:
    return torch.from_numpy(preprocess(image, spec))
