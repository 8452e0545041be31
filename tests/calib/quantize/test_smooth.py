"""Searched smoothing and widening: the best of what was tried, and what widening must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from torch import Tensor, nn

from tocom.calib.quantize.grids import FORMATS, INT8, Format, Grid
from tocom.calib.quantize.migrations import Migration, migrate, readers_of
from tocom.calib.quantize.network import (
    Observation,
    Quantization,
    observe,
    products_of,
    quantized_model,
    round_to_nearest,
)
from tocom.calib.quantize.ranges import scale_of
from tocom.calib.quantize.smooth import ALPHAS, product_error, smooth, widen, widening_limit
from tocom.vit import ReducedViT

W8A8, W4 = FORMATS["int8"], FORMATS["int4-weights"]
W4A8 = Format("w4a8", Grid("INT4", -7, 7), INT8)
FC1, PROJ, QKV = "blocks.0.mlp.fc1", "blocks.0.attn.proj", "blocks.0.attn.qkv"


def seen_in(model: nn.Module, noise: Callable) -> dict[str, Observation]:
    pixels = torch.from_numpy(noise(4, *model.patch_embed.img_size))
    return observe([ReducedViT(model, 4)], lambda network: products_of(network.model), pixels)


def with_outliers(model: nn.Module) -> nn.Module:
    """Two channels of every norm as in trained ViTs: an order of magnitude larger than the others."""
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight[[3, 20]] *= 25
    return model


@pytest.fixture(scope="module")
def model(make_tiny: Callable) -> nn.Module:
    return with_outliers(make_tiny("deit_tiny_distilled_patch16_224", img_size=32))


@pytest.fixture(scope="module")
def seen(model: nn.Module, noise: Callable) -> dict[str, Observation]:
    return seen_in(model, noise)


def apply(model: nn.Module, seen: dict, changes: dict[str, Migration]) -> dict[str, Observation]:
    """Changes a model in place and tells what will be seen in it."""
    migrate(model, changes)
    return seen | {name: seen[name].changed(change.factor) for name, change in changes.items()}


def logit_error(model: nn.Module, seen: dict[str, Observation], format: Format, noise: Callable) -> float:
    """Of the whole network, quantized, on other images."""
    weights = {name: round_to_nearest(product.weight, format.weight) for name, product in products_of(model).items()}
    activations = {name: scale_of(each, format.activation, "minmax") for name, each in seen.items()}
    quantization = Quantization(format, model.state_dict(), activations, weights)
    pixels = torch.from_numpy(noise(8, *model.patch_embed.img_size, seed=9))
    return float((quantized_model(model, quantization)(pixels) - model(pixels)).square().mean())


def naive_error(weight: np.ndarray, rows: np.ndarray, largest: float, factor: np.ndarray, levels: int) -> float:
    """The quantized product's error, number by number: symmetric grids, scales rounded up to float16."""

    def up(scale: float) -> float:
        near = np.float16(scale)
        return float(near if float(near) >= scale else np.nextafter(near, np.float16(np.inf)))

    scale = up(largest / 127)
    errors = []
    for w in weight:
        step = up(float(np.abs(w * factor).max()) / levels)
        rounded = [round(float(value)) * step for value in w * factor / step]
        for x in rows:
            exact = sum(float(a) * float(b) for a, b in zip(x, w, strict=True))
            inputs = [min(max(round(float(value)), -128), 127) * scale for value in x / factor / scale]
            errors.append((sum(a * b for a, b in zip(inputs, rounded, strict=True)) - exact) ** 2)
    return float(np.mean(errors))


