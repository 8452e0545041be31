"""`tocom inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tocom.export.cli.console import open_console
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import choice, existing, option
from tocom.runtime.backends import BACKENDS
from tocom.runtime.errors import InputError, one_line


def inspect_command(
    path: Annotated[Path, existing("Folder of a family, a compensator file, or a graph (.onnx).", metavar="PATH")],
    /,
    *,
    show: Annotated[
        str,
        option(
            "Of a graph, also show any of layers,attrs,weights, separated by commas.",
            metavar="WHAT,...",
            show_default=False,
        ),
    ] = "",
    fails_on: Annotated[
        Literal[*BACKENDS] | None,
        choice(
            "Find the smallest piece of a graph that a backend refuses, cannot build, or computes wrongly. For a bare "
            "graph, because one that is refused gets into no family; for a family, see `tocom validate --bisect`."
        ),
    ] = None,
    out: Annotated[Path | None, option("Where --fails-on writes the piece.", metavar="FILE")] = None,
) -> None:
    """Show what a family, a compensator file or a graph holds.

    Of a family every hash is checked first. What is said of a graph, --show and --fails-on need Polygraphy. Writes
    nothing but the piece that --fails-on finds.

    Examples of use:

        tocom inspect engines/my
        tocom inspect compensator.safetensors
        tocom inspect engines/my/r08-0123456789ab.onnx --show layers,attrs
        tocom inspect model.onnx --fails-on openvino --out piece.onnx

    Exit status: 0 done, 2 bad input, a file that was altered among it.

    See also: `tocom doctor`, `tocom validate`, `tocom frontier`.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        require_extra("compile", "looking into a graph")
        require_extra("polygraphy", "looking into a graph")
        from tocom.export.cli.inspect_graph import inspect_graph

        inspect_graph(path, show, fails_on, out)
    elif show or fails_on is not None or out is not None:
        raise InputError(f"--show, --fails-on and --out are for a graph, a file .onnx, got {one_line(path)}")
    elif path.is_file():
        _show_compensator(path)
    else:
        _show_family(path)


def _show_compensator(path: Path) -> None:
    require_extra("compile", "reading a compensator")
    from rich.markup import escape
    from rich.table import Table

    from tocom.compensator import Compensator

    table = Table("compensator", escape(str(path)))
    for name, value in asdict(Compensator.load(path).info).items():
        table.add_row(name.replace("_", " "), "not recorded" if value is None else escape(one_line(value)))
    open_console().print(table)


def _show_family(folder: Path) -> None:
    from tocom.export.cli.family_table import family_table
    from tocom.runtime.manifest import Family

    family, console = Family.read(folder), open_console()
    for entry in family.engines:
        family.check_files(folder, entry)
    console.print(family_table(family, folder))
    console.print(f"input {'x'.join(map(str, family.input.size))}, {family.classes} classes, checkpoint "
                  f"{(family.checkpoint_sha256 or 'unknown')[:12]}, all files as listed")  # fmt: skip
