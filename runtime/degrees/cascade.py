"""A cascade: the most compressed engine first, and only the images that it is unsure of again by a less compressed one.

`cascade.json`, beside the engines, has the cascade; `tocom cascade` finds it and writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..checked_json import AbsentError, Json, parse, read
from ..errors import InputError, one_line
from ..family_files import CASCADE
from ..files import write_atomically
from ..manifest import Family

FORMAT = 1

InferAt = Callable[[np.ndarray, int], np.ndarray]
"""(float32 [B, 3, H, W], degree) -> logits, float32 [B, classes]."""


@dataclass(frozen=True)
class Stage:
    """One engine of a cascade.

    Attributes:
        degree: Degree r.
        temperature: Logits are divided by it before their softmax tells how sure the engine is.
        threshold: Images whose largest probability is below it go on to the next stage; 0 in the last stage, which
            answers whatever reaches it.
        recipe: Of the engine that the numbers were found with; "" accepts any.
    """

    degree: int
    temperature: float
    threshold: float
    recipe: str = ""


@dataclass(frozen=True)
class Cascade:
    """Stages, the most compressed first.

    Attributes:
        stages: At least one.
        found: JSON-ready, how the cascade did on the images that it was measured on; may be empty.

    Raises:
        InputError: There is no stage, degrees do not fall, or a number is out of range.
    """

    stages: tuple[Stage, ...]
    found: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        degrees = [stage.degree for stage in self.stages]
        if not degrees or any(one <= other for one, other in pairwise(degrees)):
            raise InputError(f"stages must be one or more, in falling order of degree, got degrees {degrees}")
        for stage in self.stages:
            if not (math.isfinite(stage.temperature) and stage.temperature > 0):
                raise InputError(f"the temperature of degree {stage.degree} must be above 0, got {stage.temperature}")
            if not 0 <= stage.threshold <= 1:
                raise InputError(f"the threshold of degree {stage.degree} must be in 0..1, got {stage.threshold}")
        if self.stages[-1].threshold:
            raise InputError("the last stage answers what reaches it, so its threshold must be 0, got "
                             f"{self.stages[-1].threshold}")  # fmt: skip

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of the stages, falling."""
        return tuple(stage.degree for stage in self.stages)

    @classmethod
    def read(cls, folder: Path | str, family: Family) -> Cascade:
        """Reads the cascade in a family's folder.

        Args:
            folder: Of the family.
            family: Its manifest, whose engines must be those that the cascade was found with.

        Raises:
            InputError: There is no cascade, it is broken, or it was found with other engines.
        """
        again = f"find one with `tocom cascade --engines {one_line(folder)} --images DIR`"

        def interpret(value: Any) -> Cascade:
            cascade = cls.from_json(value)
            for stage in cascade.stages:
                if stage.recipe not in ("", family.entry(stage.degree).recipe):
                    raise InputError(f"the engine of degree {stage.degree} was compiled anew since: {again}")
            return cascade

        try:
            return read(Path(folder) / CASCADE, interpret)
        except AbsentError:
            raise InputError(f"there is no {CASCADE} in {one_line(folder)}: {again}") from None

    @classmethod
    def from_json(cls, value: Any) -> Cascade:
        """Reads a parsed cascade.

        Raises:
            InputError: It is newer than this code, or a key is missing, wrongly typed or out of range.
        """
        node = Json(value, "")
        if node.key("format").integer(minimum=1) > FORMAT:
            node.key("format").refuse(f"{FORMAT} or lower for this version (update ToCom, or find the cascade again)")
        stages = tuple(
            Stage(
                degree=item.key("degree").integer(),
                temperature=item.key("temperature").number(),
                threshold=item.key("threshold").number(),
                recipe=item.key("recipe").text(),
            )
            for item in node.key("stages").items()
        )
        return cls(stages, node.key_or("found", {}).mapping(Json.plain))

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        return {"format": FORMAT, "stages": [asdict(stage) for stage in self.stages], "found": dict(self.found)}

    def write(self, folder: Path | str) -> Path:
        """Writes `cascade.json` into a family's folder, whole or not at all.

        Returns:
            The file.

        Raises:
            InputError: Something in this cascade could not be read back.
            OSError: The file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1) + "\n"
        Cascade.from_json(parse(text))
        return write_atomically(Path(folder) / CASCADE, text.encode("utf-8"))


@dataclass(frozen=True)
class CascadeAnswer:
    """What a cascade says of a batch.

    Attributes:
        logits: float32 [B, classes], each row as the engine gave it that answered.
        degrees: int64 [B], the degree that answered.
        confidences: float64 [B], the largest probability at the temperature of that degree, in 0..1.
    """

    logits: np.ndarray
    degrees: np.ndarray
    confidences: np.ndarray


def run(cascade: Cascade, infer: InferAt, pixel_values: np.ndarray) -> CascadeAnswer:
    """Classifies a batch; of each stage, the images that it is unsure of are run together by the next.

    Args:
        cascade: The cascade.
        infer: Runs the engine of a degree.
        pixel_values: float32 [B, 3, H, W], prepared.
    """
    waiting = np.arange(len(pixel_values))
    logits = np.empty((len(pixel_values), 0), np.float32)
    degrees = np.zeros(len(pixel_values), np.int64)
    confidences = np.zeros(len(pixel_values))
    for stage in cascade.stages:
        if not len(waiting):
            break
        # All of a batch goes in as it came: no copy.
        answer = infer(pixel_values if len(waiting) == len(pixel_values) else pixel_values[waiting], stage.degree)
        if not logits.shape[1]:
            logits = np.empty((len(pixel_values), answer.shape[1]), np.float32)
        sureness = confidence(answer, stage.temperature)
        logits[waiting], degrees[waiting], confidences[waiting] = answer, stage.degree, sureness
        waiting = waiting[goes_on(sureness, stage)]
    return CascadeAnswer(logits, degrees, confidences)


def confidence(logits: np.ndarray, temperature: float) -> np.ndarray:
    """How sure an engine is: the largest of the probabilities softmax(logits / temperature).

    Args:
        logits: [B, classes].
        temperature: Above 0.

    Returns:
        float64 [B], in 0..1.
    """
    shifted = (logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperature
    return 1 / np.exp(shifted).sum(axis=1)


def goes_on(sureness: np.ndarray, stage: Stage) -> np.ndarray:
    """Which images a stage leaves to the next: bool [B].

    Args:
        sureness: float64 [B], the confidences of the stage.
        stage: Which.
    """
    return ~(sureness >= stage.threshold) & (stage.threshold > 0)  # so that what is not a number goes on as well


def shares(cascade: Cascade, degrees: Sequence[int] | np.ndarray) -> tuple[float, ...]:
    """Share of images that reach each stage, the first of which is 1.

    Args:
        cascade: The cascade.
        degrees: Which degree answered, per image.
    """
    answered = np.asarray(degrees)
    return tuple(float((answered <= stage.degree).mean()) if len(answered) else 0.0 for stage in cascade.stages)
