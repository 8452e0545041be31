"""`tocom choose-scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tocom.export.cli.console import open_console, progress_bar
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import (
    AS_IN_THE_PAPER,
    Batch,
    CompensatorFile,
    ConfigFile,
    Network,
    Replace,
    SourceDegree,
    TokenReduction,
    existing,
    option,
    whole,
)
from tocom.export.cli.reading import read_degrees, read_scales
from tocom.runtime.family_files import SCALES


def choose_scale_command(
    *,
    network: Network,
    reduction: TokenReduction = AS_IN_THE_PAPER,
    compensator: CompensatorFile,
    source_degree: SourceDegree,
    degrees: Annotated[
        tuple[int, ...], option("Degrees to choose a scale for, e.g. 8,16.", read=read_degrees, metavar="R,R")
    ],
    images: Annotated[
        Path,
        existing("Folder of images to choose on, one folder per class; none that top-1 is reported on.",
                 metavar="FOLDER"),
    ],
    out: Annotated[Path, option("Folder of the family.", metavar="FOLDER")],
    config: ConfigFile = None,  # noqa: ARG001 - read before the command begins
    scales: Annotated[
        tuple[float, ...],
        option("Scales to try besides 0.05, 0.08, 0.1, 0.12 and 0.15, e.g. 0.03,0.2.", read=read_scales,
               metavar="X,...", show_default=False),
    ] = (),
    limit: Annotated[int, whole("Choose on at most this many images, evenly spread.", 1)] = 5000,
    batch: Batch = 32,
    replace: Replace = False,
) -> None:  # fmt: skip
    r"""Choose the weight of the compensator's change per degree, by top-1 on labelled images.

    Writes scales.json into the family's folder; `tocom compile` then takes it. Of equally good scales the one closest
    to the training scale is taken, and no compensation only where it is better than every scale. Finished degrees are
    kept: run the same command again after an interruption.

    Examples of use:

        tocom choose-scale --model my-folder --compensator c.safetensors --source-degree 0 --degrees 8,16 \
            --images train-images --out engines/my
        tocom choose-scale --config engines/my/compile.toml --images train-images --degrees 12

    Exit status: 0 done, 2 bad input.

    See also: `tocom compile`, `tocom distill`.
    """
    from tocom.export.source.options import CompileOptions

    options = CompileOptions(
        model=network.model, out=out, degrees=degrees, checkpoint=network.checkpoint, compensator=compensator,
        source_degree=source_degree, images=images, limit=limit, num_classes=network.num_classes,
        model_args=network.model_args, schedule=reduction.schedule, reduction=reduction.reduction, replace=replace,
    )  # fmt: skip
    require_extra("compile", "choosing a scale")
    from tocom.export.cli.family_table import scale_table
    from tocom.export.family.scales import choose_family_scales

    with progress_bar("loading") as tell:
        chosen = choose_family_scales(
            options, scales, batch, lambda degree, done, total: tell(f"r={degree}", done, total)
        )
    console = open_console()
    if source_degree in degrees:
        console.print(f"degree {source_degree} is the source degree: nothing is compensated there, no scale to choose")
    if chosen.degrees:
        from rich.markup import escape

        console.print(scale_table(chosen.choices, chosen.degrees))
        wrote = escape(str(out / SCALES))
        console.print(f"[green]wrote[/] {wrote}   `tocom compile` without --scale takes it")