@pytest.mark.parametrize(("format", "levels"), [(W8A8, 127), (W4A8, 7)])
def test_the_best_alpha_is_taken(format: Format, levels: int, model: nn.Module, seen: dict) -> None:
    weight = model.get_submodule(FC1).weight[:12].clone()
    product = nn.Linear(48, 12).requires_grad_(False)
    product.weight.copy_(weight)
    rows = seen[FC1].rows[:20]
    observed = Observation(rows, rows.amin(dim=0), rows.amax(dim=0))
    whole = nn.Module()
    whole.blocks = nn.ModuleList([nn.Module()])
    whole.blocks[0].attn, whole.blocks[0].mlp = nn.Module(), nn.Module()
    whole.blocks[0].norm1, whole.blocks[0].norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
    whole.blocks[0].attn.norm, whole.blocks[0].mlp.norm = nn.Identity(), nn.Identity()
    whole.blocks[0].mlp.fc1 = product
    found = smooth(whole, {FC1: observed}, format)[FC1].factor.double().numpy()

    w, x = weight.double().numpy(), rows.double().numpy()
    tried = [np.ones(48)]
    for alpha in ALPHAS:
        factor = np.array([max(abs(x[:, j])) ** alpha / max(abs(w[:, j])) ** (1 - alpha) for j in range(48)])
        tried.append(factor / np.exp(np.mean(np.log(factor))))
    errors = [naive_error(w, x, max(np.abs(x).max(axis=0) / each), each, levels) for each in tried]
    np.testing.assert_allclose(found, tried[int(np.argmin(errors))], rtol=1e-4)
    assert np.argmin(errors) > 0 and sorted(errors)[1] > 1.001 * min(errors)  # neither nothing nor a tie
    of_all = [product_error(weight, observed, torch.from_numpy(each).float(), format) for each in tried]
    np.testing.assert_allclose(of_all, errors, rtol=0.005)


def test_where_all_channels_are_alike_nothing_is_changed(model: nn.Module, copy_of: Callable) -> None:
    model = copy_of(model)
    signs = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).sign()
    alike = Observation(signs, -torch.ones(48), torch.ones(48))
    for name in (QKV, PROJ, FC1):
        weight = model.get_submodule(name).weight
        weight.copy_(weight.sign() * 0.3)
    seen = {name: alike for names in readers_of(model).values() for name in names}
    for find in (smooth, widen):
        assert not {QKV, PROJ, FC1} & find(model, seen, W8A8).keys()


@pytest.mark.parametrize("find", [smooth, widen])
def test_changes_make_the_quantized_network_better_and_leave_the_float_one(
    find: Callable, model: nn.Module, seen: dict, noise: Callable, copy_of: Callable
) -> None:
    changed = copy_of(model)
    changed_seen = apply(changed, seen, find(model, seen, W8A8))
    pixels = torch.from_numpy(noise(2, 32, 32))
    torch.testing.assert_close(changed.double()(pixels.double()), model(pixels).double(), rtol=1e-4, atol=1e-4)
    before = logit_error(model, seen, W8A8, noise)
    assert logit_error(changed.float(), changed_seen, W8A8, noise) < (0.35 if find is smooth else 0.95) * before


@pytest.mark.parametrize("family", ["gated", "reg4_dinov2_swiglu", "normed"])
@pytest.mark.parametrize("find", [smooth, widen])
def test_every_family_can_be_changed(find: Callable, family: str, make_vit: Callable, noise: Callable) -> None:
    model = with_outliers(make_vit(family))
    changes = find(model, seen_in(model, noise), W4A8)
    pixels = torch.from_numpy(noise(1, *model.patch_embed.img_size)).double()
    before = model.double()(pixels)
    assert changes
    migrate(model, changes)
    torch.testing.assert_close(model(pixels), before, rtol=1e-9, atol=1e-9)
    for names in readers_of(model).values():
        assert len({id(changes.get(name)) for name in names}) == 1


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_the_range_method_decides_the_input_scale(method: str, model: nn.Module, seen: dict) -> None:
    weight, observed, factor = model.get_submodule(FC1).weight, seen[FC1], torch.ones(48)
    scale = scale_of(observed, INT8, method)
    rounded = (observed.rows / scale).round().clamp(-128, 127) * scale
    exact = observed.rows @ weight.T
    error = (rounded @ round_to_nearest(weight, INT8).values.T - exact).square().mean()
    int8 = Format("int8", INT8, INT8)
    assert product_error(weight, observed, factor, int8, method) == pytest.approx(float(error), rel=1e-4)


def test_error_is_measured_on_evenly_spaced_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(5000, 8, generator=draw), torch.randn(4, 8, generator=draw)
    ends = rows.amin(dim=0), rows.amax(dim=0)
    some = product_error(weight, Observation(rows[::5], *ends), torch.ones(8), W8A8)
    assert product_error(weight, Observation(rows, *ends), torch.ones(8), W8A8) == some


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    weight *= torch.rand(shape[1], generator=generator) ** 3
    return torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3])), 0.0, weight)


