"""The `tocom` command."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import tocom.runtime.errors
from tocom.export.cli.cascade import cascade_command
from tocom.export.cli.choose_scale import choose_scale_command
from tocom.export.cli.compile import quantize_command, run_compile
from tocom.export.cli.console import complain, open_console, stages
from tocom.export.cli.distill import distill_command
from tocom.export.cli.export_triton import export_triton_command
from tocom.export.cli.frontier import frontier_command
from tocom.export.cli.options import (
    BisectGraph,
    Calibration,
    Checkpoint,
    CompensatorFile,
    FloatBlocks,
    Images,
    Limit,
    MaxDrop,
    Model,
    ModelArgs,
    NumClasses,
    PieceFile,
    PlanBatch,
    PlanOption,
    PlanTarget,
    ReductionName,
    Schedule,
    Show,
    SourceDegree,
    read_blocks,
    read_degrees,
    read_model_args,
    read_plan_options,
)
from tocom.export.cli.serve import serve_command
from tocom.export.cli.serve_ray import serve_ray_command
from tocom.export.cli.validate import validate_command
from tocom.runtime.backends import BACKENDS, precisions_in_words
from tocom.runtime.errors import GateError, one_line

# Heavy imports (torch, timm) lie in the commands that need them: `tocom --help` and `tocom infer` answer at once.

app = typer.Typer(
    help="Compile a token-compressed Vision Transformer: one proven engine per degree r (tokens merged per block).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
InputErrors = tocom.runtime.errors.InputError


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
    degrees: Annotated[str, typer.Option(help="Degrees to compile, e.g. 8,16. 0 is always added, to compare with.")],
    checkpoint: Checkpoint = None,
    compensator: CompensatorFile = None,
    source_degree: SourceDegree = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the compensator's change, at every degree. Default: each degree's choice by `tocom "
            "choose-scale`, else the scale the compensator was trained with."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help=f"Number format, with the backends that run it: {precisions_in_words()}. `tocom quantize` says more "
            "about the quantized ones."
        ),
    ] = "fp32",
    backend: Annotated[
        str,
        typer.Option(
            help=f"Engine library: {', '.join(BACKENDS)} (TensorRT for RTX, whose plans are also built without a GPU); "
            "auto takes the fastest one that runs here.",
            envvar="TOCOM_BACKEND",
        ),
    ] = "auto",
    float_blocks: FloatBlocks = None,
    batch: PlanBatch = "1:8:32",
    target: PlanTarget = "",
    plan_option: PlanOption = None,
    calibration: Calibration = None,
    max_drop: MaxDrop = None,
    images: Images = None,
    limit: Limit = 5000,
    num_classes: NumClasses = None,
    model_arg: ModelArgs = None,
    schedule: Schedule = "constant",
    reduction: ReductionName = "merge",
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite another checkpoint's family in the folder.")
    ] = False,
) -> None:
    """Compile one engine per degree, prove each against the PyTorch reference, list them in family.json.

    Finished degrees are kept: run the same command again after an interruption, or with further degrees.

    Exit status: 0 done, 1 an engine failed validation, 2 bad input.
    """
    wanted = read_degrees(degrees)
    arguments = read_model_args(model_arg)
    from tocom.export.source.options import CompileOptions, QuantizeOptions

    options = CompileOptions(
        model=model, out=out, degrees=wanted, checkpoint=checkpoint, compensator=compensator,
        source_degree=source_degree, delta_scale=scale, precision=precision, backend=backend, images=images,
        limit=limit, num_classes=num_classes, model_args=arguments, schedule=schedule,
        reduction=reduction, replace=replace, plan=read_plan_options(batch, target, plan_option or ()),
        quantize=QuantizeOptions(calibration=calibration, max_drop=max_drop), float_blocks=read_blocks(float_blocks),
    )  # fmt: skip
    run_compile(options)


app.command("validate")(validate_command)
app.command("quantize")(quantize_command)
app.command("distill")(distill_command)
app.command("choose-scale")(choose_scale_command)
app.command("frontier")(frontier_command)
app.command("cascade")(cascade_command)
app.command("export-triton")(export_triton_command)
app.command("serve")(serve_command)
app.command("serve-ray")(serve_ray_command)


@app.command("refit")
def refit_command(
    engines: Annotated[Path, typer.Option(help="Folder of a family of plans built with --plan-option stripped.")],
) -> None:
    """Put the weights into plans that were built without them, on the GPU that runs them.

    Prove them afterwards with `tocom validate`: a refit is where weights can go wrong.
    """
    from tocom.export.family.refit import refit_family

    with stages(None) as notify:
        family = refit_family(engines, notify)
    open_console().print(f"[green]refitted[/] {len(family.engines)} engines; prove them by `tocom validate`")


@app.command("infer", add_help_option=False,
             context_settings={"allow_extra_args": True, "ignore_unknown_options": True})  # fmt: skip
def infer_command(context: typer.Context) -> None:
    """Classify images with an engine of a family (the same as python runtime/infer.py; see its --help)."""
    from tocom.runtime.infer import main as infer

    raise typer.Exit(infer(context.args))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Folder of a family, a compensator file, or a graph (.onnx).")],
    show: Show = "",
    bisect: BisectGraph = None,
    out: PieceFile = None,
) -> None:
    """Show what a family (after checking every hash), a compensator file or a graph holds.

    Of a graph, --bisect finds the smallest piece that an engine library fails on.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        from tocom.export.cli.inspect_graph import inspect_graph

        inspect_graph(path, show, bisect, out)
        return
    if show or bisect is not None or out is not None:
        raise tocom.runtime.errors.InputError(f"--show, --bisect and --out are for a graph, a file .onnx, got {path}")
    from tocom.export.cli.family_table import family_table
    from tocom.runtime.manifest import Family

    console = open_console()
    if path.is_file():
        from tocom.compensator import Compensator

        table = Table("compensator", escape(str(path)))
        for name, value in asdict(Compensator.load(path).info).items():
            table.add_row(name.replace("_", " "), "not recorded" if value is None else escape(one_line(value)))
        console.print(table)
        return
    family = Family.read(path)
    for entry in family.engines:
        family.check_files(path, entry)
    console.print(family_table(family, path))
    console.print(f"input {'x'.join(map(str, family.input.size))}, {family.classes} classes, checkpoint "
                  f"{(family.checkpoint_sha256 or 'unknown')[:12]}, all files as listed")  # fmt: skip


@app.command("doctor")
def doctor_command() -> None:
    """Say which engines can run on this machine, and why the others cannot."""
    from tocom.export.cli.doctor import diagnose

    table = Table("part", "usable", "detail")
    for finding in diagnose():
        table.add_row(finding.name, "[green]yes[/]" if finding.usable else "[yellow]no[/]", escape(finding.detail))
    open_console().print(table)


def main() -> None:
    """Runs the command and leaves with its status: bad input is one line on stderr and status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        raise SystemExit(status if isinstance(status, int) else 0)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except typer.TyperException as error:
        complain(error.format_message())
    except InputErrors as error:
        complain(error)
    except GateError as error:
        complain(error)
        raise SystemExit(1) from None
    except OSError as error:
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; run the same command again to go on")
        raise SystemExit(_INTERRUPTED) from None
    raise SystemExit(2)


if __name__ == "__main__":
    main()
