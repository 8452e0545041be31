"""`tocom distill`: its options, and how it tells what it does."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tocom.export.cli.console import open_console
from tocom.export.cli.options import Checkpoint, Model, ModelArgs, NumClasses, ReductionName, Schedule, read_model_args
from tocom.runtime.errors import InputError

if TYPE_CHECKING:  # torch lies behind it, and `tocom --help` answers at once
    from tocom.calib.distill.training import TrainingOverview

_LINE_EVERY = 50  # steps, where the output is no terminal
_NAMED = 3  # unreadable images told by name


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(4, cores - 1))


def distill_command(
    model: Model,
    images: Annotated[
        str,
        typer.Option(
            help="Images the backbone was pre-trained on: a folder, or a dataset timm can open here, NAME:ROOT, like "
            "torch/cifar10:/data or hfds/NAME."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Compensator file to write (.safetensors).")],
    checkpoint: Checkpoint = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Images a process takes at once; even.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Times it does so before one optimizer step.")] = 1,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate for 512 images; it grows with batch x accumulate x processes.")
    ] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up, before the cosine.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.05,
    clip_grad: Annotated[float | None, typer.Option(help="Largest norm of the gradient. Default: as it is.")] = None,
    dropout: Annotated[float, typer.Option(help="Share of low-rank activations dropped while training.")] = 0.1,
    rank: Annotated[int, typer.Option(help="Rank of each of the 16 groups.")] = 2,
    schedule: Schedule = "constant",
    reduction: ReductionName = "merge",
    augment: Annotated[
        str,
        typer.Option(
            help="none prepares images as for evaluation; light crops and mirrors them at random; timm adds "
            "RandAugment, mixup and cutmix."
        ),
    ] = "timm",
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Whether images may be mirrored.")] = True,
    random_erasing: Annotated[float, typer.Option(help="Probability of random erasing, with timm.")] = 0.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16; the loss is float32 in any case.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that load images. Default: 4, or one less than the cores.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between saved states.")] = 200,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, whatever an interrupted training left.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
) -> None:
    """Train a compensator for a backbone by self-distillation, once; it then serves every checkpoint tuned from it.

    The state is kept beside the output, in OUT.training, with log.csv and TensorBoard events: the same command again
    goes on where it was. On several devices: torchrun --nproc-per-node N -m tocom distill ...

    Exit status: 0 done, 1 the loss is not finite, 2 bad input.
    """
    from tocom.calib.distill import DistillOptions, distill
    from tocom.calib.distill.image_source import open_images
    from tocom.checkpoint import load_model
    from tocom.runtime.files import write_atomically

    options = DistillOptions(
        steps=steps, batch=batch, accumulate=accumulate, lr=lr, weight_decay=weight_decay, warmup=warmup,
        clip_grad=clip_grad, dropout=dropout, rank=rank, schedule=schedule, reduction=reduction, augment=augment,
        flip=flip, erasing=random_erasing, precision=precision, device=device, save_every=save_every, seed=seed,
        workers=_workers() if workers is None else workers,
    )  # fmt: skip
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise InputError(f"the compensator must be a file in a folder that exists, got {out}.")
    pictures = open_images(images)
    loaded = load_model(model, checkpoint=checkpoint, num_classes=num_classes, **read_model_args(model_arg))
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
        self._console = open_console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        self._bar = Progress(*columns, console=self._console, transient=True)
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
        typer.echo(f"wrote {self.out}")
