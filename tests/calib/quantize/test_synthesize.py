"""Synthesized images: what they are made for gets better, and the entropy is a kernel density estimate's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde
from torch import nn

from tocom.calib.quantize import synthesize as module
from tocom.calib.quantize.synthesize import entropy, objective, roughness, similarities, synthesize
from tocom.runtime.errors import InputError

SIZE = (3, 32, 32)
LOW, HIGH = torch.tensor([-2.0, -1.0, -1.5]), torch.tensor([2.5, 1.0, 1.5])


@pytest.fixture
def model(make_tiny) -> nn.Module:
    return make_tiny("deit_tiny_patch16_224", img_size=32, depth=2)


def make(model, count=4, **options):
    return synthesize(model, count, SIZE, **{"steps": 20, "low": LOW, "high": HIGH, **options})


def test_the_objective_gets_better_in_all_it_is_made_of(model):
    noise, made = make(model, 8, steps=0), make(model, 8)
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:8]
    with torch.no_grad():
        assert bool((objective(model, made, labels) < objective(model, noise, labels) - 0.5).all())
        right = [torch.softmax(model(each), 1)[torch.arange(8), labels] for each in (noise, made)]
    assert bool((right[1] > right[0]).all()) and float(right[1].min()) > 0.5


@pytest.mark.parametrize("part", ["class", "diversity", "roughness"])
def test_every_part_pulls_its_way(model, monkeypatch, part):
    """With one part alone, that part gets better."""
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:4]
    monkeypatch.setattr(module, "_CLASS_WEIGHT", float(part == "class"))
    monkeypatch.setattr(module, "_ROUGHNESS_WEIGHT", float(part == "roughness"))
    if part != "diversity":
        monkeypatch.setattr(module, "diversity", lambda blocks: torch.zeros(len(blocks[0])))

    def value(pixels):
        if part == "roughness":
            return torch.from_numpy(np.abs(np.diff(pixels.numpy(), axis=2)).mean((1, 2, 3)))
        with torch.no_grad():
            if part == "class":
                return -model(pixels).log_softmax(1)[torch.arange(4), labels]
            return -torch.stack([each.mean() for each in entropies(model, pixels)])

    assert bool((value(make(model)) < value(make(model, steps=0))).all())


def test_patches_are_compared_in_every_block_and_nothing_else_is(model, monkeypatch):
    monkeypatch.setattr(module, "_CLASS_WEIGHT", 0.0)
    monkeypatch.setattr(module, "_ROUGHNESS_WEIGHT", 0.0)
    images = make(model, steps=5)
    with torch.no_grad():
        found = objective(model, images, torch.zeros(4, dtype=torch.int64))
        expected = [-float(each.mean()) for each in entropies(model, images)]
    assert found.tolist() == pytest.approx(expected, abs=0.005)


def entropies(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Of every image, that of each block's attention output, by scipy."""
    found: list[torch.Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        for block in model.blocks
    ]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return [
        torch.tensor([by_scipy(cosines_of(block[image, 1:].numpy())) for block in found])
        for image in range(len(pixels))
    ]


def cosines_of(patches: np.ndarray) -> np.ndarray:
    lengths = [math.hypot(*patch) for patch in patches]
    return np.array([
        float(np.dot(patches[i], patches[j])) / (lengths[i] * lengths[j])
        for i in range(len(patches))
        for j in range(i + 1, len(patches))
    ])  # fmt: skip


def by_scipy(cosines: np.ndarray) -> float:
    estimate = gaussian_kde(cosines, bw_method=module._BANDWIDTH / np.std(cosines, ddof=1))
    places = np.linspace(-1.5, 1.5, 1501)
    density = np.maximum(estimate(places), 1e-300)
    return float(-trapezoid(density * np.log(density), places))


def test_the_entropy_is_that_of_a_kernel_density_estimate():
    draw = np.random.default_rng(0)
    kinds = [draw.uniform(-1, 1, 300), 0.4 + 0.02 * draw.standard_normal(300), draw.choice([-0.99, 0.995], 300),
             np.tanh(draw.standard_normal(300))]  # fmt: skip
    found = entropy(torch.from_numpy(np.stack(kinds)))
    assert found.tolist() == pytest.approx([by_scipy(each) for each in kinds], abs=0.015)


def test_the_entropy_has_the_gradient_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    cosines = (1.6 * torch.rand(2, 40, generator=draw, dtype=torch.float64) - 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(cosines).sum(), cosines)
    places = [(0, 3), (0, 17), (1, 0), (1, 39)]
    for place in places:
        step = torch.zeros_like(cosines)
        step[place] = 1e-6
        with torch.no_grad():
            slope = float((entropy(cosines + step) - entropy(cosines - step)).sum()) / 2e-6
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert bool(gradient.any())


def test_similarities_and_roughness_against_loops():
    draw = np.random.default_rng(0)
    patches = draw.standard_normal((2, 5, 7))
    found = similarities(torch.from_numpy(patches)).numpy()
    np.testing.assert_allclose(found, [cosines_of(each) for each in patches], rtol=1e-6)
    pixels = draw.standard_normal((2, 3, 4, 5))
    for image, value in zip(pixels, roughness(torch.from_numpy(pixels)).tolist(), strict=True):
        down = [abs(c[i + 1][j] - c[i][j]) for c in image for i in range(3) for j in range(5)]
        right = [abs(c[i][j + 1] - c[i][j]) for c in image for i in range(4) for j in range(4)]
        assert value == pytest.approx(sum(down) / len(down) + sum(right) / len(right))


def test_pixels_are_what_images_can_hold(model):
    made = make(model, 3)
    assert made.shape == (3, *SIZE) and made.dtype == torch.float32 and not made.requires_grad
    for channel in range(3):
        values = made[:, channel]
        assert LOW[channel] <= values.min() and values.max() <= HIGH[channel]
        assert values.max() == HIGH[channel]  # which is reached, so that the bound was needed
    # the model's own settings, where none are given: mean and std one half
    own = synthesize(model_with_half(model), 2, SIZE, steps=20)
    assert own.min() == -1 and own.max() == 1


def model_with_half(model: nn.Module) -> nn.Module:
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return model


def test_a_seed_decides(model):
    one = make(model, steps=3)
    assert torch.equal(one, make(model, steps=3))
    assert not torch.allclose(one, make(model, steps=3, seed=1), atol=0.1)
    in_parts = make(model, steps=3, batch=3)
    assert torch.allclose(one, in_parts, atol=1e-3)  # an image does not depend on those beside it


def test_steps_are_told_and_the_model_is_left_as_it_was(model):
    told: list[tuple[int, int]] = []
    make(model, 3, batch=2, steps=2, tell=lambda *each: told.append(each))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_named(model):
    with pytest.raises(InputError, match="1 or more, got 0"):
        make(model, 0)
