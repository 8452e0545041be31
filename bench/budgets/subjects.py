"""Families to measure, compiled by the project's own compiler, and the sheets they are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.experiment.evaluation import TEST_SEED, VAL_SEED
from bench.experiment.protocol import PRESETS
from bench.experiment.stages import EXAMPLE, checkpoint_name, finished, write_model_folder
from bench.experiment.tasks import TASKS
from examples.sheets import Split
from tocom.export.family.compile import compile_family
from tocom.export.family.scales import choose_family_scales
from tocom.export.source.options import CompileOptions
from tocom.runtime.family_files import MANIFEST
from tocom.runtime.manifest import Family

DEGREES = (0, 4, 8, 12, 16)

_BACKEND = "openvino"  # the fastest on CPUs that it runs on; "auto" could choose otherwise from one subject to the next
_FURTHER_SCALES = (0.03,)  # the experiment's, for tasks far from the pre-training
_SCALE_SEED, _COMPILE_SEED = 5, 6  # no other sheets are drawn with them
_CHUNK = 256  # sheets drawn at a time, so that fewer are the first of more


@dataclass(frozen=True)
class Subject:
    """A fine-tuned checkpoint and its compensator."""

    name: str  # as in files: "example", or task and seed of the fine-tuning
    task: str  # what its sheets ask

    @property
    def seed(self) -> int | None:
        """Of the fine-tuning; None for the example."""
        return None if self.name == "example" else int(self.name.rpartition("-")[2])

    def sheets(self, split: Split, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Normalized sheets, float32 [count, 3, 32, 32], and their classes: validation or test."""
        seed = {"val": VAL_SEED, "test": TEST_SEED}[split]
        pixels, classes = TASKS[self.task].sheets(split, seed, -(-count // _CHUNK) * _CHUNK)
        return pixels[:count].numpy(), classes[:count].numpy()

    def compile(self, work: Path, sheets: int) -> Path:
        """Compiles all degrees, with scales chosen on validation sheets; what is finished is kept.

        Returns:
            The family's folder.
        """
        out = work / "engines" / self.name
        if (out / MANIFEST).exists() and {entry.degree for entry in Family.read(out).engines} == set(DEGREES):
            return out
        options = {"out": out, "degrees": DEGREES, "source_degree": 0, "backend": _BACKEND}
        if self.seed is None:
            options |= {"model": str(EXAMPLE), "compensator": EXAMPLE / "compensator.safetensors", "delta_scale": 0.1}
        else:
            weights = finished(checkpoint_name(self.task, 0, self.seed))
            folder = write_model_folder(weights, PRESETS["small"], work / "models" / self.name)
            options |= {"model": str(folder), "compensator": finished("compensator-constant.safetensors")}
            scale_sheets = self._images(work, "val", _SCALE_SEED, sheets)
            choose_family_scales(CompileOptions(**options, images=scale_sheets), _FURTHER_SCALES)
        compile_family(CompileOptions(**options, images=self._images(work, "test", _COMPILE_SEED, sheets)))
        return out

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
