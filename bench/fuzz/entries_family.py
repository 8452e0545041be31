"""`family.json`, the files that it lists, and `cascade.json`, at `tocom inspect` and `runtime/infer.py`."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.fuzz.case import WRONG, Entry, FaultError, Mutate
from bench.fuzz.commands import judge, run_infer, run_tocom
from bench.fuzz.given import DEGREE, Given, measured_briefly
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_json import STRUCTURE
from tocom.runtime.degrees.cascade import Cascade, Stage
from tocom.runtime.family_files import CASCADE
from tocom.runtime.manifest import Family

_BACKEND = "onnxruntime"
_DECIDING = ("engine", "backend", "precision", "sha256")  # keys of an engine that its answer depends on
_CLOSE = 1e-4


def copy_family(given: Given, folder: Path, backend: str = _BACKEND, without: str = "") -> Path:
    """A family as a folder of its own; one name may be left out."""
    copied = folder / "family"
    copied.mkdir()
    for file in given.family(backend).iterdir():
        if file.name not in (without, ".lock"):
            shutil.copy(file, copied / file.name)  # no link, which onnx takes for an attack
    return copied


def predictions(given: Given, family: Path) -> list[dict[str, Any]]:
    """What infer says of the given image: a class, a name and a probability for every class."""
    answer = run_infer("--engines", family, "--degree", DEGREE, "--json", "--top-k", 99, given.folder / "image.png")
    printed = judge(answer, family)
    found = json.loads(printed)["predictions"]
    shares = np.array([each["probability"] for each in found])
    if not np.isfinite(shares).all() or abs(shares.sum() - 1) > 1e-3:
        raise FaultError(WRONG, f"probabilities must add up to one, got {shares.tolist()}")
    return found


@functools.cache
def expected(folder: Path, backend: str) -> list[dict[str, Any]]:
    """What infer says with the untouched family."""
    given = Given(folder)
    return predictions(given, given.family(backend))


def agree(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two lists of predictions say the same, whatever the classes are called."""
    shares = [{each["class"]: each["probability"] for each in found} for found in (one, other)]
    return shares[0].keys() == shares[1].keys() and all(
        abs(share - shares[1][index]) <= _CLOSE for index, share in shares[0].items()
    )


def _whole_manifest(given: Given, _: random.Random) -> bytes:
    return (given.family(_BACKEND) / "family.json").read_bytes()


def _place_manifest(given: Given, folder: Path, content: bytes) -> None:
    (copy_family(given, folder, without="family.json") / "family.json").write_bytes(content)


def _deciding(manifest: Any) -> Any:
    """The parts of a manifest that decide what infer computes."""
    engine = next(each for each in manifest["engines"] if each["degree"] == DEGREE)
    return manifest["input"], {key: engine[key] for key in _DECIDING}


def _infer_by_manifest(given: Given, folder: Path) -> bool:
    found = predictions(given, folder / "family")
    same = agree(found, expected(given.folder, _BACKEND))
    # an independent look at what the manifest says now
    written = json.loads((folder / "family" / "family.json").read_bytes().decode("utf-8-sig"))
    original = json.loads(_whole_manifest(given, random.Random()))
    if not same and _deciding(written) == _deciding(original):
        raise FaultError(WRONG, "nothing that decides the answer was changed, and yet it is another")
    return same


def _inspect_family(given: Given, folder: Path) -> bool:
    printed = judge(run_tocom("inspect", folder / "family"), folder)
    return printed == judge(run_tocom("inspect", given.family(_BACKEND))).replace(str(given.family(_BACKEND)), "")


def _compile_again(given: Given, folder: Path) -> bool:
    """A compile that finds the manifest there: what it cannot use it refuses, or makes anew."""
    options = given.options()
    arguments = [f"--model-arg={name}={value}" for name, value in options.model_args.items()]
    with measured_briefly():
        judge(run_tocom("compile", "--model", options.model, *arguments, "--checkpoint", options.checkpoint,
                        "--compensator", options.compensator, "--source-degree", 0, "--degrees", DEGREE, "--backend",
                        _BACKEND, "--out", folder / "family"), folder)  # fmt: skip
    if not agree(predictions(given, folder / "family"), expected(given.folder, _BACKEND)):
        raise FaultError(WRONG, "status 0, but the family answers otherwise than one that was compiled from nothing")
    return True


