"""Times `tocom compile` itself, degree by degree, with its peak memory; randomly initialized weights, real sizes.

python bench/compile_cost.py --model deit_base_patch16_224 --degrees 0,8,16
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from safetensors.torch import save_file

from tocom.compensator import Compensator, CompensatorInfo


def write_inputs(model: str, folder: Path) -> None:
    """A checkpoint and a compensator of the right sizes, filled at random."""
    torch.manual_seed(0)
    network = timm.create_model(model)
    save_file(network.state_dict(), folder / "checkpoint.safetensors")
    compensator = Compensator(CompensatorInfo(width=network.embed_dim, depth=len(network.blocks), backbone=model))
    for weight in compensator.parameters():
        weight.data.normal_(0, 0.02)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())


def timed_compile(model: str, degrees: str, folder: Path) -> tuple[dict[str, float], float, float]:
    """Compiles in a process of its own.

    Returns:
        Seconds of every degree, seconds in all, and the process's peak memory in GiB.

    Raises:
        SystemExit: If the compile fails.
    """
    command = [
        *(sys.executable, "-m", "export.cli", "compile", "--model", model, "--degrees", degrees),
        *("--checkpoint", folder / "checkpoint.safetensors", "--compensator", folder / "compensator.safetensors"),
        *("--source-degree", "0", "--out", folder / "out"),
    ]
    began = time.monotonic()
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        for line in run.stderr:
            name, _, stage = line.strip().partition(": ")
            if stage:
                started.setdefault(name, time.monotonic())
            if stage == "done":
                seconds[name] = time.monotonic() - started[name]
    if run.returncode:
        raise SystemExit(f"the compile failed with status {run.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20)
    return seconds, time.monotonic() - began, peak


def main(
    model: Annotated[str, typer.Option(help="timm model name.")] = "deit_base_patch16_224",
    degrees: Annotated[str, typer.Option(help="Degrees to compile.")] = "0,8,16",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("bench/results/compile.md"),
) -> None:
    """Compiles once from scratch and writes a table."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(model, Path(folder))
        seconds, total, peak = timed_compile(model, degrees, Path(folder))
    lines = [
        f"# Cost of compiling {model}",
        "",
        f"`python bench/compile_cost.py --model {model} --degrees {degrees}`, {date.today()}, {os.cpu_count()} cores "
        f"({platform.machine()}), torch {version('torch')}, onnxruntime {version('onnxruntime-gpu')}. With a "
        "compensator, fuse, lower, build and validate of each degree, one run.",
        "",
        "| degree | seconds |",
        "|---|---|",
        *(f"| {name.removeprefix('r=')} | {value:.1f} |" for name, value in seconds.items()),
        f"| in all, with start and latency measurement | {total:.1f} |",
        "",
        f"Peak memory of the whole process: {peak:.2f} GiB.",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
