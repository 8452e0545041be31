"""Chosen images against artificial mixtures, chance, and distances computed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tocom.calib.quantize import choose_images
from tocom.calib.quantize.choose_images import choose, features_of, typicality
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT


def mixture(counts: list[int], spreads: list[float], seed: int = 0, width: int = 8) -> tuple[Tensor, Tensor]:
    """Groups of points around far-away centres, in random order, and which group each is of."""
    draw = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(width)[: len(counts)]
    group = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    group = group[torch.randperm(len(group), generator=draw)]
    points = torch.randn(len(group), width, generator=draw) * torch.tensor(spreads)[group][:, None]
    return centres[group] + points, group


def uncovered(points: Tensor, chosen: list[int]) -> float:
    """Root mean square distance from a point to the nearest that was chosen."""
    rows = points.tolist()
    nearest = [min(math.dist(p, rows[j]) for j in chosen) for p in rows]
    return math.sqrt(sum(each**2 for each in nearest) / len(nearest))


@pytest.mark.parametrize("seed", range(3))
def test_every_group_is_in_it_however_small(seed):
    points, group = mixture([150, 30, 15, 100, 12], [1.0, 0.1, 0.3, 0.6, 0.05], seed)
    assert set(group[choose(points, 5)].tolist()) == set(range(5))


@pytest.mark.parametrize("count", [6, 12, 24])
def test_it_covers_better_than_chance(count):
    points, _ = mixture([120, 20, 10, 60, 10, 15], [1.0, 0.1, 0.3, 0.6, 0.1, 0.5])
    found = uncovered(points, choose(points, count))
    draw = torch.Generator().manual_seed(1)
    drawn = [uncovered(points, torch.randperm(len(points), generator=draw)[:count].tolist()) for _ in range(20)]
    assert sum(found < each for each in drawn) >= 19


def test_density_counts_and_not_distance_alone():
    """A lone point far from all groups is typical of nothing."""
    points, group = mixture([60, 60], [0.5, 0.5])
    points = torch.cat([points, torch.full((1, 8), -2.0)])
    lone = len(points) - 1
    worth = typicality(points)
    assert worth[lone] < 0.5 * worth[:lone].median()
    first = choose(points, 2)
    assert set(group[first].tolist()) == {0, 1}
    farthest = max(range(len(points)), key=lambda i: min(math.dist(points[i], points[j]) for j in first))
    assert farthest == lone  # where distance alone would go next
    assert lone not in choose(points, 12)


def test_typicality_against_a_loop():
    points, _ = mixture([14, 9], [1.0, 0.2])
    rows = points.tolist()
    near = [sorted((math.dist(p, q), j) for j, q in enumerate(rows) if j != i)[:8] for i, p in enumerate(rows)]
    own = [sum(distance for distance, _ in each) / 8 for each in near]
    expected = [min(1.0, sum(own[j] for _, j in each) / 8 / mine) for each, mine in zip(near, own, strict=True)]
    assert typicality(points.double()).tolist() == pytest.approx(expected, rel=1e-5)


def test_it_is_the_same_every_time_and_a_list_of_rising_positions():
    points, _ = mixture([50, 30], [1.0, 0.5])
    chosen = choose(points, 10)
    assert chosen == choose(points.clone(), 10) == sorted(set(chosen))
    assert len(chosen) == 10 and all(type(each) is int for each in chosen)


def test_among_many_images_neighbours_are_looked_for_in_a_part(monkeypatch):
    points, group = mixture([200, 100, 100], [1.0, 0.2, 0.5])
    every = typicality(points)
    monkeypatch.setattr(choose_images, "_AMONG", 120)
    monkeypatch.setattr(choose_images, "_ROWS", 37)
    part = typicality(points, seed=3)
    assert not torch.equal(part, every) and torch.equal(part, typicality(points, seed=3))
    assert float(torch.corrcoef(torch.stack([part, every]))[0, 1]) > 0.5
    assert set(group[choose(points, 3, seed=3)].tolist()) == {0, 1, 2}


def test_images_that_are_all_equal_are_still_so_many():
    assert len(set(choose(torch.ones(20, 4), 6))) == 6


@pytest.mark.parametrize(("images", "count"), [(1, 1), (3, 3), (3, 9), (2, 1)])
def test_no_more_than_there_are(images, count):
    assert len(choose(torch.eye(3)[:images], count)) == min(images, count)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="1 or more, got 0"):
        choose(torch.eye(3), 0)
    points = torch.eye(3)
    points[2, 1] = math.nan
    with pytest.raises(InputError, match="image 2"):
        choose(points, 1)


@pytest.mark.parametrize("family", ["deit_tiny", "gap", "deit_distilled"])
def test_features_are_what_the_classifier_reads(make_vit, noise, family):
    model = make_vit(family)
    images = torch.from_numpy(noise(3, *model.patch_embed.img_size))
    features = features_of(ReducedViT(model, 2), images, batch=2)
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    # without reduction they are timm's own
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = expected[0] if isinstance(expected, tuple) else expected
    plain = features_of(ReducedViT(model, 0), images, batch=2)
    if family != "deit_distilled":  # whose pre-logits are the mean of two tokens
        assert torch.allclose(plain, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert not torch.allclose(plain, features, atol=1e-4, rtol=0)
    assert not model.head._forward_pre_hooks
