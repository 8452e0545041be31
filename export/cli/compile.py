"""`tocom compile` and `tocom quantize`: one list of options, one way to a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tocom.export.cli.console import complain, open_console, stages
from tocom.export.cli.exits import Exit
from tocom.export.cli.extras import require_extra
from tocom.export.cli.options import CompileArgs, QuantizeArgs
from tocom.runtime.family_files import MANIFEST

if TYPE_CHECKING:
    from tocom.export.source.options import CompileOptions


def compile_command(*, args: CompileArgs) -> None:
    """Compile a family: one engine per degree, each validated against PyTorch.

    Writes the engines, family.json, which lists them, and compile.toml, which repeats the compile, into the folder
    --out. Finished degrees are kept: run the same command again after an interruption, or with further degrees.

    Examples of use:

        tocom compile --model deit_small_patch16_224 --checkpoint my.safetensors --degrees 8,16 --out engines/my
        tocom compile --model my-folder --compensator c.safetensors --source-degree 0 --degrees 8,16 --out engines/my
        tocom compile --config engines/my/compile.toml --precision bf16 --backend openvino --out engines/my-bf16

    Exit status: 0 done, 1 an engine failed validation, 2 bad input.

    See also: `tocom quantize` for int8, `tocom choose-scale`, `tocom validate`, `tocom infer`.
    """
    run_compile(args)


def quantize_command(*, args: QuantizeArgs) -> None:
    """Compile a family whose products are quantized: `tocom compile --precision int8`.

    Quantized are the products of the blocks, per output channel and per input tensor, symmetric. Layer norm, softmax,
    matching, token sizes and the residual stream stay float. Every engine is validated against the same quantized
    network in PyTorch, and what it loses against float32 is measured: see --max-drop. Writes what `tocom compile`
    writes, and the calibration.

    Examples of use:

        tocom quantize --model my-folder --degrees 8,16 --calibration train-images --images val-images --out engines/i8
        tocom quantize --config engines/my/compile.toml --out engines/my-int8 --max-drop 0.5
        tocom quantize --model my-folder --degrees 8 --rounding gptq --smooth --keep-float blocks.0.mlp.fc2 --out e

    Exit status: 0 done, 1 a degree loses more than it may or failed validation, 2 bad input.

    See also: `tocom compile`, `tocom validate`.
    """
    run_compile(args)


def run_compile(args: CompileArgs) -> None:
    """Compiles a family, shows its table, and says which degrees failed.

    Raises:
        Exit: With status 1, if one failed.
    """
    options = args.options()
    require_extra("compile", "compiling")
    from rich.markup import escape

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
        _say_where_to_look(options)
        raise Exit(1)
    wrote = f"{options.out / MANIFEST}   try: tocom infer {options.out} IMAGE..."
    console.print(f"[green]wrote[/] {escape(wrote)}")


def _say_where_to_look(options: CompileOptions) -> None:
    if options.precision in ("fp16", "bf16"):
        complain("where it goes wrong, and which blocks in float32 bring it back, is said of an fp32 family by "
                 f"tocom validate FAMILY --candidate {options.backend}:{options.precision} --bisect DIR")  # fmt: skip


def _verdict(findings: dict[str, object]) -> str:
    quantization = findings.get("quantization")
    if quantization is not None:
        what = "points of top-1" if quantization.drop_of == "top1" else "percent of answers"
        return (
            f"loses {quantization.drop:.2f} {what} on {quantization.drop_images} images even with "
            f"{len(quantization.float_products)} products in float, may lose {quantization.max_drop:g}"
        )
    return f"failed validation: {findings['faults'][0]}"