@settings(max_examples=100, deadline=None)
@given(weights())
def test_the_widening_limit(weight: Tensor) -> None:
    limit = widening_limit(weight)
    assert torch.equal((weight * limit).abs().amax(dim=1), weight.abs().amax(dim=1))
    for column in range(weight.shape[1]):
        rows = [row for row in weight.abs().tolist() if row[column] > 0]
        room = min((max(row) / row[column] for row in rows), default=np.inf)
        assert float(limit[column]) == pytest.approx(min(room, 1024), rel=1e-5)
        assert room > 1 or float(limit[column]) == 1  # exactly


@pytest.mark.parametrize("format", [W8A8, W4A8, W4], ids=lambda format: format.name)
def test_widening_leaves_every_scale_exactly(format: Format, model: nn.Module, seen: dict, copy_of: Callable) -> None:
    changed = copy_of(model)
    changes = widen(model, seen, format)
    migrate(changed, {name: change for name, change in changes.items() if name != PROJ})  # which rescales qkv's rows
    assert changes
    for name in changes.keys() - {PROJ, "blocks.1.attn.proj"}:
        before, after = model.get_submodule(name).weight, changed.get_submodule(name).weight
        rows = slice(96) if name.endswith("blocks.1.attn.qkv") else slice(None)
        assert not torch.equal(before, after)
        scales = [round_to_nearest(each, format.weight).scale[rows] for each in (before, after)]
        assert torch.equal(*scales)


def test_weights_alone_are_widened_to_the_limit(model: nn.Module, seen: dict) -> None:
    changes = widen(model, seen, W4)
    assert changes
    for name, change in changes.items():
        assert torch.equal(change.factor, widening_limit(model.get_submodule(name).weight))


def test_an_unsaturated_channel_takes_the_range_from_a_large_input(model: nn.Module, copy_of: Callable) -> None:
    """Inputs coarse and weights fine: nothing but the range is a reason to widen."""
    model = copy_of(model)
    format = Format("w8a4", FORMATS["int8"].weight, Grid("INT4", -8, 7))
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(256, 48, generator=draw) * 2 - 1
    rows[:, 6] *= 16
    weight = model.get_submodule(FC1).weight
    weight.copy_(torch.rand(weight.shape, generator=draw) - 0.5)
    weight[:, 6] = weight[:, 6].sign() / 64
    observed = Observation(rows, rows.amin(dim=0), rows.amax(dim=0))
    seen = {name: observed for names in readers_of(model).values() for name in names}
    factor = widen(model, seen, format)[FC1].factor
    assert 12 < float(factor[6]) <= 32 and float(factor.median()) == 1
    before, after = (product_error(weight, observed, each, format) for each in (torch.ones(48), factor))
    assert after < 0.05 * before


READERS = {"gated": ("attn.qkv", "attn.gate"), "swiglu": ("mlp.fc1_g", "mlp.fc1_x")}


@pytest.mark.parametrize("family", READERS)
def test_readers_of_one_norm_count_together(
    family: str, make_vit: Callable, make_tiny: Callable, noise: Callable
) -> None:
    model = make_vit(family) if family == "gated" else make_tiny("vit_tiny_patch16_224", mlp_layer=SwiGLU)
    first, second = (model.get_submodule(f"blocks.0.{name}").weight for name in READERS[family])
    first[:, :20] *= 0.01  # which the second has no room for
    second[:, 20:40] *= 0.01
    for weight in (first, second):
        weight[:, 40:] *= 0.1
    changes = widen(model, seen_in(model, noise), W4)
    limit = widening_limit(torch.cat([first, second]))
    assert limit[:40].max() < 10 < min(widening_limit(each)[:40].max() for each in (first, second))
    for name in READERS[family]:
        assert torch.equal(changes[f"blocks.0.{name}"].factor, limit)


def test_silent_channels(model: nn.Module, seen: dict, copy_of: Callable) -> None:
    """A channel that is always zero, a weight that never reads one, and an input that is zero throughout."""
    model = copy_of(model)
    rows = seen[FC1].rows.clone()
    rows[:, 5] = 0
    model.get_submodule(FC1).weight[:, 7] = 0
    zero = torch.zeros(48)
    silent = {FC1: Observation(rows, rows.amin(dim=0), rows.amax(dim=0)), PROJ: Observation(0 * rows, zero, zero)}
    for find in (smooth, widen):
        changes = find(model, seen | silent, W8A8)
        assert PROJ not in changes and (find is widen or FC1 in changes)
        for change in changes.values():
            assert bool((change.factor > 0).all() and change.factor.isfinite().all())
            assert float(change.factor.max() / change.factor.min()) < 1e9
