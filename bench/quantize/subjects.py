"""Networks that are quantized, with the weights of every degree, and the sheets that they are measured on."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.experiment.evaluation import TEST_SEED
from bench.experiment.protocol import PRESETS
from bench.experiment.stages import ARCHITECTURE, EXAMPLE, checkpoint_name, finished
from bench.experiment.tasks import TASKS
from tocom.checkpoint import load_model
from tocom.compensator import Compensator
from tocom.export.graph.fuse import fuse
from tocom.vit import ReducedViT

SEEDS = (0, 1, 2)
SUBJECTS = ("example", *(f"{task}-{seed}" for task in ("board", "letters", "missing") for seed in SEEDS))
POOL = 1024  # training sheets that calibration sheets are chosen from
_BATCH = 64  # what a core's cache holds; larger batches are slower
_EXAMPLE_SCALE = 0.1
_CALIBRATION_SEED = 77  # no training run draws with it


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint that was fine-tuned without merging, and runs at any degree."""

    name: str  # as in files
    task: str  # of its sheets
    plain: nn.Module  # the timm model
    compensator: Compensator  # fused into it at every degree but 0
    scales: dict[int, float]  # degree -> scale of the compensator

    @functools.cache  # noqa: B019 - subjects live as long as the run
    def model(self, degree: int) -> nn.Module:
        """With the weights of a degree."""
        own = copy.deepcopy(self.plain)
        if degree:
            own.load_state_dict(fuse(own.state_dict(), self.compensator.between(0, degree, self.scales[degree])))
        return own

    def network(self, degree: int) -> ReducedViT:
        """The float reference at a degree."""
        return ReducedViT(self.model(degree), degree)

    def test(self, count: int) -> tuple[Tensor, Tensor]:
        """The first test sheets, normalized, and their classes."""
        pixels, classes = _sheets(self.task, "test", TEST_SEED, count)
        return pixels[:count], classes[:count]

    def spread(self, count: int) -> Tensor:
        """Calibration sheets, evenly spread over the pool."""
        pool, _ = _sheets(self.task, "train", _CALIBRATION_SEED, POOL)
        return pool[[index * len(pool) // count for index in range(count)]]


@torch.no_grad()
def logits_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Runs a network in batches: [B, 3, H, W] -> [B, classes]."""
    return torch.cat([network(part) for part in pixels.split(_BATCH)])


def subject_named(name: str) -> Subject:
    """One of `SUBJECTS`: the example's checkpoint, or one of the experiment with the scales that it chose."""
    if name == "example":
        compensator = Compensator.load(EXAMPLE / "compensator.safetensors")
        scales = dict.fromkeys(range(1, 33), _EXAMPLE_SCALE)
        return Subject(name, "board", load_model(str(EXAMPLE)).model, compensator, scales)
    task, _, seed = name.rpartition("-")
    model = timm.create_model(ARCHITECTURE, num_classes=10, **PRESETS["small"].model)
    model.load_state_dict(load_file(finished(checkpoint_name(task, 0, int(seed)))))
    outcomes = json.loads(finished(f"{task}-0-{seed}-constant.json").read_text())
    return Subject(name, task, model.eval().requires_grad_(False),
                   Compensator.load(finished("compensator-constant.safetensors")),
                   {outcome["target"]: outcome["scale"] for outcome in outcomes})  # fmt: skip


@functools.cache
def _sheets(task: str, split: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    # in batches of 256, so that fewer sheets are the first of more
    return TASKS[task].sheets(split, seed, -(-count // 256) * 256)
