"""Images to measure top-1 on: a folder of images, labelled by the folders they lie in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import InputSpec
from tocom.runtime.preprocess import find_images, load_image, preprocess

_BATCH = 32


@dataclass(frozen=True)
class LabelledImages:
    """Images, how they are prepared, and their classes where the folders tell.

    Attributes:
        paths: The images.
        labels: Class index of each; None unless every image lies in a folder named like a class, or like its index.
        spec: How they are prepared.
        fingerprint: Hash of names, sizes and labels, to know a repeated measurement by.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    spec: InputSpec
    fingerprint: str

    @classmethod
    def below(
        cls, folder: Path, spec: InputSpec, class_names: Sequence[str] | None, classes: int, limit: int
    ) -> LabelledImages:
        """Finds the images below a folder; of more than `limit`, an evenly spread selection.

        Raises:
            InputError: If there is no image.
        """
        paths = find_images([folder])
        if len(paths) > limit:
            paths = [paths[index * len(paths) // limit] for index in range(limit)]
        labels = _labels(paths, class_names, classes)
        digest = hashlib.sha256()
        for index, path in enumerate(paths):
            label = None if labels is None else labels[index]
            name = path.relative_to(folder) if folder.is_dir() else path.name
            digest.update(f"{name}:{path.stat().st_size}:{label};".encode())
        return cls(tuple(paths), labels, spec, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """Prepared images, float32 [B, 3, H, W]."""
        return np.stack([preprocess(load_image(self.paths[index]), self.spec) for index in indices])

    def content_hashes(self) -> tuple[str, ...]:
        """What every image file holds: the first 16 hexadecimal digits of the sha256 of its bytes.

        Raises:
            OSError: If a file cannot be read.
        """
        return tuple(sha256_file(path)[:16] for path in self.paths)

    def top1(self, infer: Callable[[np.ndarray], np.ndarray]) -> float:
        """Share of images whose largest logit is their label's, 0..1.

        Args:
            infer: float32 [B, 3, H, W] -> logits [B, classes].
        """
        right = 0
        for start in range(0, len(self), _BATCH):
            chosen = range(start, min(start + _BATCH, len(self)))
            guesses = infer(self.pixels(chosen)).argmax(axis=1)
            right += sum(int(guess) == self.labels[index] for guess, index in zip(guesses, chosen, strict=True))
        return right / len(self)


def _labels(paths: Sequence[Path], class_names: Sequence[str] | None, classes: int) -> tuple[int, ...] | None:
    times = Counter(class_names)
    by_name = {name: index for index, name in enumerate(class_names or ()) if times[name] == 1}  # else it is not told
    by_index = {str(index): index for index in range(classes)}
    for known in (by_name, by_index):
        labels = [known.get(path.absolute().parent.name) for path in paths]
        if None not in labels:
            return tuple(labels)
    return None
