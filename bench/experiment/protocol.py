"""What the experiment does: sizes, degrees, seeds; three presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tocom.calib.scale_choice import PAPER_SCALES


@dataclass(frozen=True)
class Method:
    """A way of removing tokens, with a compensator of its own.

    Attributes:
        name: As in files and tables.
        schedule: Name of the schedule family.
        reduction: Name of the token reduction.
    """

    name: str
    schedule: str
    reduction: str


CONSTANT = Method("constant", "constant", "merge")
STRIDED = Method("strided", "strided:2", "merge")
PRUNED = Method("pruned", "constant", "prune")
METHODS = {method.name: method for method in (CONSTANT, STRIDED, PRUNED)}


@dataclass(frozen=True)
class Protocol:
    """One size of the experiment; equal protocols can go on from each other's files.

    Attributes:
        name: Of the preset.
        model: Arguments of timm's `vit_tiny_patch16_224`.
        pretraining_steps: Of the backbone, 64 sheets each.
        distill_steps: Of every compensator, 64 sheets each.
        distill_lr: Peak learning rate for 512 images.
        finetune_steps: Of every downstream checkpoint, 64 sheets each.
        sources: Degrees that checkpoints are fine-tuned at.
        targets: Degrees that they run at.
        tasks: Downstream tasks.
        seeds: Of fine-tuning: head, order of sheets.
        methods: What is evaluated; the others than constant from source degree 0 only.
        scales: That the compensator is tried at: the paper's, and a smaller one for tasks far from the pre-training.
        val_sheets: On which a scale is chosen.
        test_sheets: On which everything reported is measured.
    """

    name: str = "small"
    model: Mapping[str, Any] = field(
        default_factory=lambda: {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    )
    pretraining_steps: int = 3000
    distill_steps: int = 3000
    distill_lr: float = 0.04
    finetune_steps: int = 500
    sources: tuple[int, ...] = (0, 8, 16)
    targets: tuple[int, ...] = tuple(range(0, 17, 2))
    tasks: tuple[str, ...] = ("board", "letters", "missing")
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ("constant", "strided", "pruned")
    scales: tuple[float, ...] = (0.03, *PAPER_SCALES)
    val_sheets: int = 768
    test_sheets: int = 1536


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
        tasks=("board", "photo", "letters", "missing"),
    ),
}  # fmt: skip
