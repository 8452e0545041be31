"""Families to measure, compiled by the project's own compiler, and the sheets they are measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.experiment.evaluation import TEST_SEED, VAL_SEED
from bench.experiment.protocol import PRESETS
from bench.experiment.stages import ARCHITECTURE, checkpoint_name
from bench.experiment.tasks import TASKS
from examples.sheets import Split
from tocom.export.family.compile import compile_family
from tocom.export.family.scales import choose_family_scales
from tocom.export.source.options import CompileOptions
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import MANIFEST
from tocom.runtime.manifest import Family

ROOT = Path(__file__).parents[2]
EXAMPLE, EXPERIMENT = ROOT / "examples" / "digits", ROOT / "build" / "experiment" / "small"
DEGREES = (0, 4, 8, 12, 16)

_BACKEND = "openvino"  # the fastest on CPUs that it runs on; "auto" could choose otherwise from one subject to the next
_FURTHER_SCALES = (0.03,)  # the experiment's, for tasks far from the pre-training
_SCALE_SEED, _COMPILE_SEED = 5, 6  # no other sheets are drawn with them
_CHUNK = 256  # sheets drawn at a time, so that fewer are the first of more


@dataclass(frozen=True)
class Subject:
    """A fine-tuned checkpoint and its compensator.

    Attributes:
        name: As in files: "example", or task and seed of the fine-tuning.
        task: What its sheets ask.
    """

    name: str
    task: str

    @property
    def seed(self) -> int | None:
        """Of the fine-tuning; None for the example."""
        return None if self.name == "example" else int(self.name.rpartition("-")[2])

    def sheets(self, split: Split, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Normalized sheets, float32 [count, 3, 32, 32], and their classes: validation or test."""
        seed = {"val": VAL_SEED, "test": TEST_SEED}[split]
        pixels, classes = TASKS[self.task].sheets(split, seed, -(-count // _CHUNK) * _CHUNK)
        return pixels[:count].numpy(), classes[:count].numpy()

    def compile(self, work: Path, sheets: int, tell: Callable[[str], object]) -> Path:
        """Compiles all degrees, with scales chosen on validation sheets; what is finished is kept.

        Args:
            work: Folder for families and images.
            sheets: How many to choose scales on, and how many to prove engines and measure top-1 on.
            tell: Given what is going on.

        Returns:
            The family's folder.

        Raises:
            InputError: The experiment has not been run.
        """
        out = work / "engines" / self.name
        if (out / MANIFEST).exists() and {entry.degree for entry in Family.read(out).engines} == set(DEGREES):
            return out
        options = {"out": out, "degrees": DEGREES, "source_degree": 0, "backend": _BACKEND}
        if self.seed is None:
            options |= {"model": str(EXAMPLE), "compensator": EXAMPLE / "compensator.safetensors", "delta_scale": 0.1}
        else:
            options |= {"model": str(self._model(work)), "compensator": _existing("compensator-constant.safetensors")}
            tell("choosing scales")
            scale_sheets = self._images(work, "val", _SCALE_SEED, sheets)
            choose_family_scales(CompileOptions(**options, images=scale_sheets), _FURTHER_SCALES)
        tell("compiling")
        compile_family(CompileOptions(**options, images=self._images(work, "test", _COMPILE_SEED, sheets)))
        return out

    def _model(self, work: Path) -> Path:
        """The checkpoint as a folder in timm's hub layout."""
        folder = work / "models" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        weights = _existing(checkpoint_name(self.task, 0, self.seed)).read_bytes()
        (folder / "model.safetensors").write_bytes(weights)
        pretrained = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0, "mean": [0.5] * 3,
                      "std": [0.5] * 3, "num_classes": 10}  # fmt: skip
        config = {"architecture": ARCHITECTURE, "num_classes": 10, "model_args": dict(PRESETS["small"].model),
                  "pretrained_cfg": pretrained}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _images(self, work: Path, split: Split, seed: int, count: int) -> Path:
        """Sheets as files, in a folder per class."""
        folder = work / "sheets" / f"{self.task}-{split}-{seed}-{count}"
        if not (folder / ".done").exists():
            pixels, classes = TASKS[self.task].open(split, seed).batch(count)
            for index, (sheet, label) in enumerate(zip(pixels.permute(0, 2, 3, 1).numpy(), classes, strict=True)):
                (folder / str(int(label))).mkdir(parents=True, exist_ok=True)
                Image.fromarray(sheet).save(folder / str(int(label)) / f"{index:04}.png")
            (folder / ".done").touch()
        return folder


def _existing(name: str) -> Path:
    file = EXPERIMENT / name
    if not file.exists():
        raise InputError(f"the study runs the experiment's checkpoints, but {name} is not there. Run `make experiment` "
                         "first, or --only example.")  # fmt: skip
    return file
