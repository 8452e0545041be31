"""Where training images come from: a folder, or a dataset that timm knows by name."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tocom.runtime.errors import InputError, one_line
from tocom.runtime.preprocess import find_images, load_image

_SIZES_TAKEN = 1000  # files whose sizes tell a folder from another; a million would take minutes on a network disk
_NAMED = re.compile(r"(?P<kind>torch|hfds|hfids|tfds|wds)/[^:]+(:.*)?", re.DOTALL)
_STREAMS = {"hfids": "an iterable Hugging Face dataset", "tfds": "a TFDS stream", "wds": "a WebDataset"}


class Images(Protocol):
    """A map-style collection of images.

    Attributes:
        identity: Tells it from another one.
    """

    identity: str

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int) -> Image.Image:
        """The decoded image."""

    def name(self, index: int) -> str:
        """What a person calls it."""


class FolderImages:
    """The images below a folder.

    Args:
        folder: Searched recursively.

    Raises:
        InputError: If there is no image.
    """

    def __init__(self, folder: Path) -> None:
        paths = find_images([folder])
        self._root = folder if folder.is_dir() else folder.parent
        # one array, not a million objects: a process that loads images would copy them as it counts references
        self._names = np.array([os.fsencode(path.relative_to(self._root)) for path in paths])
        digest = hashlib.sha256(self._names.tobytes())
        for taken in range(min(len(paths), _SIZES_TAKEN)):
            digest.update(f"{paths[taken * len(paths) // min(len(paths), _SIZES_TAKEN)].stat().st_size};".encode())
        self.identity = f"{len(paths)} images, {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Image.Image:
        return load_image(self._root / self.name(index))

    def name(self, index: int) -> str:
        """Path below the folder."""
        return os.fsdecode(self._names[index].item())


class NamedImages:
    """The training split of a dataset on this machine, opened by timm; nothing is downloaded.

    Args:
        name: As for `timm.data.create_dataset`, e.g. "torch/cifar10".
        root: Where it lies; None for the library's own cache.

    Raises:
        InputError: If it cannot be opened.
    """

    def __init__(self, name: str, root: str | None) -> None:
        from timm.data import create_dataset

        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        try:
            dataset: Any = create_dataset(name, root=root, split="train", is_training=True, download=False)
            count = len(dataset)
        except Exception as error:  # timm and the libraries behind it meet the name as it was given
            raise InputError(f"the dataset {name} cannot be opened{f' in {root}' if root else ''}: "
                             f"{one_line(error)[:200] or type(error).__name__}") from error  # fmt: skip
        # timm's own datasets replace what cannot be read by its neighbour and say so nowhere; their readers do not
        self._dataset = getattr(dataset, "reader", dataset)
        self.identity = f"{count} images of {name}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._dataset[index][0]
        return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"


def open_images(where: str) -> Images:
    """Opens training images.

    Args:
        where: A folder, or NAME:ROOT of a dataset that timm knows, such as torch/cifar10:/data or hfds/org/name.

    Raises:
        InputError: If there are no images, or the dataset can only be read from its beginning.
    """
    named = _NAMED.fullmatch(where)
    if named is None or Path(where).exists():
        return FolderImages(Path(where))
    if named["kind"] in _STREAMS:
        raise InputError("images must be readable in any order, so that an interrupted training goes on exactly, but "
                         f"{where} is {_STREAMS[named['kind']]}, which is read from its beginning. Use a folder, "
                         "torch/NAME:ROOT or hfds/NAME.")  # fmt: skip
    name, _, root = where.partition(":")
    return NamedImages(name, root or None)
