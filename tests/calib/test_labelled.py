"""Labelled images: which class each has, which of them are taken, and top-1 on them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tocom.calib.labelled import LabelledImages
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import InputSpec

SPEC = InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
NAMES = ("cat", "dog", "eel")


@pytest.fixture
def make_folder(tmp_path):
    def make(*names: str, each: int = 2):
        for number, name in enumerate(names):
            (tmp_path / "images" / name).mkdir(parents=True)
            for index in range(each):
                pixels = np.full((8, 8, 3), 40 * number + index, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
        return tmp_path / "images"

    return make


def test_folders_named_like_classes_are_labels(make_folder):
    found = LabelledImages.below(make_folder(*NAMES), SPEC, NAMES, 3, limit=100)
    assert found.labels == (0, 0, 1, 1, 2, 2)
    assert len(found) == 6


def test_folders_named_like_indices_are_labels(make_folder):
    assert LabelledImages.below(make_folder("0", "2", "10"), SPEC, None, 11, 100).labels == (0, 0, 10, 10, 2, 2)


@pytest.mark.parametrize("names", [("cat", "wolf"), ("0", "3"), ("cat", "1")])
def test_one_folder_that_is_no_class_leaves_all_without_labels(make_folder, names):
    assert LabelledImages.below(make_folder(*names), SPEC, NAMES, 3, 100).labels is None


def test_a_name_of_two_classes_labels_nothing(make_folder):
    """ImageNet has two classes named crane: a folder of that name could be either."""
    assert LabelledImages.below(make_folder("crane", "dog"), SPEC, ("crane", "dog", "crane"), 3, 100).labels is None


def test_more_images_than_the_limit_are_evenly_spread(make_folder):
    folder = make_folder(*NAMES, each=10)
    found = LabelledImages.below(folder, SPEC, NAMES, 3, limit=6)
    assert found.labels == (0, 0, 1, 1, 2, 2)
    assert len(set(found.paths)) == 6
    assert len(LabelledImages.below(folder, SPEC, NAMES, 3, limit=30)) == 30


def test_the_fingerprint_sees_names_and_labels_but_not_where_the_folder_lies(make_folder, tmp_path):
    folder = make_folder(*NAMES)
    one = LabelledImages.below(folder, SPEC, NAMES, 3, 100).fingerprint
    assert LabelledImages.below(folder, SPEC, None, 3, 100).fingerprint != one
    assert LabelledImages.below(folder, SPEC, NAMES, 3, 5).fingerprint != one
    folder.rename(tmp_path / "elsewhere")
    assert LabelledImages.below(tmp_path / "elsewhere", SPEC, NAMES, 3, 100).fingerprint == one


def test_top1_is_the_share_of_right_guesses(make_folder):
    found = LabelledImages.below(make_folder(*NAMES, each=20), SPEC, NAMES, 3, 100)
    batches = []

    def always_dog_but_once(pixels):
        batches.append(len(pixels))
        logits = np.tile(np.array([0.0, 1.0, 0.5], np.float32), (len(pixels), 1))
        if len(batches) == 1:
            logits[0] = [2, 0, 0]
        return logits

    assert found.top1(always_dog_but_once) == 21 / 60
    assert batches == [32, 28]
    shades = found.pixels([0, 20, 40])[:, 0, 0, 0] * 255
    assert shades.round().tolist() == [0, 40, 80]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="must hold images"):
        LabelledImages.below(tmp_path, SPEC, None, 3, 100)
