"""Migrations change what goes into products, and nothing that comes out of the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from tocom.calib.quantize.migrations import Migration, migrate, origin_of, readers_of, takes_shift
from tocom.calib.quantize.network import observe, products_of
from tocom.vit import ReducedViT

PLAIN = ["norm1", "attn.qkv", "norm2"]
SOURCES = {  # of block 0; those that take a factor only in brackets
    "deit_distilled": PLAIN,
    "without_qkv_bias": ["(norm1)", "(attn.qkv)", "norm2"],
    "gated": ["norm1", "(attn.qkv)", "norm2"],
    "gated_normed": ["norm1", "(attn.norm)", "norm2"],
    "normed": ["norm1", "attn.norm", "norm2", "mlp.norm"],
    "swiglu": [*PLAIN, "(mlp.fc1_x)"],
    "swiglu_normed": [*PLAIN, "mlp.norm"],
    "glu_gate_first": [*PLAIN, "(mlp.fc1)"],
    "glu_gate_last": [*PLAIN, "(mlp.fc1)"],
}


@pytest.fixture(params=SOURCES)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_variant(make_tiny: Callable[..., nn.Module], make_vit: Callable) -> Callable[[str], nn.Module]:
    """Tiny models, float64, one for every way in which a source can look."""
    vit = partial(make_tiny, "vit_tiny_patch16_224", img_size=32)

    def make(name: str) -> nn.Module:
        if name == "gated_normed":
            model = make_vit("gated")
            for block in model.blocks:
                block.attn.norm = nn.LayerNorm(48, dtype=torch.float64).requires_grad_(False)
                block.attn.norm.bias.uniform_(-1, 1)
            return model.double()
        others = {
            "without_qkv_bias": {"qkv_bias": False},
            "swiglu": {"mlp_layer": SwiGLU},
            "swiglu_normed": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
            "glu_gate_first": {"mlp_layer": partial(GluMlp, gate_last=False)},
            "glu_gate_last": {"mlp_layer": partial(GluMlp, gate_last=True)},
        }
        return (vit(**others[name]) if name in others else make_vit(name)).double()

    return make


def random_migrations(model: nn.Module) -> dict[str, Migration]:
    """Of everything that can be changed, as far as it can."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for names in readers_of(model).values():
        width = model.get_submodule(names[0]).in_features
        factor = torch.rand(width, generator=draw, dtype=torch.float64) * 3 + 0.2
        shift = torch.randn(width, generator=draw, dtype=torch.float64)
        found |= dict.fromkeys(names, Migration(factor, shift if takes_shift(model, names[0]) else None))
    return found


def pixels_for(model: nn.Module, noise: Callable[..., np.ndarray]) -> Tensor:
    return torch.from_numpy(noise(2, *model.patch_embed.img_size)).double()


def test_what_can_be_changed(variant: str, make_variant: Callable[[str], nn.Module]) -> None:
    model = make_variant(variant)
    readers = {source: names for source, names in readers_of(model).items() if source.startswith("blocks.0.")}
    found = [source.removeprefix("blocks.0.") for source in readers]
    shifted = [all(takes_shift(model, name) for name in names) for names in readers.values()]
    named = [name if shift else f"({name})" for name, shift in zip(found, shifted, strict=True)]
    assert sorted(named) == sorted(SOURCES[variant])


def test_outputs_stay(variant: str, make_variant: Callable, noise: Callable, copy_of: Callable) -> None:
    model = make_variant(variant)
    pixels, changed = pixels_for(model, noise), copy_of(model)
    migrate(changed, random_migrations(model))
    for name in readers_of(model):
        assert not torch.allclose(model.get_submodule(name).weight, changed.get_submodule(name).weight, rtol=0.01)
    for network in (lambda model: model, lambda model: ReducedViT(model, 5)):
        torch.testing.assert_close(network(changed)(pixels), network(model)(pixels), rtol=1e-9, atol=1e-9)


def test_inputs_change_as_told(variant: str, make_variant: Callable, noise: Callable, copy_of: Callable) -> None:
    model = make_variant(variant)
    pixels, changed, migrations = pixels_for(model, noise), copy_of(model), random_migrations(model)
    migrate(changed, migrations)
    before, after = (
        observe([ReducedViT(each, 5)], lambda network: products_of(network.model), pixels) for each in (model, changed)
    )
    for name, seen in before.items():
        change = migrations.get(name)
        told = seen if change is None else seen.changed(change.factor, change.shift)
        for kind in ("rows", "low", "high"):
            torch.testing.assert_close(getattr(after[name], kind), getattr(told, kind), rtol=1e-8, atol=1e-8)


