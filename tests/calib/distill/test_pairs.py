"""Pairs: every division of a step gives the same images, and what cannot be read is replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tocom.calib.distill.augmentation import Augmentation
from tocom.calib.distill.draws import image_at
from tocom.calib.distill.pairs import Division, ImagePairs, LoadedPairs, load
from tocom.runtime.errors import InputError


class Photos:
    """Random photographs; some of them cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 36, 3), np.uint8)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self.broken:
            raise OSError(f"photo {index} is torn")
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"photo {index}"


class Numbered:
    """Tensors that tell which image they are."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 2, 2), float(index)), 7


@pytest.fixture
def augmented(make_tiny) -> ImagePairs:
    augmentation = Augmentation.for_model(make_tiny("vit_tiny_patch16_224", img_size=32), "timm", erasing=0.5)
    return ImagePairs(Photos(9, broken=(4,)), augmentation.prepare, augmentation.mix, seed=3)


def run(source, batch: int, accumulate: int, processes: int, steps: int = 3, workers: int = 0) -> list[LoadedPairs]:
    """What all processes load in a step, put together in the order of the total batch."""
    loaded = {}
    for rank in range(processes):
        division = Division(batch, accumulate, processes, rank)
        batches = load(source, division.pairs(0, steps), workers=workers, pin_memory=False)
        for number, part in enumerate(batches):
            step, turn = divmod(number, accumulate)
            loaded[step, division.first_image(turn)] = part
    assert {first for step, first in loaded if step == 0} == set(range(0, batch * accumulate * processes, batch))
    steps_of = [[loaded[key] for key in sorted(loaded) if key[0] == step] for step in range(steps)]
    return [
        LoadedPairs(torch.cat([part.images for part in parts]), sum((part.unreadable for part in parts), ()))
        for parts in steps_of
    ]


def test_every_division_gives_the_same_images_in_the_same_order(augmented):
    whole = run(augmented, 12, 1, 1)
    assert any(part.unreadable == ("photo 4",) for part in whole)  # one epoch and a third: it is met
    for division in ((6, 2, 1), (2, 6, 1), (4, 1, 3), (2, 3, 2), (2, 1, 6)):
        for part, expected in zip(run(augmented, *division), whole, strict=True):
            assert torch.equal(part.images, expected.images), division
            assert part.unreadable == expected.unreadable


def test_loading_processes_give_the_same_images(augmented):
    for part, expected in zip(run(augmented, 6, 2, 1, workers=2), run(augmented, 12, 1, 1), strict=True):
        assert torch.equal(part.images, expected.images)
        assert part.unreadable == expected.unreadable


def test_a_run_can_begin_at_any_step(augmented):
    whole = run(augmented, 4, 1, 1, steps=5)
    later = list(load(augmented, Division(4).pairs(3, 5), workers=0, pin_memory=False))
    assert [torch.equal(part.images, expected.images) for part, expected in zip(later, whole[3:], strict=True)] == [
        True,
        True,
    ]


def test_a_pair_is_augmented_anew_every_time_it_comes_round(augmented):
    first, second = (augmented[number].images for number in (0, 9))  # pair 9 begins the third epoch
    assert not torch.equal(first, second)
    other = ImagePairs(augmented.images, augmented.prepare, augmented.mix, seed=4)
    assert not torch.equal(other[0].images, first)


def test_tensors_are_taken_as_they_are_and_labels_left():
    pairs = ImagePairs(Numbered(), prepare=None, mix=None, seed=0)
    found = torch.cat([pairs[number].images for number in range(5)])[:, 0, 0, 0].int().tolist()
    assert found == [image_at(position, 5, seed=0) for position in range(10)]
    assert sorted(found[:5]) == sorted(found[5:]) == list(range(5))


def test_what_cannot_be_read_is_replaced_by_another_image():
    photos = Photos(5, broken=(1, 3))
    pairs = ImagePairs(photos, prepare=lambda image: torch.tensor(np.array(image)).permute(2, 0, 1), mix=None, seed=0)
    readable = {photos.pixels[index].tobytes() for index in (0, 2, 4)}
    named = []
    for number in range(5):
        loaded = pairs[number]
        named += loaded.unreadable
        assert all(image.permute(1, 2, 0).contiguous().numpy().tobytes() in readable for image in loaded.images)
        assert torch.equal(pairs[number].images, loaded.images)
    assert set(named) == {"photo 1", "photo 3"} and len(named) >= 4  # each is met twice in two epochs


def test_an_augmentation_that_fails_is_not_taken_for_an_unreadable_image():
    def fail(image):
        raise ValueError("bits must be between 1 and 8")

    with pytest.raises(ValueError, match="bits"):
        ImagePairs(Photos(5), prepare=fail, mix=None, seed=0)[0]


def test_too_many_unreadable_images_are_refused():
    def pairs(count, broken):
        return ImagePairs(Photos(count, tuple(broken)), prepare=None, mix=None, seed=0)

    pairs(10, range(5)).require_readable()
    with pytest.raises(InputError, match="6 of the first 10 are not: photo . is torn"):
        pairs(10, range(6)).require_readable()
    with pytest.raises(InputError, match="1 of the first 1 "):
        pairs(1, [0]).require_readable()
    turns = iter([range(0, 2)])
    with pytest.raises(InputError, match="none of 100 images could be read"):
        list(load(pairs(4, range(4)), turns, workers=0, pin_memory=False))


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (4, 3, 8)])
def test_a_source_must_give_what_is_asked_for(shape):
    class Source:
        def batch(self, first_pair: int, pairs: int) -> torch.Tensor:
            return torch.zeros(shape)

    with pytest.raises(InputError, match=r"must give \[4, 3, H, W\] for 2 pairs, got \[[34], 3"):
        list(load(Source(), Division(4).pairs(0, 1), workers=0, pin_memory=False))
