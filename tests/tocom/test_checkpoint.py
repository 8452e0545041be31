"""Loading a fine-tuned checkpoint: what fits loads strictly, what does not is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tocom.checkpoint import hash_tensors, load_model
from tocom.runtime.errors import InputError

NAME = "deit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def weights(make_tiny):
    return {name: t.clone() for name, t in make_tiny(NAME, **TINY, num_classes=7).state_dict().items()}


@pytest.fixture
def file(tmp_path, weights):
    save_file(weights, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def refused(name=NAME, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_model(name, **{**TINY, **arguments})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_loads_and_tells_its_classes(file, weights, noise, make_tiny):
    loaded = load_model(NAME, checkpoint=file, **TINY)
    assert loaded.architecture == NAME
    assert loaded.model.num_classes == 7
    assert loaded.label_names is None
    assert loaded.data_config["input_size"] == (3, 32, 32)
    assert loaded.checkpoint_sha256 == hash_tensors(weights)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    images = torch.from_numpy(noise(2, 32, 32))
    assert torch.equal(loaded.model(images), make_tiny(NAME, **TINY, num_classes=7)(images))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_layout_has_the_same_hash(tmp_path, file, weights, wrapper, prefix):
    content = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({wrapper: content} if wrapper else content, tmp_path / "weights.pth")
    expected = load_model(NAME, checkpoint=file, **TINY).checkpoint_sha256
    assert load_model(NAME, checkpoint=tmp_path / "weights.pth", **TINY).checkpoint_sha256 == expected


def test_the_hash_sees_names_shapes_types_and_values():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.full((1,), 1.0000001)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.int32)},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({hash_tensors(tensors) for tensors in (one, *others)}) == 6
    assert hash_tensors(dict(reversed(one.items()))) == hash_tensors(one)
    assert hash_tensors({"a": torch.zeros(3, 2).T, "b": torch.ones(1)}) == hash_tensors(one)
    assert hash_tensors({"scalar": torch.tensor(1.0), "empty": torch.zeros(0)})


def test_half_precision_weights_become_float32(tmp_path, weights):
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "half.safetensors")
    model = load_model(NAME, checkpoint=tmp_path / "half.safetensors", **TINY).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, weights["head.weight"].bfloat16().float())


def test_widths_and_depths_that_do_not_fit_are_named(file):
    assert "must have shape [48] for this model, got [24]" in refused(checkpoint=file, embed_dim=48)
    assert "lacks blocks.2.attn.proj.bias (12 missing, 0 unknown)" in refused(checkpoint=file, depth=3)
    message = refused(checkpoint=file, depth=1)
    assert "has blocks.1.attn.proj.bias, which the model lacks (0 missing, 12 unknown)" in message
    assert str(file) in message
    assert "pos_embed must have shape" in refused(checkpoint=file, img_size=64)
    assert "lacks blocks.0.ls1.gamma" in refused(checkpoint=file, init_values=0.1)


def test_a_class_count_that_does_not_fit_is_named(file):
    assert load_model(NAME, checkpoint=file, num_classes=7, **TINY).model.num_classes == 7
    assert "must have shape [10" in refused(checkpoint=file, num_classes=10)


def test_whole_numbers_are_no_weights(tmp_path, weights):
    weights["head.bias"] = torch.zeros(7, dtype=torch.int8)
    save_file(weights, tmp_path / "quantized.safetensors")
    message = refused(checkpoint=tmp_path / "quantized.safetensors")
    assert "head.bias must hold floating-point numbers, got torch.int8" in message


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("deit_tiny_patch16_22", "deit_tiny_patch16_224"),
        ("diet_small_patch16_224", "deit_small_patch16_224"),
        ("vit_base_patch16_224x.augreg_in21k", "vit_base_patch16_224"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(given, meant):
    assert f"got {given!r}. Did you mean {meant}" in refused(given)


@pytest.mark.parametrize("name", ["", "zzzzqqqq", "/nowhere/at/all"])
def test_a_name_that_is_like_none_says_where_names_are_listed(name):
    assert "a model must be a timm model name or a folder with a config.json" in refused(name)


def test_arguments_that_timm_refuses_are_told(file):
    assert "timm cannot build" in refused(checkpoint=file, colour="blue")
    assert "timm cannot build" in refused(checkpoint=file, num_heads=5)
    assert "timm cannot build" in refused(checkpoint=file, global_pool="sum")


def test_what_is_not_modelled_is_refused(file):
    with pytest.raises(InputError, match="model ResNet is not modelled"):
        load_model("resnet18", checkpoint=file)
    assert "attention of block 0, DiffAttention" in refused(checkpoint=file, attn_layer="diff")


def test_a_model_folder_brings_its_weights_settings_and_names(tmp_path, weights):
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {
        "architecture": NAME,
        "num_classes": 7,
        "model_args": TINY,
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear",
            "crop_pct": 0.8, "num_classes": 7, "label_names": list("abcdefg"), "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder))
    assert loaded.architecture == NAME
    assert loaded.label_names == tuple("abcdefg")
    assert loaded.checkpoint_sha256 == hash_tensors(weights)
    assert tuple(loaded.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert loaded.data_config["crop_pct"] == 0.8
    assert loaded.data_config["interpolation"] == "bilinear"
    config["pretrained_cfg"]["label_names"] = ["a", "b"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="one name per class, got 2 for 7 classes"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="must hold model.safetensors or pytorch_model.bin"):
        load_model(str(folder))
    save_file(weights, folder / "model.safetensors")
    for broken in ("", "{", "[]", "{}", '{"architecture": "nothing_like_it"}', '{"architecture": 3}'):
        (folder / "config.json").write_text(broken)
        with pytest.raises(InputError):
            load_model(str(folder))


def test_a_hybrid_stem_takes_images_of_three_channels(tmp_path, make_vit):
    model = make_vit("hybrid")
    save_file(dict(model.state_dict()), tmp_path / "hybrid.safetensors")
    loaded = load_model(
        "vit_tiny_r_s16_p8_224", checkpoint=tmp_path / "hybrid.safetensors",
        img_size=128, patch_size=2, embed_dim=48, depth=2, num_heads=3,
    )  # fmt: skip
    assert loaded.data_config["input_size"] == (3, 128, 128)
