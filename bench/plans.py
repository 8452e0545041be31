"""TensorRT for RTX plans: how large, how long to build, the same bytes again, and what rounding does to their graphs.

Needs no GPU: plans are built, not run, and their graphs are carried out by ONNX Runtime with every rounding in them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from bench.harness import run
from bench.harness.state import State

BACKEND = "tensorrt-rtx"
_LIBRARIES = ("tensorrt-rtx-cu13", "onnxruntime-gpu", "torch", "timm")
_MIB = 1 << 20


def plans(
    models: Annotated[str, typer.Option(help="timm names, parted by commas.")] = "deit_small_patch16_224",
    degrees: Annotated[str, typer.Option(help="Beside 0.")] = "8,16",
    precisions: Annotated[str, typer.Option(help="Formats of the graphs.")] = "fp32,fp16,bf16",
    targets: Annotated[str, typer.Option(help="GPU architectures.")] = "sm80,sm89,sm120",
    out: run.Out = None,
    work: run.Work = None,
    fresh: run.Fresh = False,
    quick: run.Quick = False,
    report_only: run.ReportOnly = False,
) -> None:
    """Build plans at real sizes, random weights, with a compensator: every one twice, which must be the same bytes.

    The same command goes on where it stopped.
    """
    from bench.harness.page import read_results, render, setup, write_results

    place = run.Places.of("plans", out, work, quick=quick)
    if quick:
        models, degrees, precisions, targets = "deit_tiny_patch16_224", "16", "fp16", "sm89"
    if not report_only:
        state = State.load(place.state, {"degrees": degrees, "targets": targets}, fresh=fresh)
        cases = {
            f"{model} {precision}": partial(
                rows_of, model, run.numbers("degrees", degrees, 1), precision, tuple(targets.split(","))
            )
            for model in models.split(",")
            for precision in precisions.split(",")
        }
        rows = [row for found in run.run_cases(state, cases).values() for row in found]
        head = setup(run.command_line("bench.plans"), _LIBRARIES, targets=targets.split(","))
        write_results(place.results, {"setup": head, "rows": rows})
    results = read_results(place.results)
    render("plans.md.j2", place.page, **results, table=[_told(each) for each in results["rows"]])
    print(f"wrote {place.page}")


def rows_of(model: str, degrees: tuple[int, ...], precision: str, targets: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compiles a family and builds every plan once more; a record for each degree."""
    from tocom.export.engine.tensorrt.plan import PlanOptions, build_plan
    from tocom.export.family.compile import compile_family
    from tocom.export.source.options import QUANTIZED, CompileOptions, QuantizeOptions
    from tocom.runtime.errors import GateError

    options = PlanOptions(batch=(1, 8, 32), targets=targets)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_inputs(model, folder)
        out = folder / precision
        result = compile_family(
            CompileOptions(
                model=model, out=out, degrees=degrees, checkpoint=folder / "checkpoint.safetensors",
                compensator=folder / "compensator.safetensors", source_degree=0, precision=precision, backend=BACKEND,
                plan=options,
                quantize=QuantizeOptions(folder / "images") if precision in QUANTIZED else QuantizeOptions(),
            )
        )  # fmt: skip
        if result.failed:
            raise GateError(f"{model} {precision}: degrees {sorted(result.failed)} failed validation")
        for entry in result.family.engines:
            again = build_plan(out / entry.onnx, BACKEND, options)
            if again.content != (out / entry.engine).read_bytes():
                raise GateError(f"{model} {precision}, degree {entry.degree}: another plan when it is built again")
        return [_record(model, entry) for entry in result.family.engines]


def _write_inputs(model: str, folder: Path) -> None:
    """A checkpoint and a compensator of the right sizes, and images to calibrate on, all drawn at random."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from tocom.compensator import Compensator, CompensatorInfo

    torch.manual_seed(0)
    network = timm.create_model(model)
    save_file(network.state_dict(), folder / "checkpoint.safetensors")
    compensator = Compensator(CompensatorInfo(width=network.embed_dim, depth=len(network.blocks), backbone=model))
    for weight in compensator.parameters():
        weight.data.normal_(0, 0.02)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for index in range(16):  # smooth ones
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / "images" / f"{index}.png")


def _record(model: str, entry: Any) -> dict[str, Any]:
    found, build = entry.validation, entry.build
    blocks = found["blocks"].values()
    errors = [block["output_error"] for block in blocks if block["output_error"] is not None]
    return {
        "model": model, "format": entry.precision, "degree": entry.degree, "mib": build["bytes"] / _MIB,
        "seconds": build["seconds"], "layers": sum(build["layers"].values()), "logit_error": found["max_logit_error"],
        "logit": found["max_logit"], "agreement": found["agreement"] if found["decisions"] else None,
        "explained": found["explained"], "margin": found["largest_margin"], "errors": errors,
        "shares": [block["equal"] / block["decisions"] for block in blocks],
    }  # fmt: skip


def _told(each: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": each["model"], "format": each["format"], "degree": each["degree"], "plan MiB": f"{each['mib']:.1f}",
        "build s": f"{each['seconds']:.1f}", "layers": each["layers"],
        "logit error": f"{each['logit_error']:.1e} of {each['logit']:.1f}",
        "agreement": "-" if each["agreement"] is None else f"{each['agreement']:.2%}", "explained": each["explained"],
        "largest margin": f"{each['margin']:.1e}",
        "agreement by block, %": " ".join(f"{100 * share:.1f}" for share in each["shares"]) or "-",
        "token error by block, 1e-4": " ".join(f"{1e4 * error:.0f}" for error in each["errors"]) or "-",
    }  # fmt: skip


if __name__ == "__main__":
    run.main("bench.plans", plans)
