"""`tocom cascade`: finds the cascade of a family, measures it, and writes cascade.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table

from tocom.export.cli.console import open_console, progress_bar
from tocom.export.cli.extras import require_engine
from tocom.export.cli.options import Batch, FamilyFolder, Limit, existing, number, option, whole
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import CASCADE
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import Family

if TYPE_CHECKING:
    from tocom.calib.cascade import Candidate
    from tocom.calib.cascade_family import FoundCascade
    from tocom.calib.cascade_trial import Row, Trial


def cascade_command(
    family: FamilyFolder,
    /,
    *,
    images: Annotated[Path, existing("Folder of images, one folder per class.", metavar="FOLDER")],
    accuracy: Annotated[float | None, number("Least top-1 to keep, a share such as 0.94.", metavar="SHARE")] = None,
    max_drop: Annotated[
        float | None,
        number("Top-1 that may be lost against the lowest degree. Default: 0.5 points.", metavar="POINTS"),
    ] = None,
    batch: Batch = 8,
    limit: Limit = 5000,
    seed: Annotated[int, whole("Seed of the draw that halves the images.")] = 0,
    json_file: Annotated[Path | None, option("Write all numbers there, as JSON.", metavar="FILE")] = None,
) -> None:
    """Find the cascade that keeps an accuracy at the least mean cost: a high degree first, a lower one if unsure.

    One half of the images calibrates, the other half is reported. Writes cascade.json into the family's folder;
    `tocom infer --cascade` runs it. Where no cascade is cheaper than a single degree that keeps the same, this says so,
    and there is no cascade.json afterwards.

    Examples of use:

        tocom cascade engines/my --images val-images
        tocom cascade engines/my --images val-images --accuracy 0.94 --batch 1

    Exit status: 0 done, also where no cascade pays; 1 nothing keeps what is asked for; 2 bad input.

    See also: `tocom infer --cascade`, `tocom frontier`.
    """
    require_engine()
    from tocom.calib.cascade import Goal
    from tocom.calib.cascade_family import CascadeOptions, find_cascade
    from tocom.calib.labelled import LabelledImages
    from tocom.export.family.lock import locked

    if accuracy is not None and max_drop is not None:
        raise InputError("--accuracy and --max-drop exclude each other: give one of them")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"--json-file must name a file in a folder that is there, got {one_line(json_file)}")
    goal = Goal(accuracy) if max_drop is None else Goal(accuracy, max_drop)
    manifest = Family.read(family)
    labelled = LabelledImages.below(images, manifest.input, manifest.class_names, manifest.classes, limit)
    with locked(family), progress_bar("reading") as tell:
        result = find_cascade(family, manifest, labelled, CascadeOptions(goal, batch, seed), tell)
        if result.cascade is None:
            (family / CASCADE).unlink(missing_ok=True)  # one that was found earlier pays no more
        else:
            result.cascade.write(family)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(_as_json(result), indent=1) + "\n").encode())
    console = open_console()
    if result.trial is not None:
        console.print(cascade_table(result.trial))
    if result.cascade is None:
        console.print(_no_cascade(result))
        return
    console.print(_stages(result))
    if (note := better_single(result.trial)) is not None:
        console.print(f"[yellow]note[/]: {note}")
    console.print(f"[green]wrote[/] {escape(one_line(family / CASCADE))}   try: tocom infer "
                  f"{escape(one_line(family))} --cascade IMAGE...")  # fmt: skip


def cascade_table(trial: Trial) -> Table:
    """A cascade and every single degree, and who is the best of equal or lower mean cost.

    Args:
        trial: What was measured.
    """
    table = Table(title=f"on {trial.images} images that did not calibrate, batch {trial.batch}", title_justify="left",
                  caption_justify="left")  # fmt: skip
    table.add_column("engine")
    for name in ("top-1, %", "ms per image", "GMACs", "sent on", "cascade is better by, points"):
        table.add_column(name, justify="right")
    rivals = {cost: trial.best_single(cost) for cost in ("ms", "gmacs")}
    table.add_row(*_cells(trial.cascade, f"cascade {', '.join(map(str, trial.cascade.degrees))}"), "")
    table.add_section()
    for row in trial.singles:
        marks = "".join(mark for mark, cost in (("*", "ms"), ("+", "gmacs")) if rivals[cost] is row)
        gain = f"{100 * row.gain:+.2f} ±{100 * row.gain_error:.2f}"
        table.add_row(*_cells(row, f"{row.name} {marks}".rstrip()), gain)
    table.caption = "± standard errors. The best single degree of equal or lower mean cost: * by time, + by GMACs."
    return table


def better_single(trial: Trial) -> str | None:
    """What is to be said of a single degree that takes no longer and was right more often; None where there is none.

    Args:
        trial: What was measured.
    """
    rival = trial.best_single()
    if rival is None or rival.gain >= 0:
        return None
    return (f"{rival.name} takes no longer and was right more often on these images, by {-100 * rival.gain:.2f} "
            f"±{100 * rival.gain_error:.2f} points")  # fmt: skip


def _cells(row: Row, name: str) -> tuple[str, ...]:
    sent = ", ".join(f"{share:.1%}" for share in row.shares[1:])
    return (name, f"{100 * row.accuracy:.2f} ±{100 * row.error:.2f}", f"{row.ms:.3f} ±{row.ms_error:.3f}",
            f"{row.gmacs:.4g}", sent)  # fmt: skip


def _stages(result: FoundCascade) -> str:
    (*inner, last) = result.cascade.stages
    parts = [f"degree {stage.degree} answers from a confidence of {stage.threshold:.3f} on (temperature "
            f"{stage.temperature:.3f})" for stage in inner]  # fmt: skip
    return f"{', then '.join(parts)}, degree {last.degree} the rest; calibrated on {result.images} images"


def _no_cascade(result: FoundCascade) -> str:
    cascade, single = result.calibration.cascade, result.calibration.single
    if cascade is None:
        return (f"no cascade is sure to keep it; {_named(single)} is the cheapest single degree that does. No cascade "
                "is written")  # fmt: skip
    measured = ""
    if result.trial is not None:
        of_single = next(row for row in result.trial.singles if row.degrees == single.cascade.degrees)
        measured = f" (measured: {result.trial.cascade.ms:.3f} and {of_single.ms:.3f} ms)"
    return (f"no cascade pays on this machine: the cheapest that keeps it, {_named(cascade)}, takes {cascade.cost:.3f} "
            f"ms per image, {_named(single)} alone {single.cost:.3f} ms{measured}. No cascade is written")  # fmt: skip


def _named(candidate: Candidate) -> str:
    degrees = candidate.cascade.degrees
    return f"degree {degrees[0]}" if len(degrees) == 1 else f"degrees {', '.join(map(str, degrees))}"


def _as_json(result: FoundCascade) -> dict[str, object]:
    trial = None
    if result.trial is not None:
        trial = asdict(result.trial)
        for cost in ("ms", "gmacs"):
            rival = result.trial.best_single(cost)
            trial[f"best_single_by_{cost}"] = None if rival is None else rival.degrees[0]
    return {
        "plan": None if result.cascade is None else result.cascade.to_json(),
        "calibrated_on": result.images,
        "cascade": None if result.calibration.cascade is None else asdict(result.calibration.cascade),
        "single": None if result.calibration.single is None else asdict(result.calibration.single),
        "trial": trial,
    }
