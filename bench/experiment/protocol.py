"""What the experiment does: sizes, degrees, seeds; three presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tocom.calib.scale_choice import PAPER_SCALES


@dataclass(frozen=True)
class Method:
    """A way of removing tokens, with a compensator of its own."""

    name: str  # as in files and tables
    schedule: str  # name of the schedule family
    reduction: str  # name of the token reduction


CONSTANT = Method("constant", "constant", "merge")
STRIDED = Method("strided", "strided:2", "merge")
PRUNED = Method("pruned", "constant", "prune")
METHODS = {method.name: method for method in (CONSTANT, STRIDED, PRUNED)}


@dataclass(frozen=True)
class Protocol:
    """One size of the experiment; equal protocols can go on from each other's files.

    Attributes:
        model: Arguments of timm's `vit_tiny_patch16_224`.
    """

    name: str = "small"  # of the preset
    model: Mapping[str, Any] = field(
        default_factory=lambda: {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    )
    pretraining_steps: int = 3000  # of the backbone, 64 sheets each
    distill_steps: int = 3000  # of every compensator, 64 sheets each
    distill_lr: float = 0.04  # peak learning rate for 512 images
    finetune_steps: int = 500  # of every downstream checkpoint, 64 sheets each
    sources: tuple[int, ...] = (0, 8, 16)  # degrees that checkpoints are fine-tuned at
    targets: tuple[int, ...] = tuple(range(0, 17, 2))  # degrees that they run at
    tasks: tuple[str, ...] = ("board", "letters", "missing")  # downstream tasks
    seeds: tuple[int, ...] = (0, 1, 2)  # of fine-tuning: head, order of sheets
    methods: tuple[str, ...] = ("constant", "strided", "pruned")  # the others than constant from source degree 0 only
    scales: tuple[float, ...] = (0.03, *PAPER_SCALES)  # the paper's, and a smaller one for tasks far from pre-training
    val_sheets: int = 768  # on which a scale is chosen
    test_sheets: int = 1536  # on which everything reported is measured


PRESETS = {
    "small": Protocol(),
    "quick": Protocol(
        name="quick", pretraining_steps=900, distill_steps=500, finetune_steps=250, tasks=("board",), seeds=(0,),
        targets=(0, 4, 8, 12, 16), methods=("constant", "strided"), val_sheets=384,
        test_sheets=1024,
    ),
    "large": Protocol(
        name="large", model={"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3},
        pretraining_steps=20_000, distill_steps=20_000, finetune_steps=4000, seeds=(0, 1, 2, 3, 4), test_sheets=8192,
    ),
}  # fmt: skip
