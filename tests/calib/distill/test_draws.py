"""Draws that follow from the seed and a number alone."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from tocom.calib.distill.draws import degrees_at, drawn_for_pair, drawn_for_weights, image_at, replacement_for


def test_degrees_are_different_and_uniform():
    times = 272 * 60
    counts = np.zeros((17, 17))
    for step in range(times):
        counts[degrees_at(step, 16, seed=0)] += 1
    assert np.trace(counts) == 0
    expected = times / 272
    chi_square = ((counts[~np.eye(17, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 271) < 4 * math.sqrt(2 * 271)  # mean and standard deviation of 271 degrees of freedom


def test_degrees_follow_from_seed_and_step():
    first = [degrees_at(step, 16, seed=4) for step in range(40)]
    assert [degrees_at(step, 16, seed=4) for step in reversed(range(40))] == first[::-1]
    assert [degrees_at(step, 16, seed=5) for step in range(40)] != first


def test_every_epoch_has_every_image_once_in_another_order():
    epochs = [[image_at(epoch * 7 + place, 7, seed=0) for place in range(7)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    together = [index for epoch in epochs for index in epoch]
    assert [image_at(place, 7, seed=0) for place in reversed(range(42))] == together[::-1]
    assert [image_at(place, 7, seed=1) for place in range(42)] != together


def test_replacements_are_spread_over_all_images():
    tried = [replacement_for(3, attempt, 10, seed=0) for attempt in range(200)]
    assert set(tried) == set(range(10))
    assert tried == [replacement_for(3, attempt, 10, seed=0) for attempt in range(200)]
    assert tried != [replacement_for(4, attempt, 10, seed=0) for attempt in range(200)]


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_library_draws_by_the_pair_and_goes_on_undisturbed():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    undisturbed = [drawn(), drawn()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    seen = [drawn()]
    inside = {}
    for place in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with drawn_for_pair(place[0], seed=place[1]):
            found = drawn()
        assert inside.setdefault(place, found) == found
    with drawn_for_weights(0):
        inside["weights"] = drawn()
    seen.append(drawn())
    assert seen == undisturbed
    assert all(len({found[library] for found in inside.values()}) == 4 for library in range(3))
