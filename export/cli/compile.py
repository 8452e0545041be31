"""What `tocom compile` and `tocom quantize` end with, and the latter's options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tocom.export.cli.console import complain, open_console, stages
from tocom.export.cli.options import (
    Calibration,
    Checkpoint,
    CompensatorFile,
    Images,
    Limit,
    MaxDrop,
    Model,
    ModelArgs,
    NumClasses,
    PlanBatch,
    PlanOption,
    PlanTarget,
    ReductionName,
    Schedule,
    SourceDegree,
    read_degrees,
    read_model_args,
    read_plan_options,
)
from tocom.runtime.backends import AUTO, BACKENDS
from tocom.runtime.family_files import MANIFEST

if TYPE_CHECKING:
    from tocom.export.proof.findings import Findings
    from tocom.export.source.options import CompileOptions


def quantize_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the family.")],
    degrees: Annotated[str, typer.Option(help="Degrees to compile, e.g. 8,16. 0 is always added, to compare with.")],
    checkpoint: Checkpoint = None,
    compensator: CompensatorFile = None,
    source_degree: SourceDegree = None,
    scale: Annotated[float | None, typer.Option(help="Weight of the compensator's change, as for compile.")] = None,
    calibration: Calibration = None,
    precision: Annotated[
        str,
        typer.Option(
            "--format",
            help="int8 (weights and inputs of products), fp8 (likewise, tensorrt), int8-weights (tensorrt).",
        ),
    ] = "int8",
    backend: Annotated[
        str,
        typer.Option(help=f"{', '.join(BACKENDS)}, or {AUTO}.", envvar="TOCOM_BACKEND"),
    ] = "auto",
    max_drop: MaxDrop = None,
    calibration_images: Annotated[int, typer.Option(help="Images of the folder to calibrate on.")] = 128,
    choose: Annotated[
        str, typer.Option(help="Which of them: spread (evenly) or diverse (by density and diversity, EDA-DM).")
    ] = "spread",
    ranges: Annotated[
        str, typer.Option("--range", help="What an input's grid covers: minmax, percentile, mse or entropy.")
    ] = "minmax",
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Move range from inputs into weights, alpha searched (SmoothQuant).")
    ] = False,
    widen: Annotated[
        bool, typer.Option("--widen", help="Widen unsaturated channels of weights (DilateQuant).")
    ] = False,
    reparameterize: Annotated[
        bool, typer.Option("--reparameterize", help="Give norms one range for all channels (RepQuant).")
    ] = False,
    rounding: Annotated[str, typer.Option(help="Of weights: nearest, gptq or quantease.")] = "nearest",
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Learn the rounding of weights block by block (MGRQ); slow.")
    ] = False,
    per_degree: Annotated[
        bool, typer.Option("--per-degree", help="Calibrate every degree by itself instead of all at once.")
    ] = False,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PRODUCT", help="Leave a product in float; repeatable.")
    ] = None,
    batch: PlanBatch = "1:8:32",
    target: PlanTarget = "",
    plan_option: PlanOption = None,
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
    """Compile a family whose products are quantized: explicit Q/DQ graphs and their engines, every degree gated.

    Quantized are the products of the blocks, per output channel and per input tensor, symmetric. Layer norm, softmax,
    matching, token sizes and the residual stream stay float. Every engine is proven against the same quantized network
    in PyTorch, and what it loses against float32 is measured; see --max-drop.

    Exit status: 0 done, 1 a degree loses more than it may or failed validation, 2 bad input.
    """
    wanted = read_degrees(degrees)
    arguments = read_model_args(model_arg)
    from tocom.calib.quantize.calibrate import Method
    from tocom.export.source.options import QUANTIZED, CompileOptions, QuantizeOptions
    from tocom.runtime.errors import InputError

    if precision not in QUANTIZED:
        raise InputError(f"format must be one of {', '.join(QUANTIZED)}, got {precision!r}.")
    method = Method(
        format=precision, images=calibration_images, choice=choose, range=ranges, smooth=smooth, widen=widen,
        reparameterize=reparameterize, rounding=rounding, reconstruct=reconstruct, shared=not per_degree,
    )  # fmt: skip
    run_compile(CompileOptions(
        model=model, out=out, degrees=wanted, checkpoint=checkpoint, compensator=compensator,
        source_degree=source_degree, delta_scale=scale, precision=precision, backend=backend, images=images,
        limit=limit, num_classes=num_classes, model_args=arguments, schedule=schedule,
        reduction=reduction, replace=replace, plan=read_plan_options(batch, target, plan_option or ()),
        quantize=QuantizeOptions(calibration, method, max_drop, tuple(keep_float or ())),
    ))  # fmt: skip


def run_compile(options: CompileOptions) -> None:
    """Compiles a family, shows its table, and says which degrees failed.

    Raises:
        typer.Exit: With status 1, if one failed.
    """
    from tocom.export.cli.family_table import family_table
    from tocom.export.family.compile import compile_family

    degrees = {0, *options.degrees}
    with stages(len(degrees)) as notify:
        result = compile_family(options, notify)
    console = open_console()
    console.print(family_table(result.family, options.out, degrees))
    for degree, report in result.failed.items():
        complain(f"degree {degree} {_verdict(report.findings)}; its new engine is not listed")
    if result.failed:
        if options.precision in ("fp16", "bf16"):
            complain("where it goes wrong, and which blocks in float32 bring it back, is said of an fp32 family by "
                     f"tocom validate --candidate {options.backend}:{options.precision} --bisect DIR")  # fmt: skip
        raise typer.Exit(1)
    out = options.out
    wrote = f"{out / MANIFEST}   try: python runtime/infer.py --engines {out} IMAGE..."
    console.print(f"[green]wrote[/] {escape(wrote)}")


def _verdict(findings: Findings) -> str:
    quantization = findings.quantization
    if quantization is not None:
        what = "points of top-1" if quantization.drop_of == "top1" else "percent of answers"
        return (
            f"loses {quantization.drop:.2f} {what} on {quantization.drop_images} images even with "
            f"{len(quantization.float_products)} products in float, may lose {quantization.max_drop:g}"
        )
    return f"failed validation: {findings.faults[0]}"
