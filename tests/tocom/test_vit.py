"""The reference: r = 0 is the untouched timm model, merging counts tokens right, and strangers are refused by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.conftest import FAMILIES, WITHOUT_CLASS_TOKEN
from tocom.merging import match, merge
from tocom.pruning import Pruning, prune
from tocom.reduction import MERGE, PRUNE, reduction_named
from tocom.runtime.errors import InputError
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT, require_supported, schedule_for, tokens_in


def images_for(model: nn.Module, photographs, noise) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.from_numpy(np.concatenate([noise(3, height, width), photographs(height, width)]))


@torch.no_grad()
def test_degree_0_is_the_untouched_model(family, make_vit, photographs, noise):
    model = make_vit(family)
    images = images_for(model, photographs, noise)
    expected = model(images)
    assert expected.abs().max() > 0.3  # else the tolerance would say little
    assert (ReducedViT(model, 0)(images) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_degree_0_is_the_untouched_model_when_pruning(class_family, make_vit, photographs, noise):
    model = make_vit(class_family)
    images = images_for(model, photographs, noise)
    assert (ReducedViT(model, 0, reduction=PRUNE)(images) - model(images)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["gap", "map", "reg1_gap", "reg4_gap", "max"], indirect=True)
def test_pruning_without_a_class_token_is_refused(family, make_vit):
    with pytest.raises(InputError, match=r"the model has no class token\. Use --reduction merge\.$"):
        ReducedViT(make_vit(family), 0, reduction=PRUNE)


def test_a_reduction_must_be_one_there_is():
    assert (reduction_named("merge"), reduction_named("prune")) == (MERGE, PRUNE)
    with pytest.raises(InputError, match="must be one of merge, prune, got 'drop'"):
        reduction_named("drop")


@torch.no_grad()
def test_pruning_decides_on_the_attention_of_timms_own_class_token(class_family, make_vit, photographs, noise):
    """In every block, as long as none before it has removed anything; timm's is taken from its own softmax."""
    model = make_vit(class_family)
    images = images_for(model, photographs, noise)
    attention, seen = {}, {}
    untouched = make_vit(class_family)
    for index, block in enumerate(untouched.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(
            lambda _, given, index=index: attention.update({index: given[0][:, :, 0].mean(dim=1)})
        )
    untouched(images)

    def step(block, x, token_size, signal, r):
        seen[block] = signal
        return x, token_size

    ReducedViT(model, 8, reduction=PRUNE)(images, step)
    assert seen.keys() == attention.keys() == set(range(len(model.blocks)))
    for index, signal in seen.items():
        assert signal.shape == (len(images), tokens_in(model))
        torch.testing.assert_close(signal.sum(dim=1), torch.ones(len(images)), rtol=0, atol=1e-5)
        torch.testing.assert_close(signal, attention[index], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_every_parameter_takes_part(family, make_vit, noise):
    """The comparison above can only see what reaches the logits: every parameter must."""
    model = make_vit(family)
    images = torch.from_numpy(noise(1, *model.patch_embed.img_size))
    expected = model(images)
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        # not the same change everywhere: a norm would take it out again, and keys are indifferent to a common shift
        parameter.data += 0.5 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
        change = (ReducedViT(model, 0)(images) - expected).abs().max()
        parameter.data = kept
        if not name.endswith(("k_norm.bias", "patch_embed.proj.bias")):
            assert change > 1e-5, name


# a convolutional stem sees beyond its patch, so that no two patches can be made equal
EQUAL_PATCHES = [name for name in FAMILIES if name != "hybrid"]


@torch.no_grad()
@pytest.mark.parametrize("r", [5, 16])
@pytest.mark.parametrize("family", EQUAL_PATCHES)
def test_merging_equal_patches_changes_nothing(family, make_vit, r):
    """Proportional attention and weighted pooling: a token that stands for two equal patches counts twice."""
    model = make_vit(family)
    height, width = model.patch_embed.grid_size
    patch = model.patch_embed.patch_size[0]
    draw = torch.Generator().manual_seed(0)
    count = (height * width + 1) // 2
    patches = torch.randn(2, count, 3, patch, patch, generator=draw).repeat_interleave(2, dim=1)[:, : height * width]
    images = patches.view(2, height, width, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    images = images.reshape(2, 3, height * patch, width * patch)
    positions = model.pos_embed.data[:, -height * width :]
    positions[:, 1::2] = positions[:, 0::2][:, : positions[:, 1::2].shape[1]]
    schedule = MergeSchedule((r, *[0] * (len(model.blocks) - 1)), tokens_in(model), protected=model.num_prefix_tokens)
    assert (ReducedViT(model, schedule)(images) - model(images)).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("class_family", [name for name in EQUAL_PATCHES if name not in WITHOUT_CLASS_TOKEN])
def test_fusing_equal_patches_changes_nothing(class_family, make_vit):
    """Whatever the class token attends: a token that stands for nine equal patches counts nine times."""
    model = make_vit(class_family)
    height, width = model.patch_embed.grid_size
    patch, count = model.patch_embed.patch_size[0], height * width
    draw = torch.Generator().manual_seed(0)
    fused = torch.randperm(count, generator=draw)[:9].sort().values
    patches = torch.randn(2, count, 3, patch, patch, generator=draw)
    patches[:, fused] = patches[:, fused[:1]]
    positions = model.pos_embed.data[:, -count:]
    positions[:, fused] = positions[:, fused[:1]]
    images = patches.view(2, height, width, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    images = images.reshape(2, 3, height * patch, width * patch)
    prefix = model.num_prefix_tokens
    kept = torch.tensor([i for i in range(count) if i not in fused.tolist()])
    chosen = Pruning(prefix + kept.expand(2, -1), prefix + fused.expand(2, -1), prefix)

    def step(_block, x, token_size, attention, _r):
        return prune(x, token_size, attention, chosen)

    schedule = MergeSchedule((8, *[0] * (len(model.blocks) - 1)), tokens_in(model), protected=prefix)
    reduced = ReducedViT(model, schedule, reduction=PRUNE)
    assert (reduced(images, step) - model(images)).abs().max() <= 1e-5


@torch.no_grad()
def test_merging_unequal_patches_changes_something(family, make_vit, noise):
    model = make_vit(family)
    images = torch.from_numpy(noise(2, *model.patch_embed.img_size))
    assert (ReducedViT(model, 8)(images) - model(images)).abs().max() > 1e-3


@torch.no_grad()
def test_pruning_unequal_patches_changes_something(class_family, make_vit, noise):
    model = make_vit(class_family)
    images = torch.from_numpy(noise(2, *model.patch_embed.img_size))
    pruned = ReducedViT(model, 8, reduction=PRUNE)(images)
    assert (pruned - model(images)).abs().max() > 1e-3
    assert (pruned - ReducedViT(model, 8)(images)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "reduction"),
    [
        *[(name, MERGE) for name in ("deit_tiny", "deit_distilled", "gap", "reg4_dinov2", "normed", "gated")],
        *[(name, PRUNE) for name in ("deit_tiny", "deit_distilled", "reg4_dinov2", "normed", "gated")],
    ],
    indirect=["family"],
    ids=lambda each: getattr(each, "name", each),
)
@pytest.mark.parametrize("r", [3, 16])
def test_blocks_equal_a_forward_written_out(family, reduction, make_vit, noise, naive: SimpleNamespace, r):
    """Attention by the textbook in float64, reduction by the loop: the signal, the bias and where it takes place."""
    model = make_vit(family).double()
    images = torch.from_numpy(noise(1, *model.patch_embed.img_size)).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))[0]
    size = np.ones(len(x))
    protected = model.num_prefix_tokens
    for block in model.blocks:
        attn, inside = block.attn, block.norm1(x)
        rows = attn.qkv(inside).view(len(x), 3, attn.num_heads, -1)
        outputs, keys, rows_of_class = [], [], []
        for head in range(attn.num_heads):
            q, k, v = attn.q_norm(rows[:, 0, head]), attn.k_norm(rows[:, 1, head]), rows[:, 2, head]
            weights = torch.exp(q @ k.T / k.shape[1] ** 0.5) * torch.from_numpy(size)  # the size, not its logarithm
            outputs.append((weights / weights.sum(dim=1, keepdim=True)) @ v)
            keys.append(k)
            rows_of_class.append(weights[0] / weights[0].sum())
        attended = attn.norm(torch.cat(outputs, dim=1))
        if attn.gate is not None:
            attended = attended * torch.sigmoid(attn.gate(inside))
        x = x + block.ls1(attn.proj(attended))
        if reduction is PRUNE:
            attention = torch.stack(rows_of_class).mean(dim=0).tolist()
            count = min(r, (len(x) - protected) // 2)
            decisions = naive.select(attention, count, protected)
            reduced, size = naive.prune(x.numpy(), size, attention, decisions, protected)
        else:
            metric = torch.stack(keys).mean(dim=0)
            decisions = naive.match(metric.tolist(), r, protected, model.has_class_token)
            reduced, size = naive.merge(x.numpy(), size, decisions, protected)
        x = torch.from_numpy(reduced)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if family == "gap":
        pooled = (x * torch.from_numpy(size)[:, None]).sum(dim=0) / size.sum()
        expected = model.head(model.fc_norm(pooled))
    else:
        expected = model.forward_head(x[None])[0]
    # the floor of 1e-12 under the weights moves a fused token by about that much over its attention
    tolerance = 1e-10 if reduction is MERGE else 1e-8
    assert (ReducedViT(model, r, reduction=reduction)(images)[0] - expected).abs().max() <= tolerance


@torch.no_grad()
def test_a_reduce_step_of_ones_own_sees_every_merge(make_vit, noise):
    model = make_vit("reg4_dinov2")
    seen = []

    def step(block, x, token_size, metric, r):
        seen.append((block, tuple(x.shape), tuple(token_size.shape), tuple(metric.shape), r, float(token_size.sum())))
        return merge(x, token_size, match(metric, r, protected=5))

    schedule = MergeSchedule((4, 0, 7), 69, protected=5)
    ReducedViT(model, schedule)(torch.from_numpy(noise(2, 64, 64)), step)
    assert seen == [
        (0, (2, 69, 48), (2, 69, 1), (2, 69, 16), 4, 138.0),
        (2, (2, 65, 48), (2, 65, 1), (2, 65, 16), 7, 138.0),
    ]


def test_the_wrapped_model_is_shared_and_untouched(make_vit, noise):
    model = make_vit("deit3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = ReducedViT(model, 8)
    assert wrapped.model is model
    wrapped(torch.from_numpy(noise(1, 64, 64)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("r", [-1, 2.5])
def test_a_degree_must_be_valid(make_vit, r):
    with pytest.raises(InputError, match=f"0 or more tokens per block, got {r}"):
        ReducedViT(make_vit("deit_tiny"), r)


@pytest.mark.parametrize("change", [{"tokens_in": 64}, {"protected": 0}, {"requested": (1, 1, 1)}])
def test_a_schedule_must_be_made_for_the_model(make_vit, change):
    model = make_vit("deit_tiny")
    with pytest.raises(InputError, match="made for the model's blocks, tokens and protected tokens"):
        ReducedViT(model, replace(schedule_for(model, 1), **change))


def test_tokens_in_counts_the_prefix(make_vit):
    counts = {name: tokens_in(make_vit(name)) for name in ("deit_tiny", "deit_distilled", "gap", "reg4_dinov2")}
    assert counts == {"deit_tiny": 65, "deit_distilled": 66, "gap": 81, "reg4_dinov2": 69}
    assert schedule_for(make_vit("deit_distilled"), 16).tokens == (66, 50, 34, 18)


STRANGERS = {
    "vit_base_patch16_rope_224": "model Eva",
    "eva02_tiny_patch14_224": "model Eva",
    "samvit_base_patch16": "model VisionTransformerSAM",
    "vit_relpos_small_patch16_224": "model VisionTransformerRelPos",
    "vit_base_patch16_rpn_224": "block 0, ResPostBlock",
    "vit_dwee_patch16_reg1_gap_256": "attention of block 0, DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "block 0, DiffParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "block 0, ParallelScalingBlock",
    "beit_base_patch16_224": "model Beit",
    "swin_tiny_patch4_window7_224": "model SwinTransformer",
    "cait_xxs24_224": "model Cait",
    "resnet18": "model ResNet",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_modelled_is_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for entrance in (require_supported, ReducedViT):
        with pytest.raises(InputError, match=f"^{STRANGERS[name]} is not modelled"):
            entrance(model)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"global_pool": ""}, "pooling ''"),
        ({"global_pool": "prr"}, "pooling 'prr'"),
        ({"num_classes": 0}, "a model without a classifier, VisionTransformer"),
    ],
)
def test_heads_that_are_not_modelled_are_refused_by_name(make_tiny, overrides, named):
    with pytest.raises(InputError, match=f"^{named} is not modelled"):
        require_supported(make_tiny("vit_tiny_patch16_224", **overrides))


def test_parts_that_were_added_are_refused_by_name(make_tiny):
    class OtherMlp(nn.Identity):
        pass

    alterations = {
        "part 'rope' of VisionTransformer": lambda model: model.add_module("rope", nn.Identity()),
        "part 'ls3' of Block": lambda model: model.blocks[1].add_module("ls3", nn.Identity()),
        "part 'rel_pos' of Attention": lambda model: model.blocks[1].attn.add_module("rel_pos", nn.Identity()),
        "MLP of block 1, OtherMlp": lambda model: setattr(model.blocks[1], "mlp", OtherMlp()),
    }
    for named, alter in alterations.items():
        model = make_tiny("vit_tiny_patch16_224")
        require_supported(model)
        alter(model)
        with pytest.raises(InputError, match=f"^{named} is not modelled"):
            require_supported(model)
