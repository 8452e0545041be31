"""The file `scales.json`: which delta scale was chosen for every degree, on which images, and what else was tried.

Torch-free. A share of right answers that is reported on an image the scale was chosen on is no longer held out; so the
file names every image by the hash of its bytes, wherever it lies and whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tocom.runtime.checked_json import AbsentError, Json, read
from tocom.runtime.errors import one_line
from tocom.runtime.family_files import SCALES
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import InputSpec

FORMAT = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_IMAGE = re.compile(r"[0-9a-f]{16}")
_DEGREE = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class ChosenFor:
    """What a choice holds for.

    Attributes:
        checkpoint_sha256: Hash of the checkpoint's tensors.
        compensator_sha256: Hash of the compensator's tensors.
        source_degree: Degree the checkpoint was fine-tuned at.
        schedule: Name of the schedule family.
        reduction: Name of the token reduction.
        input: How images are prepared, their size included.
    """

    checkpoint_sha256: str
    compensator_sha256: str
    source_degree: int
    schedule: str
    reduction: str
    input: InputSpec

    def differences(self, other: ChosenFor) -> str:
        """What differs from another, in words; empty where nothing does."""
        differences = []
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                plain = field.name in ("source_degree", "schedule", "reduction")
                name = field.name.removesuffix("_sha256").replace("_", " ")
                differences.append(f"{name} {one_line(mine)}, not {one_line(its)}" if plain else f"another {name}")
        return "; ".join(differences)


@dataclass(frozen=True)
class Trial:
    """One scale, measured.

    Attributes:
        scale: Factor on the compensator's delta; 0 is merging only.
        top1: Share of images whose largest logit is their label's, 0..1.
        cross_entropy: Mean over the images, in nats; None where a logit was not finite.
    """

    scale: float
    top1: float
    cross_entropy: float | None

    def standard_error(self, images: int) -> float:
        """Of `top1`, as a share of that many independent images.

        >>> round(Trial(0.1, top1=0.9, cross_entropy=None).standard_error(900), 6)
        0.01
        """
        return math.sqrt(self.top1 * (1 - self.top1) / images)


@dataclass(frozen=True)
class ScaleChoice:
    """The choice for one degree.

    Attributes:
        scale: The scale that was chosen; one of those tried.
        tried: Every scale that was measured, in rising order.
        images: How many images it rests on.
        image_set: Name of the images in the file's "image_sets".
    """

    scale: float
    tried: tuple[Trial, ...]
    images: int
    image_set: str


@dataclass(frozen=True)
class ScaleChoices:
    """All of `scales.json`.

    Attributes:
        made_for: What the choices hold for.
        degrees: Target degree -> its choice.
        image_sets: Name -> the images, each the first 16 hexadecimal digits of the sha256 of its bytes, sorted.
    """

    made_for: ChosenFor
    degrees: Mapping[int, ScaleChoice]
    image_sets: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path | str) -> ScaleChoices | None:
        """Reads the file in a family's folder; None where there is none. Keys it does not know are ignored.

        Raises:
            InputError: The file cannot be read, is broken, or newer than this code.
        """
        try:
            return read(Path(folder) / SCALES, cls.from_json)
        except AbsentError:
            return None

    @classmethod
    def from_json(cls, value: Any) -> ScaleChoices:
        """Reads the parsed file.

        Raises:
            InputError: It is newer than this code, or a key is missing, wrongly typed or contradicts another.
        """
        node = Json(value, "")
        if node.key("format").integer(minimum=1) > FORMAT:
            node.key("format").refuse(f"{FORMAT} or lower for this version (update ToCom, or choose again)")
        made_for = ChosenFor(
            checkpoint_sha256=_matching(node.key("checkpoint_sha256"), _SHA256, "a sha256 of 64 hexadecimal digits"),
            compensator_sha256=_matching(node.key("compensator_sha256"), _SHA256, "a sha256 of 64 hexadecimal digits"),
            source_degree=node.key("source_degree").integer(),
            schedule=node.key("schedule").text(),
            reduction=node.key("reduction").text(),
            input=InputSpec.from_json(node.key("input").value),
        )
        sets = node.key("image_sets").mapping(lambda images: tuple(map(_image, images.items())))
        degrees = {}
        for degree, choice in node.key("degrees").mapping(_choice).items():
            place = Json(degree, "a key of degrees")
            degrees[int(_matching(place, _DEGREE, "a degree, written as a whole number"))] = choice
            if choice.image_set not in sets:
                Json(choice.image_set, f"degrees.{degree}.image_set").refuse("one of the names in image_sets")
        return cls(made_for, degrees, sets)

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads: degrees in rising order, and the image sets that they name."""
        needed = {choice.image_set for choice in self.degrees.values()}
        return {
            "format": FORMAT,
            **self.made_for.__dict__,
            "input": self.made_for.input.to_json(),
            "degrees": {
                str(degree): {**choice.__dict__, "tried": [asdict(trial) for trial in choice.tried]}
                for degree, choice in sorted(self.degrees.items())
            },
            "image_sets": {name: sorted(images) for name, images in sorted(self.image_sets.items()) if name in needed},
        }

    def write(self, folder: Path | str) -> Path:
        """Writes `scales.json` into an existing folder, whole or not at all.

        Returns:
            The file.

        Raises:
            OSError: The file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        return write_atomically(Path(folder) / SCALES, text.encode("utf-8"))

    def with_choice(self, degree: int, choice: ScaleChoice, images: Iterable[str]) -> ScaleChoices:
        """These choices with one more, which takes the place of one for the same degree."""
        sets = {**self.image_sets, choice.image_set: tuple(sorted(set(images)))}
        return ScaleChoices(self.made_for, {**self.degrees, degree: choice}, sets)

    def images_of(self, degrees: Iterable[int]) -> frozenset[str]:
        """The images that the choices of some degrees rest on."""
        names = {self.degrees[degree].image_set for degree in degrees}
        return frozenset(image for name in names for image in self.image_sets[name])


def name_of_set(images: Sequence[str], labels: Sequence[int]) -> str:
    """A name for labelled images, equal for equal images and labels in any order: 16 hexadecimal digits."""
    lines = sorted(f"{image}:{label};" for image, label in zip(images, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _choice(node: Json) -> ScaleChoice:
    choice = ScaleChoice(
        scale=node.key("scale").number(),
        tried=tuple(map(_trial, node.key("tried").items())),
        images=node.key("images").integer(minimum=1),
        image_set=node.key("image_set").text(),
    )
    if choice.scale not in {trial.scale for trial in choice.tried}:
        node.key("scale").refuse("one of the scales that were tried")
    return choice


def _trial(node: Json) -> Trial:
    trial = Trial(
        scale=node.key("scale").number(),
        top1=node.key("top1").number(),
        cross_entropy=node.key("cross_entropy").optional(Json.number),
    )
    if not 0 <= trial.top1 <= 1:
        node.key("top1").refuse("a share in 0..1")
    return trial


def _image(node: Json) -> str:
    return _matching(node, _IMAGE, "the first 16 hexadecimal digits of a sha256")


def _matching(node: Json, pattern: re.Pattern[str], rule: str) -> str:
    if not pattern.fullmatch(node.text()):
        node.refuse(rule)
    return node.value
