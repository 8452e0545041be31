"""The choice of a scale on images whose answers are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tocom.calib.scale_choice
from tocom.calib.labelled import LabelledImages
from tocom.calib.scale_choice import Search, best_scale, choose_scales
from tocom.calib.scales_file import ChosenFor, ScaleChoices, Trial
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import InputSpec

SPEC = InputSpec((3, 8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
NOTHING = ScaleChoices(ChosenFor("a" * 64, "b" * 64, 0, "constant", "merge", SPEC), {}, {})
COUNT = 10


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Ten images, the n-th of shade n; the first five of class 0."""
    for shade in range(COUNT):
        folder = tmp_path / "images" / str(shade // 5)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(folder / f"{shade}.png")
    return LabelledImages.below(tmp_path / "images", SPEC, None, 2, 100)


def right_on(counts: dict[float, int], calls: list[tuple[int, float, int]] | None = None) -> Callable:
    """A network that is right on the first `counts[scale]` images, and as sure of every answer."""

    def at(degree: int, scale: float) -> Callable[[Tensor], Tensor]:
        def classify(pixels: Tensor) -> Tensor:
            if calls is not None:
                calls.append((degree, scale, len(pixels)))
            shades = (pixels[:, 0, 0, 0] * 255).round().long()
            answers = (shades // 5) ^ (shades >= counts[scale])
            return torch.nn.functional.one_hot(answers, 2).float()

        return classify

    return at


def no_progress(_degree: int, _images: int) -> None:
    """Tells nobody."""


def trials(shares: dict[float, float]) -> list[Trial]:
    return [Trial(scale, share, None) for scale, share in shares.items()]


@pytest.mark.parametrize(
    ("shares", "training_scale", "chosen"),
    [
        ({0.0: 0.5, 0.05: 0.6, 0.1: 0.7, 0.15: 0.8}, 0.1, 0.15),  # the best
        ({0.0: 0.8, 0.05: 0.8, 0.08: 0.7, 0.15: 0.8}, 0.1, 0.05),  # equal and equally close: the smaller
        ({0.0: 0.8, 0.05: 0.8, 0.12: 0.8, 0.15: 0.8}, 0.1, 0.12),  # equal: the closest
        ({0.0: 0.8, 0.05: 0.8, 0.12: 0.8, 0.15: 0.8}, 0.3, 0.15),
        ({0.0: 0.8, 0.08: 0.8, 0.12: 0.8}, 0.1, 0.08),  # equally close, though not in binary fractions
        ({0.0: 0.81, 0.05: 0.8, 0.12: 0.8}, 0.1, 0.0),  # merging only, where it beats all
        ({0.0: 0.8, 0.05: 0.7, 0.12: 0.8}, 0.0, 0.12),  # not where one is as good
        ({-0.1: 0.9, 0.0: 0.8, 0.12: 0.8}, 0.1, -0.1),
    ],
)
def test_the_rule(shares: dict[float, float], training_scale: float, chosen: float) -> None:
    assert best_scale(trials(shares), training_scale) == chosen
    assert best_scale(trials(shares)[::-1], training_scale) == chosen


@pytest.mark.parametrize(("chunk", "batch"), [(1 << 20, 4), (1 << 20, 100), (4 * 8 * 8 * 3 * 3, 2)])
def test_shares_and_losses(
    images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, batch: int
) -> None:
    """Whatever the batch, and whether the images fit into memory at once or not."""
    monkeypatch.setattr(tocom.calib.scale_choice, "_CHUNK_BYTES", chunk)
    counts = {0.0: 4, 0.05: 9, 0.2: 7}
    told: list[int] = []
    search = Search(images, (0.2, 0.05, 0.0, 0.05), batch=batch)
    known = choose_scales(search, [3], right_on(counts), NOTHING, tmp_path, lambda _, further: told.append(further))
    choice = known.degrees[3]
    assert (choice.scale, choice.images) == (0.05, COUNT)
    assert [(trial.scale, trial.top1) for trial in choice.tried] == [(0.0, 0.4), (0.05, 0.9), (0.2, 0.7)]
    for trial in choice.tried:
        surely, hardly = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
        assert trial.cross_entropy == pytest.approx(trial.top1 * surely + (1 - trial.top1) * hardly, abs=1e-12)
    assert sum(told) == 3 * COUNT
    assert ScaleChoices.read(tmp_path) == known
    assert known.images_of([3]) == set(images.content_hashes()) and len(known.images_of([3])) == COUNT


def test_images_are_decoded_once(images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    load = tocom.calib.labelled.load_image
    monkeypatch.setattr("tocom.calib.labelled.load_image", lambda path: (decoded.append(path), load(path))[1])
    counts = dict.fromkeys((0.0, 0.05, 0.1), 5)
    choose_scales(Search(images, (0.05, 0.1)), [2, 4], right_on(counts), NOTHING, tmp_path, no_progress)
    assert sorted(decoded) == sorted(images.paths)


def test_logits_that_are_not_finite_are_wrong(images: LabelledImages, tmp_path: Path) -> None:
    def at(_degree: int, scale: float) -> Callable[[Tensor], Tensor]:
        if scale == 0.3:
            return lambda pixels: torch.full((len(pixels), 2), math.nan)
        if scale == 0.2:
            return lambda pixels: torch.tensor([[math.inf, 0.0]]).expand(len(pixels), 2)
        return lambda pixels: torch.tensor([[0.0, 1.0]]).expand(len(pixels), 2)

    choice = choose_scales(Search(images, (0.3, 0.2, 0.1)), [8], at, NOTHING, tmp_path, no_progress).degrees[8]
    assert [(trial.top1, trial.cross_entropy is None) for trial in choice.tried] == [
        (0.5, False),
        (0.5, False),
        (0.0, True),
        (0.0, True),
    ]
    assert choice.scale == 0.1
    assert ScaleChoices.read(tmp_path).degrees[8] == choice


def test_finished_degrees_are_kept(images: LabelledImages, tmp_path: Path) -> None:
    calls: list[tuple[int, float, int]] = []
    search = Search(images, (0.05, 0.1))
    network = right_on({0.0: 1, 0.05: 9, 0.1: 8, 0.2: 10}, calls)

    def interrupted(degree: int, scale: float) -> Callable[[Tensor], Tensor]:
        if (degree, scale) == (4, 0.1):
            raise KeyboardInterrupt
        return network(degree, scale)

    with pytest.raises(KeyboardInterrupt):
        choose_scales(search, [2, 4, 8], interrupted, NOTHING, tmp_path, no_progress)
    kept = ScaleChoices.read(tmp_path)
    assert set(kept.degrees) == {2}
    calls.clear()
    told: list[int] = []
    known = choose_scales(search, [2, 4, 8], network, kept, tmp_path, lambda _, further: told.append(further))
    assert {degree for degree, _, _ in calls} == {4, 8} and set(known.degrees) == {2, 4, 8}
    assert sum(told) == 3 * 3 * COUNT  # what is kept counts as done
    calls.clear()
    assert choose_scales(search, [2, 4, 8], network, known, tmp_path, no_progress) == known and not calls
    more = choose_scales(Search(images, (0.05, 0.1, 0.2)), [4], network, known, tmp_path, no_progress)
    assert {degree for degree, _, _ in calls} == {4} and more.degrees[4].scale == 0.2  # other scales: measured again
    assert more.degrees[2] == known.degrees[2]


def test_other_images_or_labels_are_measured_again(images: LabelledImages, tmp_path: Path) -> None:
    calls: list[tuple[int, float, int]] = []
    network = right_on({0.0: 1, 0.1: 8}, calls)
    known = choose_scales(Search(images, (0.1,)), [2], network, NOTHING, tmp_path, no_progress)
    folder = tmp_path / "images"
    folder.rename(tmp_path / "elsewhere")
    moved = LabelledImages.below(tmp_path / "elsewhere", SPEC, None, 2, 100)
    calls.clear()
    assert choose_scales(Search(moved, (0.1,)), [2], network, known, tmp_path, no_progress) == known and not calls
    fewer = LabelledImages.below(tmp_path / "elsewhere", SPEC, None, 2, 4)
    assert choose_scales(Search(fewer, (0.1,)), [2], network, known, tmp_path, no_progress).degrees[2].images == 4
    (tmp_path / "elsewhere/0/0.png").rename(tmp_path / "elsewhere/1/0.png")
    relabelled = LabelledImages.below(tmp_path / "elsewhere", SPEC, None, 2, 100)
    calls.clear()
    choose_scales(Search(relabelled, (0.1,)), [2], network, known, tmp_path, no_progress)
    assert calls


def test_what_cannot_be_searched_is_refused(images: LabelledImages, tmp_path: Path) -> None:
    for scales in ((), (0.0,), (0.1, math.nan), (math.inf,)):
        with pytest.raises(InputError, match="finite numbers other than 0"):
            Search(images, scales)
    (tmp_path / "images/1").rename(tmp_path / "images/cat")
    unlabelled = LabelledImages.below(tmp_path / "images", SPEC, None, 2, 100)
    with pytest.raises(InputError, match="one folder per class.*got images in '0', 'cat'"):
        Search(unlabelled)
