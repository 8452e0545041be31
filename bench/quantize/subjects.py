"""Networks that are quantized, with the weights of every degree, and the sheets that they are measured on."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.experiment.evaluation import TEST_SEED
from bench.experiment.protocol import PRESETS
from bench.experiment.stages import ARCHITECTURE
from bench.experiment.tasks import TASKS
from bench.quantize.protocol import POOL
from tocom.calib.labelled import LabelledImages
from tocom.checkpoint import load_model
from tocom.compensator import Compensator
from tocom.export.graph.fuse import fuse
from tocom.export.source.load import input_spec
from tocom.runtime.errors import InputError
from tocom.runtime.files import write_atomically
from tocom.vit import ReducedViT

ROOT = Path(__file__).parents[2]
EXAMPLE, EXPERIMENT = ROOT / "examples" / "digits", ROOT / "build" / "experiment" / "small"

BATCH = 64  # what a core's cache holds; larger batches are slower
_EXAMPLE_SCALE = 0.1
_CALIBRATION_SEED = 77  # no training run draws with it


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint that was fine-tuned without merging, and runs at any degree.

    Attributes:
        name: As in files.
        task: Of its sheets.
        plain: The timm model.
        compensator: Fused into it at every degree but 0.
        scales: Degree -> scale of the compensator.
        shipped: Whether it is measured on the example's sheets instead of on freshly drawn ones.
    """

    name: str
    task: str
    plain: nn.Module
    compensator: Compensator
    scales: dict[int, float]
    shipped: bool = False

    @functools.cached_property
    def _models(self) -> dict[int, nn.Module]:
        return {0: self.plain}

    def model(self, degree: int) -> nn.Module:
        """With the weights of a degree."""
        if degree not in self._models:
            own = copy.deepcopy(self.plain)
            own.load_state_dict(fuse(own.state_dict(), self.compensator.between(0, degree, self.scales[degree])))
            self._models[degree] = own
        return self._models[degree]

    def network(self, degree: int) -> ReducedViT:
        """The float reference at a degree."""
        return ReducedViT(self.model(degree), degree)

    def test(self, count: int) -> tuple[Tensor, Tensor]:
        """The first test sheets, normalized, and their classes."""
        pixels, classes = _shipped_sheets() if self.shipped else _sheets(self.task, "test", TEST_SEED, count)
        return pixels[:count], classes[:count]

    def pool(self) -> Tensor:
        """Training sheets, normalized, that calibration sheets are chosen from."""
        return _sheets(self.task, "train", _CALIBRATION_SEED, POOL)[0]

    def spread(self, count: int) -> Tensor:
        """Evenly spread calibration sheets."""
        pool = self.pool()
        return pool[[index * len(pool) // count for index in range(count)]]

    def float_logits(self, degree: int, count: int, folder: Path) -> Tensor:
        """Of the float network, on the first test sheets; kept in a folder."""
        file = folder / f"float-{self.name}-{degree}-{count}.npy"
        if not file.exists():
            logits = logits_of(self.network(degree), self.test(count)[0])
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".part").open("wb") as stream:
                np.save(stream, logits.numpy())
            file.with_suffix(".part").replace(file)
        return torch.from_numpy(np.load(file))


@torch.no_grad()
def logits_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Runs a network in batches: [B, 3, H, W] -> [B, classes]."""
    return torch.cat([network(part) for part in pixels.split(BATCH)])


def example(*, shipped: bool = False) -> Subject:
    """The example's checkpoint, on freshly drawn sheets or on the shipped ones."""
    name = "example-shipped" if shipped else "example"
    return Subject(name, "board", _example_model(), Compensator.load(EXAMPLE / "compensator.safetensors"),
                   dict.fromkeys(range(1, 33), _EXAMPLE_SCALE), shipped)  # fmt: skip


def downstream(task: str, seed: int, folder: Path = EXPERIMENT) -> Subject:
    """A checkpoint of the experiment, with the scales that were chosen on its validation sheets.

    Raises:
        InputError: If the experiment has not been run.
    """
    files = [folder / name for name in (f"{task}-0-{seed}.safetensors", f"{task}-0-{seed}-constant.json")]
    compensator = folder / "compensator-constant.safetensors"
    for file in (*files, compensator):
        if not file.exists():
            raise InputError(f"the study quantizes the experiment's checkpoints, but {file.name} is not there. Run "
                             "`make experiment` first, or --quick --only with stages of the example.")  # fmt: skip
    model = timm.create_model(ARCHITECTURE, num_classes=10, **PRESETS["small"].model)
    model.load_state_dict(load_file(files[0]))
    scales = {outcome["target"]: outcome["scale"] for outcome in json.loads(files[1].read_text())}
    return Subject(f"{task}-{seed}", task, model.eval().requires_grad_(False), Compensator.load(compensator), scales)


def keep_json(file: Path, data: object) -> None:
    """Writes what a stage found."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(data) + "\n").encode())


@functools.cache
def _example_model() -> nn.Module:
    return load_model(str(EXAMPLE)).model


@functools.cache
def _sheets(task: str, split: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    # in batches of 256, so that fewer sheets are the first of more
    return TASKS[task].sheets(split, seed, -(-count // 256) * 256)


@functools.cache
def _shipped_sheets() -> tuple[Tensor, Tensor]:
    loaded = load_model(str(EXAMPLE))
    images = LabelledImages.below(EXAMPLE / "sheets", input_spec(loaded), loaded.label_names, 10, 1000)
    return torch.from_numpy(images.pixels(range(len(images)))), torch.tensor(images.labels)
