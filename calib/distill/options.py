"""How a compensator is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from tocom.calib.distill.augmentation import PRESETS
from tocom.runtime.errors import InputError

LR_IMAGES = 512  # the total batch that a learning rate is given for
_MAY_CHANGE = {"batch", "accumulate", "device", "workers", "save_every"}  # these do not decide the result


@dataclass(frozen=True)
class DistillOptions:
    """How to train; the defaults are the paper's where it gives one.

    Attributes:
        steps: Optimizer steps.
        batch: Images that a process takes at once; even, because images are mixed in pairs.
        accumulate: Times it does so before one optimizer step.
        lr: Peak learning rate of AdamW for a total batch of 512 images; it grows with batch * accumulate * processes.
            Reached after `warmup` steps and then lowered along a cosine.
        weight_decay: AdamW's.
        warmup: Steps of linear warm-up.
        clip_grad: Largest norm of the gradient; None leaves it as it is.
        delta_scale: Weight of the change while training.
        temperature: tau of both softmaxes.
        dropout: Share of low-rank activations that are dropped while training.
        rank: Rank k of each of the 16 groups.
        schedule: Name of the schedule family: how a degree is spread over the blocks.
        reduction: Name of the token reduction.
        augment: How PIL images are augmented, one of `tocom.calib.distill.augmentation.PRESETS`.
        flip: Whether augmentation may mirror images.
        erasing: Probability of random erasing, with the timm preset.
        precision: "fp32", or "bf16" and "fp16" by autocast; the loss is float32 in any case.
        device: "auto", "cpu" or "cuda".
        workers: Processes that load images, for each training process.
        save_every: Steps between saved states.
        seed: Of everything that is drawn.

    Raises:
        InputError: If a number cannot be trained with.
    """

    steps: int = 2000
    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    clip_grad: float | None = None
    delta_scale: float = 0.1
    temperature: float = 1.0
    dropout: float = 0.1
    rank: int = 2
    schedule: str = "constant"
    reduction: str = "merge"
    augment: str = "timm"
    flip: bool = True
    erasing: float = 0.0
    precision: str = "fp32"
    device: str = "auto"
    workers: int = 0
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        clip = 1.0 if self.clip_grad is None else self.clip_grad
        positive = (self.steps, self.rank, self.accumulate, self.save_every, self.lr, self.temperature, clip)
        if not all(math.isfinite(number) and number > 0 for number in positive):
            raise InputError("steps, rank, accumulation, save interval, learning rate, temperature and gradient "
                             f"clipping must be positive, got {positive}.")  # fmt: skip
        if not (math.isfinite(self.delta_scale) and self.delta_scale) or not 0 <= self.weight_decay < math.inf:
            raise InputError("the delta scale must be finite and not 0, the weight decay 0 or more, got "
                             f"{self.delta_scale} and {self.weight_decay}.")  # fmt: skip
        if self.batch < 2 or self.batch % 2:
            raise InputError(f"a batch must be even, since images are mixed in pairs, got {self.batch}.")
        if not (0 <= self.dropout < 1 and 0 <= self.erasing <= 1):
            raise InputError("the dropout must be at least 0 and below 1, the probability of erasing 0 to 1, got "
                             f"{self.dropout} and {self.erasing}.")  # fmt: skip
        if min(self.warmup, self.workers, self.seed) < 0:
            raise InputError("warm-up steps, workers and seed must be 0 or more, got "
                             f"{self.warmup}, {self.workers} and {self.seed}.")  # fmt: skip
        if self.augment not in PRESETS:
            raise InputError(f"the augmentation must be one of {', '.join(PRESETS)}, got {self.augment!r}.")

    @property
    def deciding(self) -> dict[str, object]:
        """The options that decide the result, but for the batch, which counts in total."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _MAY_CHANGE}

    def peak_lr(self, total_batch: int) -> float:
        """Learning rate after the warm-up, for a total batch."""
        return self.lr * total_batch / LR_IMAGES

    def lr_at(self, step: int, total_batch: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to nothing."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.peak_lr(total_batch) * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
