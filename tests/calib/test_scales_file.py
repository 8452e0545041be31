"""scales.json: what is written is read again, and what is not such a file is refused in one line."""

from __future__ import annotations

import doctest
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tocom.calib.scales_file import ChosenFor, ScaleChoice, ScaleChoices, Trial, name_of_set
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import InputSpec

SPEC = InputSpec((3, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9, "center")
MADE_FOR = ChosenFor("a" * 64, "b" * 64, 0, "constant", "merge", SPEC)
IMAGES = ("00000000000000aa", "00000000000000bb")
TRIED = (Trial(0.0, 0.5, 1.25), Trial(0.05, 0.5, None), Trial(0.1, 1.0, 0.1))
CHOICES = ScaleChoices(MADE_FOR, {}, {}).with_choice(8, ScaleChoice(0.1, TRIED, 2, "first"), IMAGES)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert ScaleChoices.read(tmp_path) is None
    assert ScaleChoices.read(tmp_path / "nowhere") is None
    CHOICES.write(tmp_path)
    assert ScaleChoices.read(tmp_path) == CHOICES
    assert [file.name for file in tmp_path.iterdir()] == ["scales.json"]
    assert json.loads((tmp_path / "scales.json").read_text()) == {
        "format": 1,
        "checkpoint_sha256": "a" * 64,
        "compensator_sha256": "b" * 64,
        "source_degree": 0,
        "schedule": "constant",
        "reduction": "merge",
        "input": SPEC.to_json(),
        "degrees": {
            "8": {
                "scale": 0.1,
                "tried": [
                    {"scale": 0.0, "top1": 0.5, "cross_entropy": 1.25},
                    {"scale": 0.05, "top1": 0.5, "cross_entropy": None},
                    {"scale": 0.1, "top1": 1.0, "cross_entropy": 0.1},
                ],
                "images": 2,
                "image_set": "first",
            }
        },
        "image_sets": {"first": list(IMAGES)},
    }


def test_images_that_no_choice_rests_on_any_more_are_dropped(tmp_path: Path) -> None:
    two = CHOICES.with_choice(4, replace(CHOICES.degrees[8], image_set="second"), ["00000000000000cc"])
    assert two.images_of([8]) == set(IMAGES) and two.images_of([4, 8]) == {*IMAGES, "00000000000000cc"}
    assert two.images_of([]) == set()
    anew = two.with_choice(8, two.degrees[4], ["00000000000000cc"])
    anew.write(tmp_path)
    assert ScaleChoices.read(tmp_path).image_sets == {"second": ("00000000000000cc",)}


def test_a_set_has_a_name_of_images_and_labels_in_any_order() -> None:
    assert name_of_set(IMAGES, (0, 1)) == name_of_set(IMAGES[::-1], (1, 0))
    assert name_of_set(IMAGES, (0, 1)) != name_of_set(IMAGES, (1, 0))


def test_differences_are_named() -> None:
    assert not MADE_FOR.differences(MADE_FOR)
    other = replace(MADE_FOR, source_degree=4, checkpoint_sha256="c" * 64)
    assert MADE_FOR.differences(other) == "another checkpoint; source degree 0, not 4"


CHANGES: dict[str, Callable[[dict], object]] = {
    "format": lambda content: content.update(format=2),
    "checkpoint_sha256": lambda content: content.update(checkpoint_sha256="abc"),
    "source_degree": lambda content: content.update(source_degree=-1),
    "input.size": lambda content: content["input"].update(size=[3, 0, 8]),
    "reduction": lambda content: content.pop("reduction"),
    "degrees.8.scale": lambda content: content["degrees"]["8"].update(scale=0.12),
    "tried[1].top1": lambda content: content["degrees"]["8"]["tried"][1].update(top1=1.5),
    "degrees.8.image_set": lambda content: content["degrees"]["8"].update(image_set="lost"),
    "a key of degrees": lambda content: content["degrees"].update({"-8": content["degrees"]["8"]}),
    "image_sets.first[0]": lambda content: content.update(image_sets={"first": ["not a hash"]}),
    "image_sets": lambda content: content.update(image_sets=[]),
}


@pytest.mark.parametrize("place", CHANGES)
def test_a_broken_value_is_named(place: str, tmp_path: Path) -> None:
    content = CHOICES.to_json()
    CHANGES[place](content)
    (tmp_path / "scales.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as refused:
        ScaleChoices.read(tmp_path)
    message = str(refused.value)
    assert str(tmp_path / "scales.json") in message and place in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_bytes(content)
    with pytest.raises(InputError, match="scales.json"):
        ScaleChoices.read(tmp_path)


def test_a_folder_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scales.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        ScaleChoices.read(tmp_path)


@pytest.mark.parametrize("name", ["tocom.calib.scales_file", "tocom.calib.scale_choice"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed
