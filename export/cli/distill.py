"""`tocom distill`: its options, and how it tells what it does."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from tocom.export.cli.console import open_progress
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import AS_IN_THE_PAPER, Network, TokenReduction, choice, flag, number, option, whole
from tocom.runtime.errors import InputError

if TYPE_CHECKING:  # torch lies behind it, and `tocom --help` answers at once
    from tocom.calib.distill.options import DistillOptions
    from tocom.calib.distill.training import TrainingOverview

TRAINING = Group("Training", sort_key=3)
AUGMENTATION = Group("Augmentation", sort_key=4)
MACHINE = Group("Machine", sort_key=5)
_LINE_EVERY = 50  # steps, where the output is no terminal
_NAMED = 3  # unreadable images told by name


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(4, cores - 1))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Training:
    """How a compensator is trained."""

    steps: Annotated[int, whole("Optimizer steps.", 1, panel=TRAINING)] = 2000
    batch_size: Annotated[int, whole("Images a process takes at once; even.", panel=TRAINING)] = 128
    accumulate: Annotated[int, whole("Batches that a process takes before one optimizer step.", panel=TRAINING)] = 1
    lr: Annotated[
        float,
        number("Peak learning rate for 512 images; it grows with batch size x accumulate x processes.", panel=TRAINING),
    ] = 1e-3
    warmup: Annotated[int, whole("Steps of linear warm-up, before the cosine.", panel=TRAINING)] = 50
    weight_decay: Annotated[float, number("Weight decay of AdamW.", panel=TRAINING)] = 0.05
    clip_grad: Annotated[float | None, number("Largest norm of the gradient. Default: as it is.", panel=TRAINING)] = (
        None
    )
    dropout: Annotated[
        float, number("Share of low-rank activations that are dropped while training.", panel=TRAINING)
    ] = 0.1
    rank: Annotated[int, whole("Rank of each of the 16 groups.", panel=TRAINING)] = 2
    seed: Annotated[int, whole("Seed of everything that is drawn.", panel=TRAINING)] = 0
    augment: Annotated[
        Literal["none", "light", "timm"],
        choice(
            "none prepares images as for evaluation; light crops and mirrors them at random; timm adds RandAugment, "
            "mixup and cutmix.",
            panel=AUGMENTATION,
        ),
    ] = "timm"
    flip: Annotated[bool, option("Whether images may be mirrored.", panel=AUGMENTATION, negative="--no-flip")] = True
    random_erasing: Annotated[float, number("Probability of random erasing, with timm.", panel=AUGMENTATION)] = 0.0
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        choice("Number format to train in; the loss is float32 in any case.", panel=MACHINE),
    ] = "fp32"
    device: Annotated[Literal["auto", "cpu", "cuda"], choice("Where to train.", panel=MACHINE)] = "auto"
    workers: Annotated[
        int | None,
        whole("Processes that load images. Default: 4, or one less than the cores.", 0, panel=MACHINE),
    ] = None
    save_every: Annotated[int, whole("Steps between saved states.", panel=MACHINE)] = 200

    def options(self, reduction: TokenReduction) -> DistillOptions:
        """The same for the training."""
        from tocom.calib.distill import DistillOptions

        return DistillOptions(
            steps=self.steps, batch=self.batch_size, accumulate=self.accumulate, lr=self.lr,
            weight_decay=self.weight_decay, warmup=self.warmup, clip_grad=self.clip_grad, dropout=self.dropout,
            rank=self.rank, schedule=reduction.schedule, reduction=reduction.reduction, augment=self.augment,
            flip=self.flip, erasing=self.random_erasing, precision=self.precision, device=self.device,
            save_every=self.save_every, seed=self.seed, workers=_workers() if self.workers is None else self.workers,
        )  # fmt: skip


_DEFAULTS = Training()


def distill_command(
    *,
    network: Network,
    images: Annotated[
        str,
        option(
            "Images the backbone was pre-trained on: a folder, or a dataset timm can open here, NAME:ROOT, like "
            "torch/cifar10:/data or hfds/NAME.",
            metavar="FOLDER|NAME",
        ),
    ],
    out: Annotated[Path, option("Compensator file to write (.safetensors).", metavar="FILE")],
    restart: Annotated[bool, flag("Begin anew, whatever an interrupted training left.")] = False,
    reduction: TokenReduction = AS_IN_THE_PAPER,
    training: Training = _DEFAULTS,
) -> None:
    """Train a compensator for a backbone by self-distillation, once; it then serves every checkpoint tuned from it.

    Writes the compensator to --out. The state is kept beside it, in OUT.training, with log.csv and TensorBoard events:
    the same command again goes on where it was.

    Examples of use:

        tocom distill --model deit_small_patch16_224 --images imagenet/train --out compensator.safetensors
        tocom distill --model my-folder --images train-images --steps 500 --batch-size 64 --out c.safetensors
        torchrun --nproc-per-node 4 -m tocom distill --model my-folder --images train-images --out c.safetensors

    Exit status: 0 done, 1 the loss is not finite, 2 bad input.

    See also: `tocom choose-scale`, `tocom compile --compensator`.
    """
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise InputError(f"the compensator must be a file in a folder that exists, got {out}.")
    require_extra("distill", "training a compensator")
    from tocom.calib.distill import distill
    from tocom.calib.distill.image_source import open_images
    from tocom.checkpoint import load_model
    from tocom.runtime.files import write_atomically

    options = training.options(reduction)
    pictures = open_images(images)
    loaded = load_model(
        network.model, checkpoint=network.checkpoint, num_classes=network.num_classes, **network.model_args
    )
    with _Telling(len(pictures), out) as telling:
        trained = distill(
            loaded.model, pictures, backbone=loaded.architecture, backbone_sha256=loaded.checkpoint_sha256,
            options=options, state_folder=out.with_name(f"{out.name}.training"), restart=restart,
            on_start=telling.start, on_step=telling.step, on_unreadable=telling.unreadable.extend,
        )  # fmt: skip
    if telling.plan is not None:  # in the first process only
        write_atomically(out, trained.to_safetensors())
        telling.finish()


class _Telling:
    """Tells a training: a table at the start, a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, images: int, out: Path) -> None:
        self.images, self.out = images, out
        self.unreadable: list[str] = []
        self.plan: TrainingOverview | None = None
        self._bar = open_progress(remaining=True)
        self._console = self._bar.console
        self._task = self._bar.add_task("distilling")
        self._times: deque[float] = deque(maxlen=_LINE_EVERY + 1)

    def __enter__(self) -> _Telling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def start(self, plan: TrainingOverview) -> None:
        """What will be trained."""
        self.plan, options, division = plan, plan.options, plan.division
        many = "es" if division.processes > 1 else ""
        self._console.print(
            f"{plan.info.backbone}: {plan.parameters:,} parameters beside {plan.frozen:,} frozen ones, "
            f"{self.images} images, {options.steps} steps of {division.total} images ({division.batch} x "
            f"{division.accumulate} x {division.processes} process{many}), "
            f"learning rate {options.peak_lr(division.total):.3g}, {options.precision} on {plan.device}, "
            f"schedule {plan.info.schedule}, reduction {plan.info.reduction}, augmentation {options.augment}",
            soft_wrap=True,
        )
        if plan.steps_done:
            done = "already trained" if plan.steps_done == options.steps else f"goes on after step {plan.steps_done}"
            self._console.print(done)
        self._times.append(time.monotonic())
        if self._console.is_terminal and plan.steps_done < options.steps:
            self._bar.update(self._task, total=options.steps, completed=plan.steps_done)
            self._bar.start()

    def step(self, step: int, loss: float) -> None:
        """A step is done."""
        plan = self.plan
        self._times.append(time.monotonic())
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        rate = plan.division.total / max(seconds, 1e-9)
        text = f"KL {loss:.4f}, {rate:,.0f} images/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
        elif step % _LINE_EVERY == 0 or step in (1, plan.options.steps):
            left = round((plan.options.steps - step) * seconds)
            self._console.print(f"step {step} of {plan.options.steps}: {text}, {left // 60}:{left % 60:02} left")

    def finish(self) -> None:
        """The compensator is written."""
        if self.unreadable:
            names = ", ".join(self.unreadable[:_NAMED]) + (", ..." if len(self.unreadable) > _NAMED else "")
            self._console.print(f"{len(self.unreadable)} of {self.images} images could not be read and were replaced "
                                f"by others: {names}", soft_wrap=True, markup=False)  # fmt: skip
        print(f"wrote {self.out}")
