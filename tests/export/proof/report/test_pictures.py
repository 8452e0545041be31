"""Which patches became one: against sets of patches followed by naive merging, and marks exactly where two differ."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tocom.export.proof.observe import Observed
from tocom.export.proof.reference import TorchObserver, replay
from tocom.export.proof.report.panels import DIFFERING, panels, png
from tocom.export.proof.report.pictures import MergePicture, colours, differing, merge_pictures, moved, patch_groups
from tocom.merging import Matching, match
from tocom.pruning import select
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.manifest import InputSpec
from tocom.vit import ReducedViT

SPEC = InputSpec((3, 64, 64), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 1.0, "center")


def sets_behind(sets, decision, tokens, protected):
    """Sets of patches, token by token: what `naive_merge` and `naive_prune` do to tokens, done to sets."""
    if isinstance(decision, Matching):
        src, dst, unm = (each[0].tolist() for each in (decision.src, decision.dst, decision.unm))
        odd = [position for position in range(protected, tokens) if position % 2 == 1]
        stay = [*range(protected), *unm, *odd]
        return [set().union(sets[i], *(sets[s] for s, d in zip(src, dst, strict=True) if d == i)) for i in stay]
    kept, dropped = decision.kept[0].tolist(), decision.dropped[0].tolist()
    return [sets[i] for i in [*range(protected), *kept]] + [set().union(*(sets[i] for i in dropped))]


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", [4, 9, 30, 31])
@pytest.mark.parametrize("reduction", ["merge", "prune"])
def test_moves_are_those_of_sets_of_patches(reduction, patches, protected):
    tokens = protected + patches
    sets = [set() for _ in range(protected)] + [{patch} for patch in range(patches)]
    position = protected + np.arange(patches)
    draw = torch.Generator().manual_seed(patches + protected)
    while (r := min(4, (tokens - protected) // 2)) > 0:
        if reduction == "merge":
            metric = torch.randn(1, tokens, 3, generator=draw)
            decision = match(metric, r, protected=protected, keep_order=bool(protected))
        else:
            decision = select(torch.rand(1, tokens, generator=draw), r, protected=protected)
        position = moved(decision, tokens)[position]
        sets = sets_behind(sets, decision, tokens, protected)
        tokens -= r
        assert len(sets) == tokens
        assert all(patch in sets[token] for patch, token in enumerate(position))
        assert sum(map(len, sets)) == patches


FAMILIES = ["deit_tiny", "deit_distilled", "reg4_dinov2", "gap", "map", "hybrid", "deit_small"]
CASES = [(family, MERGE) for family in FAMILIES] + [(family, PRUNE) for family in ("deit_tiny", "reg4_dinov2")]


@pytest.mark.parametrize(("family", "reduction"), CASES, ids=[f"{f}-{r.name}" for f, r in CASES])
def test_groups_are_as_large_as_the_tokens_say(make_vit, noise, family, reduction):
    reference = ReducedViT(make_vit(family), 5, reduction=reduction).eval()
    size = reference.model.patch_embed.img_size
    pixels = noise(1, *size)
    candidate, own = merge_pictures(TorchObserver(reference, "fp32"), reference, pixels, SPEC)
    sizes = replay(reference, torch.from_numpy(pixels), {}).values
    prefix, grid = reference.model.num_prefix_tokens, reference.model.patch_embed.grid_size
    assert tuple(own.groups) == tuple(candidate.groups) == reference.deciding_blocks
    for block, groups in own.groups.items():
        assert groups.shape == tuple(grid)
        counted = np.bincount(groups.ravel(), minlength=reference.schedule.tokens[block + 1])
        token_size = sizes[f"block.{block}.token_size"][0, :, 0]
        np.testing.assert_array_equal(counted[prefix:], token_size[prefix:])
        assert not differing(candidate, own, block).any()


class Planted:
    """An observer that merges one token of one block elsewhere, into a b-token that nothing else merges into."""

    name, precision = "planted", "fp32"

    def __init__(self, reference, block):
        self.reference, self.block = reference, block

    def observe(self, pixel_values):
        natural = replay(self.reference, torch.from_numpy(pixel_values), {}).natural
        chosen = {block: natural[block] for block in self.reference.deciding_blocks}
        own = chosen[self.block]
        b_tokens = range(own.protected, self.reference.schedule.tokens[self.block])
        free = next(i for i in b_tokens if i % 2 == 1 and i not in own.dst[0].tolist())
        dst = own.dst.clone()
        self.src, self.was, self.now = int(own.src[0, 0]), int(dst[0, 0]), free
        dst[0, 0] = free
        chosen[self.block] = Matching(own.src, dst, own.unm, own.protected)
        return Observed(torch.zeros(1, 10), chosen, {})


def test_a_planted_decision_marks_exactly_the_patches_concerned(make_vit, noise):
    reference = ReducedViT(make_vit("deit_tiny"), 6).eval()
    planted = Planted(reference, block=1)
    candidate, own = merge_pictures(planted, reference, noise(1, 64, 64), SPEC)
    assert not differing(candidate, own, 0).any()
    before = own.groups[0]  # the tokens that enter block 1
    concerned = np.isin(before, [planted.src, planted.was, planted.now])
    # and those that merge into where it merged, which are of another group without it
    matching = replay(reference, torch.from_numpy(noise(1, 64, 64)), {}).natural[1]
    others = matching.src[0][matching.dst[0] == planted.was].tolist()
    concerned |= np.isin(before, others)
    np.testing.assert_array_equal(differing(candidate, own, 1), concerned)
    assert 3 <= concerned.sum() < concerned.size

    theirs, ours = panels(candidate, own, 1)
    red = np.all(ours == DIFFERING, axis=-1)
    patch = ours.shape[0] // 8
    np.testing.assert_array_equal(red.reshape(8, patch, 8, patch).any(axis=(1, 3)), concerned)
    assert not np.all(panels(candidate, own, 0)[0] == DIFFERING, axis=-1).any()
    assert not np.array_equal(ours, theirs)


def picture(groups, reduction="merge"):
    return MergePicture("one", reduction, np.zeros((8, 8, 3), np.uint8), {0: np.array(groups)})


def test_names_of_groups_do_not_matter():
    one, other = picture([[1, 1], [2, 3]]), picture([[9, 9], [4, 1]])
    assert not differing(one, other, 0).any()
    assert differing(one, picture([[1, 2], [2, 3]]), 0).tolist() == [[True, True], [True, False]]
    assert differing(one, MergePicture("none", "merge", one.image, {}), 0) is None


def test_pruned_patches_differ_where_one_keeps_them():
    one, other = picture([[1, 9, 9], [9, 2, 3]], "prune"), picture([[9, 1, 9], [9, 2, 3]], "prune")
    assert differing(one, other, 0).tolist() == [[True, True, False], [False, False, False]]
    shown = panels(one, other, 0)[0]
    assert not np.array_equal(shown, panels(one, one, 0)[0])


def test_nothing_is_drawn_from_a_decision_that_is_none(make_vit, noise):
    reference = ReducedViT(make_vit("deit_tiny"), 6).eval()
    chosen = dict(replay(reference, torch.from_numpy(noise(1, 64, 64)), {}).natural)
    broken = chosen[1]
    chosen[1] = Matching(broken.src, broken.dst + 1000, broken.unm, broken.protected)
    assert list(patch_groups(chosen, reference)) == [0]
    assert list(patch_groups({0: chosen[0]}, reference)) == [0]


def test_colours_are_the_images_and_panels_are_files(photographs):
    normalized = photographs(64, 64)[0]
    spec = InputSpec((3, 64, 64), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0, "center")
    image = colours(normalized, spec)
    expected = (normalized * 0.25 + 0.5).transpose(1, 2, 0) * 255
    assert image.dtype == np.uint8 and np.abs(image - expected).max() < 0.51
    opened = Image.open(io.BytesIO(png(image)))
    assert opened.size == (64, 64)
    assert np.abs(np.asarray(opened.convert("RGB"), float) - image).mean() < 8


def test_a_file_of_few_colours_keeps_the_red_of_its_marks(photographs):
    image = (photographs(64, 64)[0].transpose(1, 2, 0) * 64 + 128).clip(0, 255).astype(np.uint8)
    image[:1] = DIFFERING
    opened = np.asarray(Image.open(io.BytesIO(png(image))).convert("RGB"))
    assert (opened[0] == DIFFERING).all() and not (opened[1:] == DIFFERING).all(axis=-1).any()
