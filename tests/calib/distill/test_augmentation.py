"""Augmentation presets: what each does to an image, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tocom.calib.distill.augmentation import Augmentation, input_spec_of, mixed
from tocom.calib.distill.draws import drawn_for_pair
from tocom.runtime.preprocess import preprocess


@pytest.fixture
def model(make_tiny):
    return make_tiny("vit_tiny_patch16_224", img_size=32)


@pytest.fixture
def photo() -> Image.Image:
    """Dark on the left, bright on the right."""
    ramp = np.linspace(0, 255, 60).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(ramp[None, :, None], (50, 60, 3)).copy())


def views(augmentation: Augmentation, photo: Image.Image, count: int = 40) -> torch.Tensor:
    found = []
    for number in range(count):
        with drawn_for_pair(number, seed=0):
            found.append(augmentation.prepare(photo))
    return torch.stack(found)


def test_none_is_the_evaluation_preprocessing(model, photo):
    augmentation = Augmentation.for_model(model, "none")
    expected = torch.from_numpy(preprocess(photo, input_spec_of(model)))
    assert all(torch.equal(view, expected) for view in views(augmentation, photo, 3))
    assert augmentation.mix is None


def test_the_input_is_the_models_own(model):
    spec = input_spec_of(model)
    assert spec.size == (3, 32, 32)
    assert spec.mean == tuple(model.pretrained_cfg["mean"]) and spec.std == tuple(model.pretrained_cfg["std"])


@pytest.mark.parametrize("preset", ["light", "timm"])
@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_where_they_may_be(model, photo, preset, flip):
    seen = views(Augmentation.for_model(model, preset, flip=flip), photo)
    assert seen.shape == (40, 3, 32, 32) and seen.dtype == torch.float32
    assert len({view.numpy().tobytes() for view in seen}) > 30
    mirrored = (seen[..., :8].mean(dim=(1, 2, 3)) > seen[..., -8:].mean(dim=(1, 2, 3))).float().mean()
    if preset == "light":
        assert (0.25 < mirrored < 0.75) if flip else mirrored == 0
    elif not flip:
        assert mirrored < 0.3  # RandAugment may invert the brightness, which looks the same here


def test_erasing_is_the_timm_presets_only(model, photo):
    light = [views(Augmentation.for_model(model, "light", erasing=share), photo, 5) for share in (0.0, 1.0)]
    assert torch.equal(*light)
    grey = Image.new("RGB", (40, 40), (124, 116, 104))
    plain, erased = (views(Augmentation.for_model(model, "timm", erasing=share), grey, 10) for share in (0.0, 1.0))
    assert (erased.std(dim=(2, 3)).mean(dim=1) > 0.2).all()  # noise fills the part that is erased
    assert plain.std(dim=(2, 3)).median() < 0.05


def test_a_pair_is_mixed_with_itself_only():
    pair = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    kinds = {"mixup": 0, "cutmix": 0}
    for number in range(60):
        with drawn_for_pair(number, seed=0):
            first, second = mixed(pair.clone())
        torch.testing.assert_close(first + second, torch.ones(3, 16, 16), rtol=0, atol=1e-6)
        kinds["cutmix" if set(first.unique().tolist()) <= {0.0, 1.0} else "mixup"] += 1
    assert min(kinds.values()) > 15


def test_no_draw_of_the_timm_preset_fails(model, photo):
    assert views(Augmentation.for_model(model, "timm", erasing=0.5), photo, 1000).isfinite().all()
