"""`tocom frontier`: what every degree of a family takes and gives, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.markup import escape
from rich.table import Table

from tocom.export.cli.console import open_console, stages
from tocom.export.cli.extras import require_engine, require_extra
from tocom.export.cli.options import FamilyFolder, option
from tocom.export.cli.reading import read_batches
from tocom.runtime.checked_json import Json
from tocom.runtime.degrees.cascade import Cascade
from tocom.runtime.degrees.choose import Point, points
from tocom.runtime.degrees.local_latency import local_latencies, this_machine
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import CASCADE
from tocom.runtime.manifest import Family


@dataclass(frozen=True)
class CascadeFigures:
    """What cascade.json says of a cascade.

    Attributes:
        degrees: Of the stages, falling.
        batch: Images per call that its time is of.
        ms: Mean time of an image, in ms.
        gmacs: Mean multiply-accumulates of an image, in units of 1e9.
        accuracy: Top-1, a share.
        error: Its standard error.
        against: A degree that was measured on the same images.
        gain: Accuracy of the cascade minus that of `against`.
        images: How many.
        machine: Where the time was measured.
    """

    degrees: tuple[int, ...]
    batch: int
    ms: float
    gmacs: float
    accuracy: float
    error: float
    against: int
    gain: float
    images: int
    machine: str

    @classmethod
    def read(cls, folder: Path, family: Family) -> CascadeFigures | None:
        """Those of a family; None where it has no cascade, or one of unknown figures.

        Raises:
            InputError: The file is broken, or was made for other engines.
        """
        if not (folder / CASCADE).exists():
            return None
        cascade = Cascade.read(folder, family)
        if not cascade.found:
            return None
        figures = Json(cascade.found, f"{one_line(folder / CASCADE)}: found")
        return cls(
            degrees=cascade.degrees,
            batch=figures.key("batch").integer(minimum=1),
            ms=figures.key("ms_per_image").number(),
            gmacs=figures.key("gmacs").number(),
            accuracy=figures.key("accuracy").number(),
            error=figures.key("standard_error").number(),
            against=figures.key("against_degree").integer(),
            gain=figures.key("gain").number(),
            images=figures.key("images").integer(minimum=1),
            machine=figures.key("machine").text(),
        )

    def fits(self, batch: int) -> bool:
        """Whether its time is of this batch and of this machine."""
        return self.batch == batch and self.machine == this_machine()


def frontier_command(
    family: FamilyFolder,
    /,
    *,
    batch: Annotated[
        tuple[int, ...], option("Images per call.", read=read_batches, metavar="N,...", show_default="1,8")
    ] = (1, 8),
    out: Annotated[Path | None, option("Draw accuracy against latency there, .png or .svg.", metavar="FILE")] = None,
) -> None:
    """Show accuracy and latency of every degree on this machine, and which degrees are worth running.

    Latencies are the manifest's if it was written on this machine, else measured once and kept in the user's cache.
    A degree pays if it saves at least 2% of degree 0's time; it is on the frontier if it pays and no other one that
    pays is both as fast and as accurate. Writes nothing but the picture.

    Examples of use:

        tocom frontier engines/my
        tocom frontier engines/my --batch 1,8,32 --out frontier.png

    Exit status: 0 done, 2 bad input.

    See also: `tocom infer --budget-ms`, `tocom cascade`.
    """
    require_engine()
    if out is not None:
        require_extra("report", "drawing")
        from tocom.export.cli.frontier_plot import ensure_drawable

        ensure_drawable(out)
    manifest = Family.read(family)
    cascade = CascadeFigures.read(family, manifest)
    with stages(None) as notify:
        frontiers = {
            size: points(manifest, local_latencies(family, manifest, size, tell=lambda line: notify(None, line)))
            for size in batch
        }
    console = open_console()
    console.print(f"{escape(one_line(manifest.model))} on {escape(this_machine())}")
    for size, listed in frontiers.items():
        console.print(frontier_table(listed, size, cascade))
    if out is not None:
        from tocom.export.cli.frontier_plot import draw

        draw([_panel(manifest, listed, size, cascade) for size, listed in frontiers.items()], out)
        console.print(f"[green]wrote[/] {escape(one_line(out))}")


def frontier_table(listed: tuple[Point, ...], batch: int, cascade: CascadeFigures | None) -> Table:
    """Degrees at a batch size, and the cascade where its time is of that batch and this machine.

    Args:
        listed: Points of the family.
        batch: Images per call.
        cascade: The family's.
    """
    table = Table(title=f"batch {batch}", title_justify="left", caption_justify="left")
    for name in ("degree", "ms p50", "p99", "GMACs", "top-1"):
        table.add_column(name, justify="right")
    for name in ("pays", "on frontier"):
        table.add_column(name)
    for point in listed:
        style = None if point.on_frontier else "dim"
        table.add_row(
            str(point.degree), f"{point.p50_ms:.2f}", f"{point.p99_ms:.2f}", f"{point.gmacs:.4g}",
            "-" if point.top1 is None else f"{point.top1:.2%}", _yes(point.pays), _yes(point.on_frontier), style=style,
        )  # fmt: skip
    notes = []
    if any(point.top1 is None for point in listed):
        notes.append("No accuracies in family.json: a lower degree counts as more accurate. Compile with --images and "
                     "labelled images to measure them.")  # fmt: skip
    if cascade is not None and cascade.fits(batch):
        table.add_section()
        table.add_row(", ".join(map(str, cascade.degrees)), f"{cascade.ms * batch:.2f}", "-", f"{cascade.gmacs:.4g}",
                      f"{cascade.accuracy:.2%}", "-", "cascade")  # fmt: skip
        notes.append(f"Cascade: mean time; on {cascade.images} images, where it is {100 * cascade.gain:+.2f} points "
                     f"from degree {cascade.against}.")  # fmt: skip
    table.caption = "\n".join(notes) or None
    return table


def _yes(claim: bool) -> str:
    return "yes" if claim else "no"


def _panel(family: Family, listed: tuple[Point, ...], batch: int, cascade: CascadeFigures | None) -> Any:
    from tocom.export.cli.frontier_plot import Mark, Panel

    if any(point.top1 is None for point in listed):
        raise InputError("a picture needs the accuracy of every degree, but family.json lacks some: compile with "
                         "--images and labelled images, or leave out --out")  # fmt: skip
    images = {entry.degree: entry.accuracy.get("images") for entry in family.engines}
    marks = [
        Mark(point.p50_ms / batch, 100 * point.top1, _error(point.top1, images[point.degree]), f"r={point.degree}",
             point.on_frontier)
        for point in listed
    ]  # fmt: skip
    base = next((point for point in listed if cascade is not None and point.degree == cascade.against), None)
    if cascade is not None and base is not None and cascade.fits(batch):
        # It was measured on other images, so it is placed by what it gains on a degree that saw both.
        name = f"cascade {', '.join(map(str, cascade.degrees))}"
        marks.append(Mark(cascade.ms, 100 * (base.top1 + cascade.gain), 100 * cascade.error, name, cascade=True))
    return Panel(f"batch {batch}", "ms per image", tuple(marks))


def _error(share: float, images: float | None) -> float:
    return 100 * (share * (1 - share) / images) ** 0.5 if images else 0.0
