"""Ranges behind layer norms, made alike and centred."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tocom.calib.quantize.grids import INT8
from tocom.calib.quantize.migrations import migrate
from tocom.calib.quantize.network import Observation, observe, products_of
from tocom.calib.quantize.ranges import scale_of
from tocom.calib.quantize.reparameterize import CLIPPED, reparameterize
from tocom.vit import ReducedViT


def seen_in(model: nn.Module, noise: Callable) -> dict[str, Observation]:
    weight = model.patch_embed.proj.weight
    pixels = torch.from_numpy(noise(4, *model.patch_embed.img_size)).to(weight.dtype)
    return observe([ReducedViT(model, 4)], lambda network: products_of(network.model), pixels)


@pytest.fixture
def model(make_tiny: Callable) -> nn.Module:
    """As trained ViTs are: a few channels of the norms far wider than others, and far off zero."""
    model = make_tiny("deit_tiny_distilled_patch16_224", img_size=32)
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight[[3, 20]] *= 10
            norm.bias[[7, 20]] += 12
    return model


@pytest.mark.parametrize("family", ["distilled", "reg4_dinov2_swiglu", "gated"])
def test_ranges_behind_norms_become_one(family: str, model: nn.Module, make_vit: Callable, noise: Callable) -> None:
    model = (model if family == "distilled" else make_vit(family)).double()
    before = seen_in(model, noise)
    changes = reparameterize(model, before, clip=False)
    inner = ["attn.qkv", "attn.gate", "mlp.fc1"] if family == "gated" else ["attn.qkv", "mlp.fc1"]
    assert sorted(changes) == sorted(f"blocks.{block}.{name}" for block in range(2) for name in inner)
    migrate(model, changes)
    after = seen_in(model, noise)
    for name in changes:
        mean = float((before[name].high - before[name].low).mean() / 2)
        torch.testing.assert_close(after[name].high, torch.full((48,), mean, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after[name].low, -after[name].high, rtol=1e-9, atol=1e-9)


def test_outputs_stay_and_inputs_are_quantized_more_finely(model: nn.Module, noise: Callable) -> None:
    model = model.double()
    pixels = torch.from_numpy(noise(2, 32, 32)).double()
    before, logits = seen_in(model, noise), model(pixels)
    changes = reparameterize(model, before)
    migrate(model, changes)
    torch.testing.assert_close(model(pixels), logits, rtol=1e-9, atol=1e-9)
    after = seen_in(model, noise)
    for name, change in changes.items():
        kept = [scale_of(seen[name], INT8, "percentile") for seen in (before, after)]
        # steps in the channels' own units
        assert float((kept[1] * change.factor).median()) < 0.3 * kept[0]


def test_without_bias_magnitudes_become_one(make_tiny: Callable, noise: Callable) -> None:
    model = make_tiny("deit_tiny_patch16_224", img_size=32, qkv_bias=False)
    before = seen_in(model, noise)
    changes = reparameterize(model, before, clip=False)
    assert changes["blocks.0.attn.qkv"].shift is None and changes["blocks.0.mlp.fc1"].shift is not None
    migrate(model, changes)
    after = seen_in(model, noise)
    for block in range(2):
        magnitudes = after[f"blocks.{block}.attn.qkv"].largest
        mean = before[f"blocks.{block}.attn.qkv"].largest.mean()
        torch.testing.assert_close(magnitudes, mean.expand(48), rtol=1e-4, atol=1e-4)


def test_norms_elsewhere(make_vit: Callable, noise: Callable) -> None:
    model = make_vit("normed").double()
    before = seen_in(model, noise)
    changes = reparameterize(model, before, clip=False)
    assert changes.keys() == products_of(model).keys()
    migrate(model, changes)
    proj, fc2 = (seen_in(model, noise)[f"blocks.1.{name}"] for name in ("attn.proj", "mlp.fc2"))
    for seen in (proj, fc2):
        torch.testing.assert_close(seen.high, seen.high[0].expand(len(seen.high)), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen.low, -seen.high, rtol=1e-9, atol=1e-9)


def test_a_gate_behind_a_norm_takes_no_shift(make_vit: Callable, noise: Callable) -> None:
    model = make_vit("gated")
    for block in model.blocks:
        block.attn.norm = nn.LayerNorm(48).requires_grad_(False)
    assert reparameterize(model, seen_in(model, noise))["blocks.0.attn.proj"].shift is None


def test_clipping_leaves_out_the_outermost_numbers_at_either_end(model: nn.Module, noise: Callable) -> None:
    name = "blocks.0.mlp.fc1"
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((3000, 48)).astype(np.float32)
    rows[:3, 4], rows[:4, 5], rows[0, 6] = 50, 50, -50  # clipped but for the fourth of channel 5
    everything = torch.from_numpy(rows)
    seen = seen_in(model, noise) | {name: Observation(everything, everything.amin(dim=0), everything.amax(dim=0))}
    ends = np.array([[sorted(column)[3], sorted(column)[-4]] for column in rows.T.tolist()])  # 0.1% of 3,000
    assert CLIPPED == 0.001
    change = reparameterize(model, seen)[name]
    widths = (ends[:, 1] - ends[:, 0]) / 2
    np.testing.assert_allclose(change.shift.numpy(), ends.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(change.factor.numpy(), widths / widths.mean(), rtol=1e-5)
    assert widths[5] > 5 * widths[4] and widths[6] < 5
    unclipped = reparameterize(model, seen, clip=False)[name]
    np.testing.assert_allclose(unclipped.shift.numpy(), (rows.min(axis=0) + rows.max(axis=0)) / 2, rtol=1e-5, atol=1e-6)
    few = {**seen, name: Observation(everything[:999], everything.amin(dim=0), everything.amax(dim=0))}
    clipped, whole = (reparameterize(model, few, clip)[name] for clip in (True, False))
    assert torch.equal(clipped.factor, whole.factor) and torch.equal(clipped.shift, whole.shift)


def test_channels_that_do_not_move(model: nn.Module, noise: Callable) -> None:
    seen = seen_in(model, noise)
    name = "blocks.0.mlp.fc1"
    rows = seen[name].rows.clone()
    rows[:, 9] = 3
    still = torch.full((48,), 3.0)
    seen |= {
        name: Observation(rows, rows.amin(dim=0), rows.amax(dim=0)),
        "blocks.1.mlp.fc1": Observation(still.expand(4, -1), still, still),
    }
    changes = reparameterize(model, seen)
    assert float(changes[name].factor[9]) == 2.0**-6 and float(changes[name].shift[9]) == 3
    assert torch.equal(changes["blocks.1.mlp.fc1"].factor, torch.ones(48))
