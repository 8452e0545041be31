"""TensorRT for RTX plans: how large, how long to build, the same bytes again, and what rounding does to their graphs.

Needs no GPU: plans are built, not run, and their graphs are carried out by ONNX Runtime with every rounding in them.
"""

from __future__ import annotations

import os
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from bench.compile_cost import write_inputs
from bench.markdown import table
from tocom.export.engine.tensorrt.plan import PlanOptions, build_plan
from tocom.export.family.compile import compile_family
from tocom.export.source.options import QUANTIZED, CompileOptions, QuantizeOptions
from tocom.runtime.manifest import EngineEntry

BACKEND = "tensorrt-rtx"
_MIB = 1 << 20


def rows_of(
    model: str, degrees: tuple[int, ...], precision: str, options: PlanOptions, folder: Path
) -> list[list[str]]:
    """Compiles a family and builds every plan once more; one row per degree.

    Args:
        model: timm name.
        degrees: Beside 0.
        precision: Of the graphs.
        options: Of the plans.
        folder: With `write_inputs`.

    Raises:
        SystemExit: If an engine fails validation, or a plan is not the same bytes again.
    """
    out = folder / precision
    result = compile_family(
        CompileOptions(
            model=model,
            out=out,
            degrees=degrees,
            checkpoint=folder / "checkpoint.safetensors",
            compensator=folder / "compensator.safetensors",
            source_degree=0,
            precision=precision,
            backend=BACKEND,
            plan=options,
            quantize=QuantizeOptions(folder / "images") if precision in QUANTIZED else QuantizeOptions(),
        )
    )
    if result.failed:
        raise SystemExit(f"{model} {precision}: degrees {sorted(result.failed)} failed validation")
    rows = []
    for entry in result.family.engines:
        again = build_plan(out / entry.onnx, BACKEND, options)
        if again.content != (out / entry.engine).read_bytes():
            raise SystemExit(f"{model} {precision}, degree {entry.degree}: another plan when it is built again")
        rows.append(_row(model, entry))
    return rows


def write_patterns(folder: Path, count: int = 16) -> None:
    """Smooth random images, for quantized formats to be calibrated on."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


def _row(model: str, entry: EngineEntry) -> list[str]:
    found, build = entry.validation, entry.build
    blocks = found["blocks"].values()
    shares = " ".join(f"{100 * block['equal'] / block['decisions']:.1f}" for block in blocks)
    errors = " ".join(f"{1e4 * block['output_error']:.0f}" for block in blocks if block["output_error"] is not None)
    return [
        model,
        entry.precision,
        str(entry.degree),
        f"{build['bytes'] / _MIB:.1f}",
        f"{build['seconds']:.1f}",
        str(sum(build["layers"].values())),
        f"{found['max_logit_error']:.1e} of {found['max_logit']:.1f}",
        f"{found['agreement']:.2%}" if found["decisions"] else "-",
        str(found["explained"]),
        f"{found['largest_margin']:.1e}",
        shares or "-",
        errors or "-",
    ]


def main(
    models: Annotated[str, typer.Option(help="timm names, parted by commas.")] = "deit_small_patch16_224",
    degrees: Annotated[str, typer.Option(help="Beside 0.")] = "8,16",
    precisions: Annotated[str, typer.Option(help="Formats of the graphs.")] = "fp32,fp16,bf16",
    targets: Annotated[str, typer.Option(help="GPU architectures.")] = "sm80,sm89,sm120",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("bench/results/plans.md"),
) -> None:
    """Builds plans at real sizes, random weights, with a compensator, and writes a table."""
    options = PlanOptions(batch=(1, 8, 32), targets=tuple(targets.split(",")))
    rows = []
    for model in models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(model, Path(folder))
            write_patterns(Path(folder) / "images")
            for precision in precisions.split(","):
                rows += rows_of(model, tuple(map(int, degrees.split(","))), precision, options, Path(folder))
                print(f"{model} {precision} done", flush=True)
    columns = ["model", "format", "degree", "plan MiB", "build s", "layers", "logit error", "agreement", "explained",
               "largest margin", "agreement by block, %", "token error by block, 1e-4"]  # fmt: skip
    text = [
        "# Plans of TensorRT for RTX, built without a GPU",
        "",
        f"Written by `python -m bench.plans --models {models} --degrees {degrees} --precisions {precisions}`, "
        f"{date.today()}: {os.cpu_count()} "
        f"cores ({platform.machine()}), no GPU, tensorrt-rtx {version('tensorrt-rtx-cu13')}, onnxruntime "
        f"{version('onnxruntime-gpu')}. Random weights, with a compensator; one plan for {targets}, batch 1 to 32; "
        "every plan was the same bytes when it was built again. No plan was run. Layers: of the network that the "
        "library parses, before it joins any. The other columns are about the graphs, carried out by ONNX Runtime in "
        "float32 with every rounding that stands in them, against the PyTorch reference with the same decisions, which "
        "is quantized as the format is: 12 images, noise and patterns. Explained: images and blocks that decide "
        "otherwise, where the choice is as good to within the margin. Token error: largest difference in the tokens "
        "behind a block's merge, as a share of the largest number in them.",
        "",
        table(columns, rows, {"model", "format"}),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
