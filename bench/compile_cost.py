"""What `tocom compile` itself costs: time, memory and disk; randomly initialized weights, real sizes.

python bench/compile_cost.py --model deit_base_patch16_224 --degrees '8,16;4'
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from safetensors.torch import save_file

from tocom.compensator import Compensator, CompensatorInfo
from tocom.runtime.manifest import Family


def write_inputs(model: str, folder: Path) -> None:
    """A checkpoint and a compensator of the right sizes, filled at random."""
    torch.manual_seed(0)
    network = timm.create_model(model)
    save_file(network.state_dict(), folder / "checkpoint.safetensors")
    compensator = Compensator(CompensatorInfo(width=network.embed_dim, depth=len(network.blocks), backbone=model))
    for weight in compensator.parameters():
        weight.data.normal_(0, 0.02)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())


_DEGREES = "8;8,16;1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16"


@dataclass(frozen=True)
class Cost:
    """Of one compile from scratch in a process of its own.

    Attributes:
        degrees: How many, degree 0 among them.
        backend: The one that was chosen.
        seconds: From start to end of the process.
        measuring: Of these, spent on measuring latencies.
        peak_gib: Peak memory of the process.
        all_bytes: Files of the family, together.
        one_bytes: Files that a single degree reads, of the one that reads most.
    """

    degrees: int
    backend: str
    seconds: float
    measuring: float
    peak_gib: float
    all_bytes: int
    one_bytes: int


def timed_compile(model: str, degrees: str, folder: Path) -> Cost:
    """Compiles, every engine proven and its latency measured.

    Raises:
        SystemExit: If the compile fails.
    """
    out = folder / f"out-{degrees}"
    command = [
        *(sys.executable, "-m", "tocom", "compile", "--model", model, "--degrees", degrees),
        *("--checkpoint", folder / "checkpoint.safetensors", "--compensator", folder / "compensator.safetensors"),
        *("--source-degree", "0", "--out", out),
    ]
    began = measuring = time.monotonic()
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        for line in run.stderr:
            if line.startswith("measuring latency"):
                measuring = time.monotonic()
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    ended = time.monotonic()
    if run.returncode:
        raise SystemExit(f"the compile failed with status {run.returncode}")
    engines = Family.read(out).engines
    sizes = {file: (out / file).stat().st_size for entry in engines for file in entry.sha256}
    return Cost(
        degrees=len(engines),
        backend=engines[0].backend,
        seconds=ended - began,
        measuring=ended - measuring,
        peak_gib=usage.ru_maxrss / (1 << 20),
        all_bytes=sum(sizes.values()),
        one_bytes=max(sum(sizes[file] for file in entry.sha256) for entry in engines),
    )


def main(
    model: Annotated[str, typer.Option(help="timm model name.")] = "deit_small_patch16_224",
    degrees: Annotated[str, typer.Option(help="Degrees of each compile, compiles apart by semicolons.")] = _DEGREES,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("bench/results/compile.md"),
) -> None:
    """Compiles from scratch, with a compensator, and writes a table."""
    lines = [
        f"# Cost of compiling {model}",
        "",
        f"Written by `python bench/compile_cost.py`, {date.today()}: {os.cpu_count()} cores ({platform.machine()}), "
        f"torch {version('torch')}, onnxruntime {version('onnxruntime-gpu')}, openvino {version('openvino')}. With a "
        "compensator and `--backend auto`, from the start of the process to its end: choosing the backend, proving "
        "every engine, and measuring latencies at batch 1 and 8. One run each. Degrees: 0 among them. MB: 10^6 bytes. "
        "Of one degree: of the files that the degree with most of them reads.",
        "",
        "| degrees | backend | seconds | of these, measuring latency | peak GiB | MB on disk | of one degree |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(model, Path(folder))
        for some in degrees.split(";"):
            cost = timed_compile(model, some, Path(folder))
            lines.append(
                f"| {cost.degrees} | {cost.backend} | {cost.seconds:.0f} | {cost.measuring:.0f} "
                f"| {cost.peak_gib:.2f} | {cost.all_bytes / 1e6:.1f} | {cost.all_bytes / cost.one_bytes:.3f}x |"
            )
            print(lines[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