def _listed(given: Given, draw: random.Random) -> bytes:
    """Either file of the degree's engine, with its name in front."""
    file = draw.choice(sorted(_files(given.family(_BACKEND))))
    return file.encode() + b"\n" + (given.family(_BACKEND) / file).read_bytes()


def _files(family: Path) -> Mapping[str, str]:
    engines = json.loads((family / "family.json").read_text())["engines"]
    return next(each["sha256"] for each in engines if each["degree"] == DEGREE)


def _behind_name(mutate: Mutate) -> Mutate:
    def mutated(draw: random.Random, whole: bytes) -> bytes:
        name, _, content = whole.partition(b"\n")
        return name + b"\n" + mutate(draw, content)

    return mutated


def _place_listed(given: Given, folder: Path, content: bytes) -> None:
    name, _, damaged = content.partition(b"\n")
    (copy_family(given, folder, without=name.decode()) / name.decode()).write_bytes(damaged)


def _require_untouched(given: Given, folder: Path) -> None:
    """Makes sure that what was accepted is what was compiled."""
    for name in _files(given.family(_BACKEND)):
        if (given.family(_BACKEND) / name).read_bytes() != (folder / "family" / name).read_bytes():
            raise FaultError(WRONG, "a file that was altered was accepted although its hash is listed")


def _infer_altered(given: Given, folder: Path) -> bool:
    found = predictions(given, folder / "family")
    _require_untouched(given, folder)
    return agree(found, expected(given.folder, _BACKEND))


def _inspect_altered(given: Given, folder: Path) -> bool:
    judge(run_tocom("inspect", folder / "family"), folder)
    _require_untouched(given, folder)
    return True


def _whole_cascade(given: Given, _: random.Random) -> bytes:
    """No image is so sure that it would not go on."""
    family = Family.read(given.family(_BACKEND))
    stages = [Stage(degree, temperature, threshold, family.entry(degree).recipe)
              for degree, temperature, threshold in ((DEGREE, 1.5, 1.0), (0, 0.8, 0.0))]  # fmt: skip
    return json.dumps(Cascade(stages, {"accuracy": 0.9, "shares": [1.0, 0.5]}).to_json()).encode()


def _place_cascade(given: Given, folder: Path, content: bytes) -> None:
    (copy_family(given, folder) / CASCADE).write_bytes(content)


def _infer_cascade(given: Given, folder: Path) -> bool:
    """Either stage may answer; another one cannot."""
    family, image = folder / "family", given.folder / "image.png"
    common = ("--json", "--top-k", 99, image)
    found = json.loads(judge(run_infer("--engines", family, "--cascade", *common), family))
    alone = json.loads(judge(run_infer("--engines", family, "--degree", found["degree"], *common), family))
    one, other = (sorted((each["class"], each["probability"]) for each in answer["predictions"])
                  for answer in (found, alone))  # fmt: skip
    if not np.allclose(one, other, rtol=0, atol=1e-4):
        raise FaultError(WRONG, f"degree {found['degree']} answers otherwise in a cascade")
    return found["degree"] == 0


_ALTERED = {name: _behind_name(mutate) for name, mutate in BYTES.items()}

ENTRIES = (
    Entry("family.json -> infer", STRUCTURE | BYTES, _whole_manifest, _place_manifest, _infer_by_manifest, 3),
    Entry("family.json -> tocom inspect", STRUCTURE | BYTES, _whole_manifest, _place_manifest, _inspect_family, 2),
    Entry("family.json -> tocom compile", STRUCTURE | BYTES, _whole_manifest, _place_manifest, _compile_again, 0.1),
    Entry("cascade.json -> infer", STRUCTURE | BYTES, _whole_cascade, _place_cascade, _infer_cascade, 1.5),
    Entry("engine's files -> infer", _ALTERED, _listed, _place_listed, _infer_altered),
    Entry("engine's files -> tocom inspect", _ALTERED, _listed, _place_listed, _inspect_altered),
)
