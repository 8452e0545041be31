"""Where training images come from."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torchvision
from PIL import Image

from tocom.calib.distill.image_source import FolderImages, open_images
from tocom.runtime.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for number, shade in enumerate((10, 60, 110)):
        below = tmp_path / "images" / f"class{number % 2}"
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(below / f"{number}.png")
    return tmp_path / "images"


def test_a_folder(folder):
    images = open_images(str(folder))
    assert len(images) == 3
    assert [images.name(index) for index in range(3)] == ["class0/0.png", "class0/2.png", "class1/1.png"]
    assert [images[index].getpixel((0, 0)) for index in range(3)] == [(10,) * 3, (110,) * 3, (60,) * 3]
    assert pickle.loads(pickle.dumps(images)).name(2) == "class1/1.png"


def test_a_folders_identity_is_its_names_and_sizes(folder):
    before = open_images(str(folder)).identity
    assert FolderImages(folder).identity == before and before.startswith("3 images")
    Image.fromarray(np.zeros((90, 9, 3), np.uint8)).save(folder / "class0" / "0.png")
    other_size = open_images(str(folder)).identity
    (folder / "class0" / "0.png").rename(folder / "class0" / "9.png")
    assert len({before, other_size, open_images(str(folder)).identity}) == 3


def test_a_dataset_by_name(folder):
    """The folder once more, through timm and torchvision: labelled items, in torchvision's order."""
    images = open_images(f"torch/image_folder:{folder}")
    own = open_images(str(folder))
    assert len(images) == 3 and images.identity == "3 images of torch/image_folder"
    assert [images[index].tobytes() for index in range(3)] == [own[index].tobytes() for index in range(3)]
    assert images.name(1) == "image 1"


def test_a_folder_with_such_a_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "torch" / "mine").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "torch" / "mine" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_images("torch/mine").name(0) == "a.png"


@pytest.mark.parametrize("where", ["wds/shards:/data", "tfds/imagenet", "hfids/org/name", "wds/a/b"])
def test_streams_are_refused_with_the_reason(where):
    with pytest.raises(
        InputError, match="any order, so that an interrupted training goes on exactly, but .* read from"
    ):
        open_images(where)


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/no_such", "hfds/no/such"])
def test_a_dataset_that_is_not_here_is_refused(tmp_path, name, monkeypatch):
    def download(*_: object, **__: object) -> None:
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    with pytest.raises(InputError, match=f"the dataset {name} cannot be opened in .*: ") as caught:
        open_images(f"{name}:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="must hold images"):
        open_images(str(tmp_path))
    with pytest.raises(InputError, match="there is no"):
        open_images(str(tmp_path / "nowhere"))
