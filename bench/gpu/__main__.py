"""python -m bench.gpu: see --help."""

from __future__ import annotations

import os
from typing import Annotated

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # before CUDA loads: products of float32 in full, as the reference

import typer

from bench.harness import run
from tocom.runtime.errors import InputError

# torch and all that needs it load once it is known that they are there: a bare machine gets a line, not a traceback
_PRECISIONS = ("fp32", "fp16", "bf16")


def gpu_check(
    models: Annotated[str, typer.Option(help="timm names.")] = "deit_small_patch16_224,deit_base_patch16_224",
    batches: Annotated[str, typer.Option(help="Images per call.")] = "1,8,64,256",
    degrees: Annotated[str, typer.Option(help="Tokens merged per block. 0 always takes part.")] = "0,4,8,12,16",
    precision: Annotated[
        str, typer.Option(help=f"What everybody computes in: {', '.join(_PRECISIONS)} (float32 without TF32).")
    ] = "fp16",
    only: Annotated[
        list[str] | None,
        typer.Option(help="Time only contenders with this in their names, like 'Triton'; may be given several times."),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out contenders and comparisons with this in their names; likewise.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Measure each group for this long, and at least 15 rounds.")] = 30.0,
    minutes: Annotated[
        float | None,
        typer.Option(help="Begin nothing new after this long, nor a group that might take longer than is left."),
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Time engines although a comparison failed.")] = False,
    common: run.Common = run.COMMON,
) -> None:
    """Check this machine's GPU: is everything right there, and how fast is it?

    First the PyTorch reference, the Triton merge step and every engine library that is there (ONNX Runtime with CUDA,
    TensorRT, TensorRT for RTX) are compared with the reference on the CPU: merge decisions and logits, at r = 0 and at
    the largest degree. If one of them fails, nothing is timed and the status is 1.

    Then everybody is timed, one group per model and batch size, all degrees in it: our engines, each with its slice
    bound, beside torch eager and torch.compile with CUDA graphs. What cannot run on this machine is listed with the
    reason.

    The page, bench/results/gpu-NAME.md by default, is written after every step; the same command goes on where it
    stopped, and with other options adds to it. --quick is one small group: DeiT-S, batch 64, r = 0 and 16.
    """
    if common.quick:
        models, batches, degrees, seconds = "deit_small_patch16_224", "64", "0,16", 5.0
    if precision not in _PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}.")
    chosen_batches, chosen_degrees = run.numbers("batches", batches, 1), run.numbers("degrees", degrees)
    if common.report_only:
        if common.out is None:
            raise InputError("--report-only needs --out: the page whose numbers lie beside it.")
        from bench.gpu.page import write_page
        from bench.harness.page import report

        report(common.places("gpu"), write_page)
        return
    _require_cuda()
    from bench.gpu.check import Options, check_gpu

    check_gpu(Options(
        models=tuple(filter(None, models.split(","))), batches=chosen_batches,
        degrees=tuple(sorted({0, *chosen_degrees})), precision=precision, only=tuple(only or ()),
        without=tuple(without or ()), seconds=seconds, minutes=minutes, anyway=anyway,
        command=run.command_line(),
    ), lambda name: common.places(f"gpu-{name}"), fresh=common.fresh)  # fmt: skip


def _require_cuda() -> None:
    """Makes sure that there is something to check."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"the GPU check needs PyTorch with CUDA: {error}.") from error
    if not torch.cuda.is_available():
        raise InputError(f"the GPU check needs a CUDA device, and torch {torch.__version__} finds none: run it where "
                         "there is an NVIDIA GPU with its driver.")  # fmt: skip


if __name__ == "__main__":
    run.main("gpu-check", gpu_check)
