"""python -m bench.gpu: see --help."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

# before any library of CUDA loads: products of float32 in full, as the reference has them
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import typer

from tocom.runtime.errors import GateError, InputError

# torch and all that needs it load once it is known that they are there: a bare machine gets a line, not a traceback

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_QUICK = {"models": "deit_small_patch16_224", "batches": "64", "degrees": "0,16", "seconds": 5.0}
_PRECISIONS = ("fp32", "fp16", "bf16")
_INTERRUPTED = 130


@app.command()
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
        list[str] | None,
        typer.Option(help="Leave out contenders and comparisons with this in their names; likewise."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Measure each group for this long, and at least 15 rounds.")] = 30.0,
    minutes: Annotated[
        float | None,
        typer.Option(help="Begin nothing new after this long, nor a group that might take longer than is left."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; by default bench/results/gpu-NAME.md, NAME being the GPU's.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Graphs and plans.")] = Path("build/bench/gpu"),
    anyway: Annotated[bool, typer.Option("--anyway", help="Time engines although a comparison failed.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="One small group: DeiT-S, batch 64, r = 0 and 16, 5 seconds.")
    ] = False,
) -> None:
    """Check this machine's GPU: is everything right there, and how fast is it?

    First the PyTorch reference, the Triton merge step and every engine library that is there (ONNX Runtime with CUDA,
    TensorRT, TensorRT for RTX) are compared with the reference on the CPU: merge decisions and logits, at r = 0 and at
    the largest degree. If one of them fails, nothing is timed and the status is 1.

    Then everybody is timed, one group per model and batch size, all degrees in it: our engines, each with its slice
    bound, beside torch eager and torch.compile with CUDA graphs. What cannot run on this machine is listed with the
    reason.

    The page is written after every step. Beside it lies a JSON file with what is finished: the same command goes on
    where it stopped, and with other options adds to it.

    Raises:
        InputError: The precision is not one there is.
    """
    given = {"models": models, "batches": batches, "degrees": degrees, "seconds": seconds} | (_QUICK if quick else {})
    if precision not in _PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}.")
    chosen_batches, chosen_degrees = (
        _numbers(name, given[name], low) for name, low in (("batches", 1), ("degrees", 0))
    )
    _require_cuda()
    from bench.gpu.run import Options, ordered, run

    run(Options(
        models=tuple(filter(None, given["models"].split(","))), batches=chosen_batches, degrees=ordered(chosen_degrees),
        precision=precision, only=tuple(only or ()), without=tuple(without or ()), seconds=given["seconds"],
        minutes=minutes, out=out, work=work, anyway=anyway,
        command=shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
    ))  # fmt: skip


def _numbers(name: str, text: str, low: int) -> tuple[int, ...]:
    """Whole numbers parted by commas.

    Raises:
        InputError: One is not, or is too small.
    """
    try:
        found = tuple(map(int, text.split(",")))
    except ValueError:
        found = (low - 1,)
    if min(found) < low:
        raise InputError(f"--{name} must be numbers of {low} or more parted by commas, got {text!r}.")
    return found


def _require_cuda() -> None:
    """Makes sure that there is something to check.

    Raises:
        InputError: There is no PyTorch, or no GPU that it can use.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(f"the GPU check needs PyTorch with CUDA: {error}.") from error
    if not torch.cuda.is_available():
        raise InputError(f"the GPU check needs a CUDA device, and torch {torch.__version__} finds none: "
                                        "run it where there is an NVIDIA GPU with its driver.")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; what goes wrong is one line on stderr.

    Args:
        arguments: In place of those of the process.

    Raises:
        SystemExit: Always; 0 done, 1 a comparison failed, 2 something given cannot be used.
    """
    try:
        status = app(arguments, standalone_mode=False)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except typer.TyperException as error:
        status = _complain(error.format_message(), 2)
    except InputError as error:
        status = _complain(error, 2)
    except GateError as error:
        status = _complain(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        status = _complain("interrupted; the same command goes on", _INTERRUPTED)
    raise SystemExit(status if isinstance(status, int) else 0)


def _complain(message: object, status: int) -> int:
    print(f"gpu-check: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
