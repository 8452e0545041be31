"""What `tocom validate` and `tocom inspect` do with Polygraphy; importing this says at once if it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tocom.export.artifacts import Report
from tocom.export.cli.console import open_console, stages
from tocom.export.proof.bisect.failing_piece import Piece, smallest_failing_piece
from tocom.export.proof.polygraphy_tools import Comparison, compare, comparison_table, describe
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.files import write_atomically


def inspect_graph(path: Path, show: str, backend: str | None, out: Path | None) -> None:
    """Says what is in a graph, or cuts out of it what a backend fails on.

    Args:
        path: The ONNX file.
        show: What to show of it, separated by commas.
        backend: Who fails on it; None to look into it.
        out: Where the piece that fails is written.
    """
    if backend is None:
        if out is not None:
            raise InputError("--out is for the piece that --fails-on finds: name a backend with --fails-on.")
        print(describe(path, [name.strip() for name in show.split(",")] if show else ()))
        return
    if out is None or show:
        raise InputError("--fails-on takes --out, the file for the piece that it finds, and no --show.")
    if not out.parent.is_dir() or out.is_dir() or out.resolve() == path.resolve():
        raise InputError(f"--out must be a file in a folder that is there, and not the graph, got {one_line(out)}")
    with stages(None) as notify:
        piece = smallest_failing_piece(path, backend, notify=lambda text: notify(None, text))
    if piece is None:
        raise InputError(f"{one_line(path)} must be a graph that {backend} fails on, but it does not: there is nothing "
                         "to bisect.")  # fmt: skip
    _write(piece, out)


def examine(reports: Mapping[int, Report], *, comparing: bool, folder: Path | None) -> None:
    """Looks further into what validation found.

    Args:
        reports: Degree -> report.
        comparing: Whether to compare every degree across engine libraries.
        folder: Where to write the piece of each degree's graph that fails; None to look for none.
    """
    if comparing:
        comparisons: dict[int, Comparison] = {}
        with stages(len(reports)) as notify:
            for degree, report in reports.items():
                comparisons[degree] = compare(report.engine, lambda text, degree=degree: notify(degree, text))
                notify(degree, "done")
        open_console().print(comparison_table(comparisons))
    failed = [degree for degree, report in reports.items() if not report]
    for degree in failed if folder is not None else ():
        _bisect(degree, reports[degree], folder)


def _bisect(degree: int, report: Report, folder: Path) -> None:
    from tocom.export.engine.tensorrt.plan_options import PlanOptions

    engine = report.engine
    with stages(None) as notify:
        piece = smallest_failing_piece(
            engine.graph.file,
            engine.backend,
            precision=engine.precision,
            plan=PlanOptions.from_json(engine.build["options"]) if engine.build else None,
            notify=lambda text: notify(degree, text),
        )
    if piece is None:
        print(f"r={degree}: {engine.backend} does not fail on the graph as it stands, so the fault lies in the graph "
              "itself or in a decision between near ties: see --per-block")  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write(piece, folder / f"r{degree:02d}.onnx", f"r={degree}: ")


def _write(piece: Piece, file: Path, where: str = "") -> None:
    write_atomically(file, piece.content)
    print(f"{where}{piece}\n{one_line(piece.reason)}")
    open_console().print("[green]wrote[/]", str(file), markup=True)
