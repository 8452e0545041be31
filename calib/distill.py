"""Self-distillation: a pre-trained backbone and its own training images -> a compensator (ToCom, section 3.4).

Teacher and student are the same frozen network at two degrees; only the compensator's pairs are trained, so the
network that comes out of it is the one that went in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tocom.compensator import Compensator, CompensatorInfo
from tocom.errors import InputError
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class DistillOptions:
    """How to train; the defaults are the paper's where it gives one.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate of AdamW, reached after `warmup` steps and then lowered along a cosine.
        weight_decay: AdamW's.
        warmup: Steps of linear warm-up.
        delta_scale: Weight of the change while training.
        temperature: tau of both softmaxes.
        rank: Rank k of each of the 16 groups.
        seed: Of the weights' and the degrees' draw.

    Raises:
        InputError: If a number cannot be trained with.
    """

    steps: int = 2000
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    delta_scale: float = 0.1
    temperature: float = 1.0
    rank: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (self.steps, self.rank, self.lr, self.temperature)
        if not all(math.isfinite(number) and number > 0 for number in positive):
            raise InputError(f"steps, rank, learning rate and temperature must be positive, got {positive}.")
        if not (math.isfinite(self.delta_scale) and self.delta_scale) or not self.weight_decay >= 0:
            raise InputError("the delta scale must be finite and not 0, the weight decay 0 or more, got "
                             f"{self.delta_scale} and {self.weight_decay}.")  # fmt: skip


def distill(
    model: nn.Module,
    batches: Iterator[Tensor],
    *,
    backbone: str,
    backbone_sha256: str,
    options: DistillOptions = DistillOptions(),
    on_step: Callable[[int, float], None] | None = None,
) -> Compensator:
    """Trains a compensator for a backbone.

    Every step draws a source and a target degree, different, from 0..16; the teacher is the frozen model at the source
    degree, the student the frozen model at the target degree with the compensator; the loss is KL(teacher || student)
    on the soft labels.

    Args:
        model: The pre-trained timm model; its weights are frozen while training and left as they were.
        batches: Normalized images [B, 3, H, W]; at least `options.steps` batches.
        backbone: Architecture name, kept in the compensator.
        backbone_sha256: Hash of the model's weights, kept in the compensator.
        options: How to train.
        on_step: Called after every step with the steps done and the loss.

    Returns:
        The compensator, in evaluation mode.

    Raises:
        InputError: If the batches run out, or the model is not supported.
    """
    info = CompensatorInfo(
        width=model.embed_dim,
        depth=len(model.blocks),
        rank=options.rank,
        backbone=backbone,
        training_scale=options.delta_scale,
        backbone_sha256=backbone_sha256,
    )
    torch.manual_seed(options.seed)
    draw = torch.Generator().manual_seed(options.seed)
    compensator = Compensator(info).train()
    frozen = model.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(compensator.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * _schedule(step, options)
        images = next(batches, None)
        if images is None:
            raise InputError(f"distillation needs {options.steps} batches of images, the data ended after {step}.")
        source, target = _draw_degrees(info.groups, draw)
        with torch.no_grad():
            teacher = ReducedViT(frozen, source)(images)
        student = ReducedViT(frozen, target, compensator.between(source, target))(images)
        loss = _divergence(teacher, student, options.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return compensator.eval()


def _draw_degrees(groups: int, draw: torch.Generator) -> tuple[int, int]:
    """Two different degrees, uniform over all ordered pairs."""
    source = int(torch.randint(groups + 1, (), generator=draw))
    target = int(torch.randint(groups, (), generator=draw))
    return source, target + (target >= source)


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened predictions, mean over the batch."""
    log_teacher = functional.log_softmax(teacher / temperature, dim=-1)
    log_student = functional.log_softmax(student / temperature, dim=-1)
    return functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


def _schedule(step: int, options: DistillOptions) -> float:
    warm = min(1.0, (step + 1) / max(options.warmup, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
