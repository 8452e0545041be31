"""`tocom cascade`: finds the cascade of a family, measures it, and writes cascade.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tocom.export.cli.console import open_console
from tocom.export.cli.options import FamilyFolder, Limit
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import CASCADE
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import Family

if TYPE_CHECKING:
    from tocom.calib.cascade import Candidate
    from tocom.calib.cascade_family import FoundCascade
    from tocom.calib.cascade_trial import Row, Trial


def cascade_command(
    engines: FamilyFolder,
    images: Annotated[Path, typer.Option(help="Folder of images, one folder per class.")],
    accuracy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Least top-1 to keep, a share such as 0.94.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Top-1 that may be lost against the lowest degree. Default: 0.5 points."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call that costs are measured at.")] = 8,
    limit: Limit = 5000,
    seed: Annotated[int, typer.Option(help="Of the draw that halves the images.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
) -> None:
    """Find the cascade that keeps an accuracy at the least mean cost: a high degree first, a lower one if unsure.

    One half of the images calibrates, the other half is reported. It goes to cascade.json in the family's folder;
    `tocom infer --cascade` runs it. Where no cascade is cheaper than a single degree that keeps the same, this says so,
    and there is no cascade.json afterwards.

    Exit status: 0 done, also where no cascade pays; 1 nothing keeps what is asked for; 2 bad input.
    """
    from tocom.calib.cascade import Goal
    from tocom.calib.cascade_family import CascadeOptions, find_cascade
    from tocom.calib.labelled import LabelledImages
    from tocom.export.family.lock import locked

    if accuracy is not None and max_drop is not None:
        raise InputError("--accuracy and --max-drop exclude each other: give one of them")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(f"--json must name a file in a folder that is there, got {one_line(json_file)}")
    goal = Goal(accuracy) if max_drop is None else Goal(accuracy, max_drop)
    family = Family.read(engines)
    given = LabelledImages.below(images, family.input, family.class_names, family.classes, limit)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    on_terminal = open_console(stderr=True)
    with (
        locked(engines),
        Progress(*columns, console=on_terminal, transient=True, disable=not on_terminal.is_terminal) as progress,
    ):
        task = progress.add_task("reading", total=None)
        found = find_cascade(
            engines, family, given, CascadeOptions(goal, batch, seed),
            lambda text, done, total: progress.update(task, description=text, completed=done, total=total),
        )  # fmt: skip
        if found.cascade is None:
            (engines / CASCADE).unlink(missing_ok=True)  # one that was found earlier pays no more
        else:
            found.cascade.write(engines)
    if json_file is not None:
        write_atomically(json_file, (json.dumps(_as_json(found), indent=1) + "\n").encode())
    console = open_console()
    if found.trial is not None:
        console.print(cascade_table(found.trial))
    if found.cascade is None:
        console.print(_no_cascade(found))
        return
    console.print(_stages(found))
    if (note := better_single(found.trial)) is not None:
        console.print(f"[yellow]note[/]: {note}")
    console.print(f"[green]wrote[/] {escape(one_line(engines / CASCADE))}   try: tocom infer --engines "
                  f"{escape(one_line(engines))} --cascade IMAGE...")  # fmt: skip


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


def _stages(found: FoundCascade) -> str:
    (*inner, last) = found.cascade.stages
    told = [f"degree {stage.degree} answers from a confidence of {stage.threshold:.3f} on (temperature "
            f"{stage.temperature:.3f})" for stage in inner]  # fmt: skip
    return f"{', then '.join(told)}, degree {last.degree} the rest; calibrated on {found.images} images"


def _no_cascade(found: FoundCascade) -> str:
    cascade, single = found.calibration.cascade, found.calibration.single
    if cascade is None:
        return (f"no cascade is sure to keep it; {_told(single)} is the cheapest single degree that does. No cascade "
                "is written")  # fmt: skip
    measured = ""
    if found.trial is not None:
        of_single = next(row for row in found.trial.singles if row.degrees == single.cascade.degrees)
        measured = f" (measured: {found.trial.cascade.ms:.3f} and {of_single.ms:.3f} ms)"
    return (f"no cascade pays on this machine: the cheapest that keeps it, {_told(cascade)}, takes {cascade.cost:.3f} "
            f"ms per image, {_told(single)} alone {single.cost:.3f} ms{measured}. No cascade is written")  # fmt: skip


def _told(candidate: Candidate) -> str:
    degrees = candidate.cascade.degrees
    return f"degree {degrees[0]}" if len(degrees) == 1 else f"degrees {', '.join(map(str, degrees))}"


def _as_json(found: FoundCascade) -> dict[str, object]:
    trial = None
    if found.trial is not None:
        trial = asdict(found.trial)
        for cost in ("ms", "gmacs"):
            rival = found.trial.best_single(cost)
            trial[f"best_single_by_{cost}"] = None if rival is None else rival.degrees[0]
    return {
        "plan": None if found.cascade is None else found.cascade.to_json(),
        "calibrated_on": found.images,
        "cascade": None if found.calibration.cascade is None else asdict(found.calibration.cascade),
        "single": None if found.calibration.single is None else asdict(found.calibration.single),
        "trial": trial,
    }