def test_float32_changes_of_a_float64_model(make_variant: Callable, noise: Callable, copy_of: Callable) -> None:
    model = make_variant("deit_distilled")
    pixels, changed = pixels_for(model, noise), copy_of(model)
    exact = random_migrations(model)
    migrate(changed, {name: Migration(each.factor.float(), each.shift.float()) for name, each in exact.items()})
    torch.testing.assert_close(changed(pixels), model(pixels), rtol=1e-9, atol=1e-9)


def test_what_tokens_are_matched_on_is_not_scaled(make_variant: Callable, copy_of: Callable) -> None:
    model = make_variant("deit_distilled")
    changed = copy_of(model)
    migrate(changed, {"blocks.0.attn.proj": random_migrations(model)["blocks.0.attn.proj"]})
    before, after = (each.blocks[0].attn.qkv for each in (model, changed))
    assert torch.equal(before.weight[:96], after.weight[:96]) and torch.equal(before.bias[:96], after.bias[:96])
    assert not torch.isclose(before.weight[96:], after.weight[96:]).all(dim=1).any()


def test_nothing_is_taken_behind_an_activation_function_or_another_norm(make_variant: Callable) -> None:
    model = make_variant("deit_distilled")
    assert origin_of(model, "blocks.0.mlp.fc2") is None
    model.blocks[0].norm1 = model.blocks[0].attn.norm = nn.RMSNorm(48)
    assert origin_of(model, "blocks.0.attn.qkv") is origin_of(model, "blocks.0.attn.proj") is None
    model.blocks[0].norm2 = nn.LayerNorm(48, elementwise_affine=False)
    assert origin_of(model, "blocks.0.mlp.fc1") is None


@pytest.mark.parametrize(
    ("variant", "products", "shifted", "message"),
    [
        ("deit_distilled", ["attn.qkv", "mlp.fc2"], False, "nothing takes the change of blocks.0.mlp.fc2's input"),
        ("deit_distilled", ["attn.qkv", "attn.typo"], False, "nothing takes the change of blocks.0.attn.typo's input"),
        ("swiglu", ["attn.qkv", "mlp.fc1_x"], False, "read blocks.0.norm2 and must be changed alike, all of them"),
        ("gated", ["attn.gate"], False, "read blocks.0.norm1 and must be changed alike, all of them"),
        ("without_qkv_bias", ["mlp.fc1", "attn.qkv"], True, "between blocks.0.norm1 and blocks.0.attn.qkv nothing can"),
        ("gated", ["mlp.fc1", "attn.proj"], True, "between blocks.0.attn.qkv and blocks.0.attn.proj nothing can be"),
        ("gated_normed", ["attn.proj"], True, "between blocks.0.attn.norm and blocks.0.attn.proj nothing can be"),
    ],
)
def test_what_cannot_be_done_is_not_begun(
    variant: str, products: list[str], shifted: bool, message: str, make_variant: Callable, copy_of: Callable
) -> None:
    model = make_variant(variant)
    before = copy_of(model.state_dict())
    factor = torch.full((48,), 2.0)
    change = Migration(factor, factor if shifted else None)
    with pytest.raises(ValueError, match=message):
        migrate(model, {f"blocks.0.{name}": change for name in products})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


TWO, THREE = torch.full((48,), 2.0), torch.full((48,), 3.0)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (Migration(TWO), Migration(THREE)),
        (Migration(TWO), Migration(TWO, THREE)),
        (Migration(TWO, TWO), Migration(TWO, THREE)),
    ],
    ids=["factor", "one_shift", "shift"],
)
def test_readers_of_one_source_are_changed_alike(first: Migration, other: Migration, make_variant: Callable) -> None:
    names = ["blocks.0.mlp.fc1_g", "blocks.0.mlp.fc1_x"]
    for pair in ((first, other), (other, first)):
        with pytest.raises(ValueError, match="must be changed alike"):
            migrate(make_variant("swiglu"), dict(zip(names, pair, strict=True)))
    for each in (first, other):
        same = Migration(each.factor.clone(), None if each.shift is None else each.shift.clone())
        migrate(make_variant("swiglu"), dict(zip(names, (each, same), strict=True)))
