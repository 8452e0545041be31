"""Dropout by counting: its statistics, and that it depends on the place alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tocom.dropout import DropoutKey

RATE = 0.1


def dropped(key: DropoutKey, shape=(8, 65, 32), block=0, which="q") -> torch.Tensor:
    """Where the mask is zero, as 0 and 1."""
    return (key.mask(torch.empty(shape), block, which) == 0).double()


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two masks, in standard deviations of the correlation of as many independent draws."""
    found = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    return float(found) * math.sqrt(one.numel())


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_mean_is_kept(rate):
    shares = torch.stack([dropped(DropoutKey(3, step, rate=rate)).mean() for step in range(20)])
    deviation = math.sqrt(rate * (1 - rate) / (8 * 65 * 32))
    assert abs(shares.mean() - rate) < 4 * deviation / math.sqrt(20)
    assert 0.5 * deviation < shares.std() < 1.6 * deviation  # as independent draws vary, no less and no more
    mask = DropoutKey(3, 0, rate=rate).mask(torch.empty(8, 65, 32), 0, "q")
    assert mask.max() == pytest.approx(1 / (1 - rate)) and mask.mean() == pytest.approx(
        1, abs=5 * deviation / (1 - rate)
    )


def test_no_coordinate_is_dropped_more_often_than_others():
    masks = torch.stack([dropped(DropoutKey(0, step)) for step in range(60)])  # [steps, B, N, R]
    for axis, name in enumerate(("step", "image", "token", "rank")):
        others = [each for each in range(4) if each != axis]
        shares = masks.mean(dim=others)
        deviation = math.sqrt(RATE * (1 - RATE) / (masks.numel() / masks.shape[axis]))
        assert (shares - RATE).abs().max() < 5 * deviation, name


def test_neighbours_along_every_coordinate_are_independent():
    key = DropoutKey(seed=7, step=11)
    mask = dropped(key, (16, 65, 32))
    neighbours = {
        "image": (mask[:-1], mask[1:]),
        "token": (mask[:, :-1], mask[:, 1:]),
        "rank": (mask[..., :-1], mask[..., 1:]),
        "rank by two": (mask[..., :-2], mask[..., 2:]),
        "step": (mask, dropped(DropoutKey(7, 12), (16, 65, 32))),
        "seed": (mask, dropped(DropoutKey(8, 11), (16, 65, 32))),
        "far seed": (mask, dropped(DropoutKey(7 + (1 << 32), 11), (16, 65, 32))),
        "block": (mask, dropped(key, (16, 65, 32), block=1)),
        "q and v": (mask, dropped(key, (16, 65, 32), which="v")),
        # a sum of coordinates as the hash's input would show here
        "token against rank": (mask[:, :-1, 1:], mask[:, 1:, :-1]),
        "image against token": (mask[:-1, 1:], mask[1:, :-1]),
        "step against image": (mask[1:], dropped(DropoutKey(7, 12), (16, 65, 32))[:-1]),
        "block against step": (dropped(key, (16, 65, 32), block=1), dropped(DropoutKey(7, 12), (16, 65, 32))),
    }
    for name, (one, other) in neighbours.items():
        assert abs(correlation(one, other)) < 4.5, name


def test_a_part_of_a_batch_has_its_part_of_the_mask():
    whole = DropoutKey(1, 2, 0, RATE).mask(torch.empty(12, 9, 8), 3, "v")
    parts = [DropoutKey(1, 2, first, RATE).mask(torch.empty(4, 9, 8), 3, "v") for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    shorter = DropoutKey(1, 2, 0, RATE).mask(torch.empty(12, 5, 8), 3, "v")
    assert torch.equal(shorter, whole[:, :5])


def test_the_mask_is_this_hash():
    """Against the same integers computed one by one, with Python's own."""

    def mixed(x: int) -> int:
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
        return x ^ (x >> 16)

    key = DropoutKey(seed=(5 << 32) + 9, step=4, first_image=6, rate=0.3)
    found = key.mask(torch.empty(2, 3, 4, dtype=torch.float64), block=2, which="v")
    for image, token, rank in itertools.product(range(2), range(3), range(4)):
        place = 0x9E3779B9
        for number in (9, 5, 4, 2, 1, 6 + image, token, rank):
            place = mixed((place + number) % 2**32)
        assert found[image, token, rank] == (place >= round(0.3 * 2**32)) / 0.7
