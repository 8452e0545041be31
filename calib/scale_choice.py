"""Labelled images -> the delta scale of every degree (ToCom chooses it per task, from the scales below).

The rule: the scale with the best top-1; of several, the one closest to the scale the compensator was trained with, and
of two equally close, the smaller. Merging only (scale 0) is measured too, and taken only where it beats them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tocom.calib.labelled import LabelledImages
from tocom.calib.scales_file import ScaleChoice, ScaleChoices, Trial, name_of_set
from tocom.runtime.errors import InputError

PAPER_SCALES = (0.05, 0.08, 0.1, 0.12, 0.15)
MERGING_ONLY = 0.0
_CHUNK_BYTES = 512 << 20  # of prepared pixels held at a time

Classifier = Callable[[Tensor], Tensor]
"""Normalized images [B, 3, H, W] -> logits [B, classes]."""

ClassifierAt = Callable[[int, float], Classifier]
"""(target degree, delta scale) -> the network at that degree, compensated at that scale."""

Progress = Callable[[int, int], None]
"""(degree, how many further images are done, each counted once per scale)."""


@dataclass(frozen=True)
class Search:
    """What to try, and on what.

    Attributes:
        images: Labelled images, none of which may be among those that are reported on.
        scales: Delta scales to try; scale 0 is measured besides.
        training_scale: The scale that the compensator was trained with, which decides between equals.
        batch: Images per forward pass B.

    Raises:
        InputError: If the images have no labels, or a scale is not finite or none is there.
    """

    images: LabelledImages
    scales: tuple[float, ...] = PAPER_SCALES
    training_scale: float = 0.1
    batch: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(sorted({float(scale) for scale in self.scales} - {MERGING_ONLY})))
        if not self.scales or not all(map(math.isfinite, self.scales)):
            raise InputError(f"scales to try must be finite numbers other than 0, got {list(self.scales)}.")
        if self.images.labels is None:
            folders = sorted({path.absolute().parent.name for path in self.images.paths})
            raise InputError("a scale is chosen on images in one folder per class, each named like a class of the "
                             f"model or its index, got images in {', '.join(map(repr, folders[:3]))}"
                             f"{', ...' if len(folders) > 3 else ''}.")  # fmt: skip


def choose_scales(
    search: Search,
    degrees: Iterable[int],
    classifier_at: ClassifierAt,
    known: ScaleChoices,
    folder: Path,
    on_progress: Progress,
) -> ScaleChoices:
    """Chooses for every degree, and writes scales.json after each, so that what is finished survives an interruption.

    Args:
        search: What to try, and on what.
        degrees: Target degrees.
        classifier_at: Makes the network of a degree and scale.
        known: Choices so far, for the same network; one made on the same images and scales is kept.
        folder: Where scales.json belongs.
        on_progress: Told as images are done.

    Returns:
        The choices so far and the new ones.

    Raises:
        InputError: If an image cannot be read, or a scale cannot be applied.
        OSError: If the file cannot be written.
    """
    hashes = search.images.content_hashes()
    name = name_of_set(hashes, search.images.labels)
    scales = (MERGING_ONLY, *search.scales)
    prepared = _Prepared(search.images, search.batch)
    for degree in degrees:
        before = known.degrees.get(degree)
        if before and before.image_set == name and {trial.scale for trial in before.tried} == set(scales):
            on_progress(degree, len(search.images) * len(scales))
            continue
        tried = _measure(degree, scales, classifier_at, prepared, on_progress)
        choice = ScaleChoice(best_scale(tried, search.training_scale), tried, len(search.images), name)
        known = known.with_choice(degree, choice, hashes)
        known.write(folder)
    return known


def best_scale(tried: Sequence[Trial], training_scale: float) -> float:
    """Applies the rule.

    >>> trials = [Trial(0.0, 0.8, None), Trial(0.05, 0.8, None), Trial(0.08, 0.9, None), Trial(0.12, 0.9, None)]
    >>> best_scale(trials, training_scale=0.1), best_scale(trials[:2], training_scale=0.1)
    (0.08, 0.05)
    """

    def rank(trial: Trial) -> tuple[float, bool, float, float]:
        distance = round(abs(trial.scale - training_scale), 12)  # 0.08 and 0.12 are equally close to 0.1
        return -trial.top1, trial.scale == MERGING_ONLY, distance, trial.scale

    return min(tried, key=rank).scale


class _Prepared:
    """Prepared images in chunks of bounded size; kept where one chunk holds them all."""

    def __init__(self, images: LabelledImages, batch: int) -> None:
        self.images = images
        self.batch = batch
        self.length = max(batch, _CHUNK_BYTES // (4 * math.prod(images.spec.size)))
        self.kept: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields float32 [n, 3, H, W] and int64 [n]."""
        count = len(self.images)
        labels = torch.tensor(self.images.labels)
        for start in range(0, count, self.length):
            chosen = range(start, min(start + self.length, count))
            pixels = self.kept
            if pixels is None:
                pixels = torch.from_numpy(self.images.pixels(chosen))
                if len(chosen) == count:
                    self.kept = pixels
            yield pixels, labels[start : chosen.stop]


def _measure(
    degree: int,
    scales: Sequence[float],
    classifier_at: ClassifierAt,
    prepared: _Prepared,
    on_progress: Progress,
) -> tuple[Trial, ...]:
    """Every scale on the same images, each prepared once; in rising order of scale."""
    right, loss = dict.fromkeys(scales, 0), dict.fromkeys(scales, 0.0)
    for pixels, labels in prepared:
        for scale in scales:
            classifier = classifier_at(degree, scale)
            for part, expected in zip(pixels.split(prepared.batch), labels.split(prepared.batch), strict=True):
                with torch.inference_mode():
                    logits = classifier(part).double().cpu()
                    guessed = (logits.argmax(dim=1) == expected) & logits.isfinite().all(dim=1)
                    right[scale] += int(guessed.sum())
                    loss[scale] += functional.cross_entropy(logits, expected, reduction="sum").item()
                on_progress(degree, len(part))
    count = len(prepared.images)
    return tuple(
        Trial(scale, right[scale] / count, loss[scale] / count if math.isfinite(loss[scale]) else None)
        for scale in sorted(scales)
    )
