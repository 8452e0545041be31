"""`tocom choose-scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tocom.export.cli.console import open_console
from tocom.export.cli.options import (
    Checkpoint,
    Model,
    ModelArgs,
    NumClasses,
    ReductionName,
    Schedule,
    read_degrees,
    read_model_args,
)
from tocom.runtime.errors import InputError
from tocom.runtime.family_files import SCALES

# Heavy imports (torch, timm) lie in the commands that need them, as everywhere in this room.


def choose_scale_command(
    model: Model,
    compensator: Annotated[Path, typer.Option(help="Compensator, .safetensors or the original .pth.")],
    source_degree: Annotated[int, typer.Option(help="Degree the checkpoint was fine-tuned at.")],
    degrees: Annotated[str, typer.Option(help="Degrees to choose a scale for, e.g. 8,16.")],
    images: Annotated[
        Path, typer.Option(help="Folder of images to choose on, one folder per class; none that top-1 is reported on.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the family; scales.json is written there.")],
    checkpoint: Checkpoint = None,
    scales: Annotated[
        str | None, typer.Option(help="Scales to try besides 0.05, 0.08, 0.1, 0.12 and 0.15, e.g. 0.03,0.2.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Choose on at most this many images, evenly spread.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
    schedule: Schedule = "constant",
    reduction: ReductionName = "merge",
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite another network's choices in the folder.")
    ] = False,
) -> None:
    """Choose the weight of the compensator's change per degree, by top-1 on labelled images; compile then takes it.

    Of equally good scales the one closest to the training scale is taken, and no compensation only where it is better
    than every scale. Finished degrees are kept: run the same command again after an interruption.
    """
    wanted, further = read_degrees(degrees), _read_scales(scales)
    arguments = read_model_args(model_arg)
    from tocom.export.cli.family_table import scale_table
    from tocom.export.family.scales import choose_family_scales
    from tocom.export.source.options import CompileOptions

    options = CompileOptions(
        model=model, out=out, degrees=wanted, checkpoint=checkpoint, compensator=compensator,
        source_degree=source_degree, images=images, limit=limit, num_classes=num_classes, model_args=arguments,
        schedule=schedule, reduction=reduction, replace=replace,
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=open_console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)
        chosen = choose_family_scales(
            options, further, batch,
            lambda degree, done, total: progress.update(task, description=f"r={degree}", completed=done, total=total),
        )  # fmt: skip
    console = open_console()
    if source_degree in wanted:
        console.print(f"degree {source_degree} is the source degree: nothing is compensated there, no scale to choose")
    if chosen.degrees:
        console.print(scale_table(chosen.choices, chosen.degrees))
        wrote = escape(str(out / SCALES))
        console.print(f"[green]wrote[/] {wrote}   `tocom compile` without --scale takes it")


def _read_scales(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        raise InputError(f"scales must be numbers parted by commas, like 0.03,0.2, got {text!r}.") from None
