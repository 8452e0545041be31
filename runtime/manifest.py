"""The manifest `family.json`: which engines a checkpoint was compiled into, and what it takes to run and trust them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .checked_json import AbsentError, Json, parse, read
from .errors import InputError, one_line
from .family_files import MANIFEST
from .files import sha256_file, write_atomically

FORMAT = 1
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")

_MAX_SIDE = 16384
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input, in timm's words.

    Attributes:
        size: (3, H, W) of the network's input, in pixels.
        mean: Subtracted from each channel after scaling to 0..1.
        std: Each channel is divided by it afterwards.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Share of the resized image's edge that the crop keeps; above 1 the image is padded.
        crop_mode: One of `CROP_MODES`.

    Raises:
        InputError: A value is outside what `tocom.runtime.preprocess` models.
    """

    size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require("size", len(self.size) == 3 and self.size[0] == 3, "[3, height, width]")
        self._require("size", all(1 <= side <= _MAX_SIDE for side in self.size), f"sides of 1 to {_MAX_SIDE} pixels")
        self._require("mean", len(self.mean) == 3 and all(0 <= m <= 1 for m in self.mean), "three numbers in 0..1")
        positive = all(s > 0 and math.isfinite(s) for s in self.std)
        self._require("std", len(self.std) == 3 and positive, "three numbers above 0")
        self._require("interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}")
        within_image = 0.05 <= self.crop_pct <= min(4, *self.size[1:])  # else less than a pixel remains to be resized
        self._require("crop_pct", within_image, "a number in 0.05..4, and no larger than the sides of input.size")
        self._require("crop_mode", self.crop_mode in CROP_MODES, f"one of {', '.join(CROP_MODES)}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            Json(getattr(self, name), f"input.{name}").refuse(rule)

    @classmethod
    def from_json(cls, value: Any) -> InputSpec:
        """Reads the manifest's "input" object.

        Raises:
            InputError: A key is missing, wrongly typed or out of range; the message names it.
        """
        spec = Json(value, "input")
        return cls(
            size=spec.key("size").integers(minimum=1),
            mean=tuple(item.number() for item in spec.key("mean").items()),
            std=tuple(item.number() for item in spec.key("std").items()),
            interpolation=spec.key("interpolation").text(),
            crop_pct=spec.key("crop_pct").number(),
            crop_mode=spec.key("crop_mode").text(),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        return asdict(self) | {"size": list(self.size), "mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class EngineEntry:
    """One engine of a family. Paths are relative to the family's folder, with "/" between names.

    Attributes:
        degree: Target degree r.
        scale: Factor on the compensator's delta; None when there is none in this engine.
        schedule: Tokens removed in each block; L numbers.
        tokens: Tokens entering each block, then tokens leaving the last; L + 1 numbers.
        gmacs: Multiply-accumulates of one image, in units of 1e9.
        backend: Engine library, one of `tocom.runtime.engines.base.BACKENDS`.
        precision: "fp32", or what the graph was quantized or cast to.
        onnx: The graph.
        engine: What the backend opens; may be the graph itself.
        sha256: Path -> hash of every file the engine needs, `onnx` and `engine` included.
        recipe: Hash of everything the engine was made from; equal recipes make equal engines.
        validation: Findings of the check against the reference.
        latency_ms: Batch size -> {"p50": ms, "p99": ms, "slice_bound": ms}, on the machine that compiled; the slice
            bound is the median of the same network that drops the last r tokens without looking at them.
        accuracy: Measured shares such as "top1", and how many "images" they rest on; may be empty.
        native: Whether the backend's own operator removes the tokens, instead of the function body.
        pays: Batch size -> whether the engine was faster than degree 0 in the same run.
        build: What is known of a plan that was built: library, options, seconds, bytes, layers; empty for a graph.
        machine: What `local_latency.this_machine` called the machine of `latency_ms`; "" where that is unknown.
    """

    degree: int
    scale: float | None
    schedule: tuple[int, ...]
    tokens: tuple[int, ...]
    gmacs: float
    backend: str
    precision: str
    onnx: str
    engine: str
    sha256: Mapping[str, str]
    recipe: str
    validation: Mapping[str, Any]
    latency_ms: Mapping[str, Mapping[str, float]]
    accuracy: Mapping[str, float | None]
    native: bool = False
    pays: Mapping[str, bool] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def from_json(cls, value: Any, where: str = "engine") -> EngineEntry:
        """Reads one item of the manifest's "engines" list.

        Raises:
            InputError: A key is missing, wrongly typed or contradicts another; the message names it after `where`.
        """
        node = Json(value, where)
        entry = cls(
            degree=node.key("degree").integer(),
            scale=node.key("scale").optional(Json.number),
            schedule=node.key("schedule").integers(),
            tokens=node.key("tokens").integers(minimum=1),
            gmacs=node.key("gmacs").number(),
            backend=node.key("backend").text(),
            precision=node.key("precision").text(),
            onnx=_relative_path(node.key("onnx")),
            engine=_relative_path(node.key("engine")),
            sha256=_hashes(node.key("sha256")),
            recipe=node.key("recipe").text(),
            validation=node.key("validation").mapping(Json.plain),
            latency_ms=node.key("latency_ms").mapping(lambda batch: batch.mapping(Json.number)),
            accuracy=node.key("accuracy").mapping(_number_or_null),
            native=node.key_or("native", False).boolean(),
            pays=node.key_or("pays", {}).mapping(Json.boolean),
            build=node.key_or("build", {}).mapping(Json.plain),
            machine=node.key_or("machine", "").text(),
        )
        if len(entry.tokens) != len(entry.schedule) + 1:
            node.key("tokens").refuse(f"one number more than the schedule's {len(entry.schedule)}")
        for name in ("onnx", "engine"):
            if getattr(entry, name) not in entry.sha256:
                node.key(name).refuse(f"one of the files in {where}.sha256")
        return entry

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads; keys in the order of the fields, files by name."""
        return {
            **self.__dict__,
            "schedule": list(self.schedule),
            "tokens": list(self.tokens),
            "sha256": dict(sorted(self.sha256.items())),
            "validation": dict(self.validation),
            "latency_ms": {batch: dict(times) for batch, times in self.latency_ms.items()},
            "accuracy": dict(self.accuracy),
            "pays": dict(self.pays),
            "build": dict(self.build),
        }


@dataclass(frozen=True)
class Family:
    """All engines of one checkpoint, as `family.json` describes them.

    Attributes:
        model: timm's name of the model.
        classes: How many logits an engine gives.
        input: How images are prepared.
        source_degree: Degree the checkpoint was fine-tuned at; None when unknown.
        checkpoint_sha256: Hash of the checkpoint file; None when unknown.
        compensator_sha256: Hash of the compensator file; None without one.
        class_names: One name per class, in the order of the logits; None when unknown.
        engines: One entry per degree, kept in rising order of degree.
        schedule: Name of the family of schedules: how a degree is spread over the blocks.
        reduction: Name of the token reduction: what becomes of the tokens that are removed.

    Raises:
        InputError: Two engines share a degree.
    """

    model: str
    classes: int
    input: InputSpec
    source_degree: int | None
    checkpoint_sha256: str | None
    compensator_sha256: str | None
    class_names: tuple[str, ...] | None
    engines: tuple[EngineEntry, ...]
    schedule: str = "constant"
    reduction: str = "merge"

    def __post_init__(self) -> None:
        object.__setattr__(self, "engines", tuple(sorted(self.engines, key=lambda entry: entry.degree)))
        for one, next_one in zip(self.engines, self.engines[1:], strict=False):
            if one.degree == next_one.degree:
                raise InputError(f"engines must hold one engine per degree, got degree {one.degree} twice")

    @classmethod
    def read(cls, folder: Path | str) -> Family:
        """Reads the manifest in a family's folder. Keys it does not know are ignored.

        Raises:
            InputError: There is no manifest, it is broken, newer than this code, or points out of its folder.
        """
        folder = Path(folder)

        def interpret(value: Any) -> Family:
            family = cls.from_json(value)
            for entry in family.engines:
                for name in entry.sha256:  # `onnx` and `engine` are among them
                    _ensure_inside(folder, name, f"degree {entry.degree}")
            return family

        try:
            return read(folder / MANIFEST, interpret)
        except AbsentError:
            raise InputError(f"there is no {MANIFEST} in {one_line(folder)}: give the folder of a compiled family, or "
                             "compile one with `tocom compile`") from None  # fmt: skip

    @classmethod
    def from_json(cls, value: Any) -> Family:
        """Reads a parsed manifest.

        Raises:
            InputError: It is newer than this code, or a key is missing, wrongly typed or contradicts another.
        """
        node = Json(value, "")
        if node.key("format").integer(minimum=1) > FORMAT:
            node.key("format").refuse(f"{FORMAT} or lower for this version (update ToCom, or compile the family again)")
        family = cls(
            model=node.key("model").text(),
            classes=node.key("classes").integer(minimum=1),
            input=InputSpec.from_json(node.key("input").value),
            source_degree=node.key("source_degree").optional(Json.integer),
            checkpoint_sha256=node.key("checkpoint_sha256").optional(_hash),
            compensator_sha256=node.key("compensator_sha256").optional(_hash),
            class_names=node.key("class_names").optional(lambda names: tuple(name.text() for name in names.items())),
            engines=tuple(EngineEntry.from_json(item.value, item.where) for item in node.key("engines").items()),
            schedule=node.key_or("schedule", "constant").text(),
            reduction=node.key_or("reduction", "merge").text(),
        )
        if family.class_names is not None and len(family.class_names) != family.classes:
            raise InputError(f"class_names must hold {family.classes} names, got {len(family.class_names)}")
        return family

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads; keys in the order of the fields."""
        return {
            "format": FORMAT,
            **self.__dict__,
            "input": self.input.to_json(),
            "class_names": None if self.class_names is None else list(self.class_names),
            "engines": [entry.to_json() for entry in self.engines],
        }

    def write(self, folder: Path | str) -> Path:
        """Writes `family.json` into an existing folder, whole or not at all. Equal families give equal bytes.

        Returns:
            The file.

        Raises:
            InputError: Something in this family could not be read back.
            OSError: The file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        # A manifest that `read` refuses would make a finished compile useless: find that out before it is on the disk.
        Family.from_json(parse(text))
        return write_atomically(Path(folder) / MANIFEST, text.encode("utf-8"))

    def entry(self, degree: int) -> EngineEntry:
        """The engine of one degree.

        Raises:
            InputError: There is none; the message lists the degrees there are.
        """
        for entry in self.engines:
            if entry.degree == degree:
                return entry
        degrees = ", ".join(str(entry.degree) for entry in self.engines) or "none"
        raise InputError(
            f"degree must be one the family was compiled for ({degrees}), got {degree}: "
            f"compile it with `tocom compile --degrees {degree} ...`"
        )

    def with_entry(self, entry: EngineEntry) -> Family:
        """This family with one more engine, which takes the place of one of the same degree."""
        others = tuple(other for other in self.engines if other.degree != entry.degree)
        return replace(self, engines=(*others, entry))

    def check_files(self, folder: Path | str, entry: EngineEntry) -> None:
        """Makes sure that the files of an engine are the ones that were compiled.

        Raises:
            InputError: A file is missing, lies outside the folder, cannot be read or has changed.
        """
        folder = Path(folder)
        again = f"compile degree {entry.degree} again with `tocom compile --degrees {entry.degree} ...`"
        for name, expected in sorted(entry.sha256.items()):
            _ensure_inside(folder, name, f"degree {entry.degree}")
            file = folder / name
            try:
                if not file.is_file():
                    raise InputError(f"{one_line(file)} is missing: {again}")
                actual = sha256_file(file)
            except OSError as error:
                reason = one_line(error.strerror or error)
                raise InputError(f"{one_line(file)} cannot be read ({reason}): {again}") from error
            if actual != expected:
                hashes = f"must have sha256 {expected[:12]}..., got {actual[:12]}..."
                raise InputError(f"{one_line(file)} {hashes}: it has changed; {again}")


def _number_or_null(node: Json) -> float | None:
    return node.optional(Json.number)


def _hash(node: Json) -> str:
    if not _SHA256.fullmatch(node.text()):
        node.refuse("a sha256 of 64 hexadecimal digits")
    return node.value


def _hashes(node: Json) -> dict[str, str]:
    hashes = node.mapping(_hash)
    for name in hashes:
        _relative_path(Json(name, f"a key of {node.where}"))
    return hashes


def _relative_path(node: Json) -> str:
    """A path that stays below its folder on every system: no root, no drive, no "..", no backslash."""
    text = node.text()
    path, windows = PurePosixPath(text), PureWindowsPath(text)
    leads_out = path.is_absolute() or ".." in path.parts or bool(windows.drive or windows.root)
    if leads_out or text != path.as_posix() or text in ("", ".") or "\\" in text or text != one_line(text):
        node.refuse("a relative path inside the folder, with / between names")
    return text


def _ensure_inside(folder: Path, name: str, where: str) -> None:
    """Refuses what the words of a path do not show.

    Raises:
        InputError: A link on the way leads out of the folder.
    """
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{where}: {one_line(name)} cannot be followed: {one_line(error)}") from error
    if not inside:
        raise InputError(f"{where}: files must stay inside {one_line(folder)}, got {one_line(name)}, a link out of it")
