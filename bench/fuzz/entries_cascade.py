"""`cascade.json`, at `runtime/infer.py --cascade`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from bench.fuzz.case import Entry
from bench.fuzz.commands import infer, judge
from bench.fuzz.entries_family import copy_family
from bench.fuzz.given import DEGREE, Given
from bench.fuzz.mutate_bytes import BYTES
from bench.fuzz.mutate_json import STRUCTURE
from bench.fuzz.outcome import WRONG, FaultError
from tocom.runtime.degrees.cascade import Cascade, Stage
from tocom.runtime.family_files import CASCADE
from tocom.runtime.manifest import Family

_BACKEND = "onnxruntime"


def _whole(given: Given, _: random.Random) -> bytes:
    """No image is so sure that it would not go on."""
    family = Family.read(given.family(_BACKEND))
    stages = [Stage(degree, temperature, threshold, family.entry(degree).recipe)
              for degree, temperature, threshold in ((DEGREE, 1.5, 1.0), (0, 0.8, 0.0))]  # fmt: skip
    return json.dumps(Cascade(stages, {"accuracy": 0.9, "shares": [1.0, 0.5]}).to_json()).encode()


def _place(given: Given, folder: Path, content: bytes) -> None:
    (copy_family(given, folder) / CASCADE).write_bytes(content)


def _run(given: Given, folder: Path) -> bool:
    """Either stage may answer; another one cannot.

    Raises:
        FaultError: The answer is none that an engine of the family gives.
    """
    family, image = folder / "family", given.folder / "image.png"
    common = ("--json", "--top-k", 99, image)
    found = json.loads(judge(infer("--engines", family, "--cascade", *common), family))
    alone = json.loads(judge(infer("--engines", family, "--degree", found["degree"], *common), family))
    one, other = (sorted((each["class"], each["probability"]) for each in answer["predictions"])
                  for answer in (found, alone))  # fmt: skip
    if not np.allclose(one, other, rtol=0, atol=1e-4):
        raise FaultError(WRONG, f"degree {found['degree']} answers otherwise in a cascade")
    return found["degree"] == 0


ENTRIES = (Entry("cascade.json -> infer", STRUCTURE | BYTES, _whole, _place, _run, 1.5),)
