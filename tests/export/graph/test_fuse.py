"""Fusing against the written formula, and the fused network against the network with the pairs beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tocom.compensator import Compensator
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.engine.build import build
from tocom.export.graph.fuse import fuse
from tocom.export.graph.lower import lower, reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.validate import validate
from tocom.export.source.images import default_images
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT, schedule_for

STEPS = [(0, 8), (0, 16), (3, 11), (16, 0), (13, 4), (8, 8), (0, 0), (16, 16), (15, 16), (1, 0)]


def delta_by_the_formula(compensator, block, which, source, target, scale) -> np.ndarray:
    """scale * sum over groups of (gate(target) - gate(source)) * up of the group @ down of the group."""
    pair = compensator.blocks[block]["attn"][f"{which}_tocom"]
    down = pair.adapter_down.weight.numpy().astype(np.float64)
    up = pair.adapter_up.weight.numpy().astype(np.float64)
    groups, rank = compensator.info.groups, compensator.info.rank
    delta = np.zeros((up.shape[0], down.shape[1]))
    for group in range(groups):
        rows = slice(group * rank, (group + 1) * rank)
        on_at_target = 1 if group >= groups - target else 0
        on_at_source = 1 if group >= groups - source else 0
        delta += scale * (on_at_target - on_at_source) * (up[:, rows] @ down[rows])
    return delta


@pytest.mark.parametrize(("source", "target"), STEPS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_delta_equals_the_formula(make_compensator, source, target, rank):
    compensator = make_compensator(24, 2, rank=rank)
    compensation = compensator.between(source, target, 0.12)
    for block in range(2):
        for which in "qv":
            expected = delta_by_the_formula(compensator, block, which, source, target, 0.12)
            np.testing.assert_allclose(compensation.delta(block, which).numpy(), expected, rtol=1e-12, atol=1e-14)
            assert np.abs(expected).max() > 1e-2 or source == target


@pytest.mark.parametrize(("source", "target"), STEPS)
def test_only_query_and_value_rows_change(make_vit, make_compensator, source, target):
    weights = make_vit("deit3").state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    compensator = make_compensator(48, 2)
    fused = fuse(weights, compensator.between(source, target))
    assert fused.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name])  # what was given is left alone
        if not name.endswith("attn.qkv.weight"):
            assert fused[name] is tensor
            continue
        assert fused[name].dtype == tensor.dtype
        assert torch.equal(fused[name][48:96], tensor[48:96])
        block = int(name.split(".")[1])
        for which, rows in (("q", slice(0, 48)), ("v", slice(96, 144))):
            delta = delta_by_the_formula(compensator, block, which, source, target, 0.1)
            np.testing.assert_allclose(fused[name][rows].numpy(), tensor[rows].numpy() + delta, rtol=1e-6, atol=1e-7)
            assert torch.equal(fused[name][rows], tensor[rows]) == (source == target)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "reduction"),
    [
        *[(name, MERGE) for name in ("deit_tiny", "deit_distilled", "map", "normed", "gated")],
        *[(name, PRUNE) for name in ("deit_tiny", "deit_distilled", "gated")],
    ],
    indirect=["family"],
    ids=lambda each: getattr(each, "name", each),
)
@pytest.mark.parametrize(("source", "target"), [(0, 8), (16, 4), (8, 8)])
def test_the_fused_network_equals_the_unfused(family, reduction, make_vit, make_compensator, noise, source, target):
    model = make_vit(family)
    compensation = make_compensator(48, len(model.blocks), reduction=reduction.name).between(source, target)
    images = torch.from_numpy(noise(3, *model.patch_embed.img_size))
    errors = {}
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        unfused = ReducedViT(model, target, compensation, reduction)(images.to(dtype))
        own = make_vit(family).to(dtype)
        own.load_state_dict(fuse(model.state_dict(), compensation))
        fused = ReducedViT(own, target, reduction=reduction)(images.to(dtype))
        errors[dtype] = float((fused - unfused).abs().max() / unfused.abs().max())
        plain = ReducedViT(model, target, reduction=reduction)(images.to(dtype))
        assert source == target or (plain - unfused).abs().max() > 1e-3  # the compensation does something
        model = make_vit(family)
    assert errors[torch.float64] <= 1e-12
    assert errors[torch.float32] <= 1e-5


@torch.no_grad()
def test_going_there_and_back_again(make_vit, make_compensator):
    weights = make_vit("deit_tiny").double().state_dict()
    compensator = make_compensator(48, 4)
    back = fuse(fuse(weights, compensator.between(3, 12)), compensator.between(12, 3))
    for name, tensor in weights.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-14)


def test_a_model_of_another_shape_is_refused(make_vit, make_compensator):
    weights = make_vit("deit_tiny").state_dict()
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv.weight of shape \[72, 24\], got \[144, 48\]"):
        fuse(weights, make_compensator(24, 4).between(0, 8))
    with pytest.raises(InputError, match=r"blocks.4.attn.qkv.weight of shape \[144, 48\], got none"):
        fuse(weights, make_compensator(48, 5).between(0, 8))


@pytest.mark.full
@pytest.mark.parametrize("depth", [2, 12])
def test_an_original_compensator_for_deit_b_fuses_and_exports(tmp_path, make_tiny, make_compensator, depth):
    full_size = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "num_heads": 12, "num_classes": 1000}
    small = {"img_size": 128, "patch_size": 16, "embed_dim": 768, "num_heads": 12}
    model = make_tiny("deit_base_patch16_224", **(full_size if depth == 12 else small), depth=depth)
    compensator = make_compensator(768, depth, size=0.05)
    torch.save(compensator.to_original(), tmp_path / "tocom.pth")
    loaded = Compensator.load(tmp_path / "tocom.pth")
    assert (loaded.info.width, loaded.info.depth, loaded.info.rank, loaded.info.backbone) == (768, depth, 2, None)
    fused = FusedCheckpoint(fuse(model.state_dict(), loaded.between(0, 16)), "deit", 16, 0, 0.1, "a" * 64, "b" * 64)
    schedule = schedule_for(model, 16)
    engine = build(lower(model, schedule, fused, WeightStore(tmp_path), "model.onnx"))
    report = validate(engine, reference_model(model, schedule, fused), default_images(model_size(model), images=2))
    assert report, report.findings


def model_size(model) -> tuple[int, int, int]:
    return (3, *model.patch_embed.img_size)


def test_an_original_compensator_of_full_deit_b_size_fuses(tmp_path, make_compensator):
    written = make_compensator(768, 12, size=0.05)
    torch.save(written.to_original(), tmp_path / "tocom.pth")
    keys = set(torch.load(tmp_path / "tocom.pth", weights_only=True)["model"])
    assert len(keys) == 48
    assert "blocks.11.attn.v_tocom.adapter_up.weight" in keys
    compensator = Compensator.load(tmp_path / "tocom.pth")
    weights = {f"blocks.{block}.attn.qkv.weight": torch.zeros(3 * 768, 768) for block in range(12)}
    fused = fuse(weights, compensator.between(8, 0))
    for block in (0, 11):
        expected = delta_by_the_formula(written, block, "v", 8, 0, 0.1)
        found = fused[f"blocks.{block}.attn.qkv.weight"][2 * 768 :].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_scale_that_overflows_the_weights_is_refused(make_vit, make_compensator):
    with pytest.raises(InputError, match="finite"):
        fuse(make_vit("deit_base").state_dict(), make_compensator(48, 2).between(0, 8, 1e39))
