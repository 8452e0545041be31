"""Times a step of `tocom distill` and its peak memory; randomly initialized weights, real sizes, made-up images.

python bench/distill_cost.py --models deit_small_patch16_224,deit_base_patch16_224 --batch 32

Every configuration runs in a process of its own. Memory is the process's peak (resident) on a CPU, and what torch
allocated at most on a GPU. Loading images is not part of it. On a GPU bf16 is measured beside fp32.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
UNTIMED = 2  # steps before the clock starts
HEADER = ("model", "precision", "batch", "s per step", "fastest - slowest", "images/s", "peak memory")


def measure(model: str, batch: int, precision: str, steps: int, device: str, model_args: dict[str, object]) -> None:
    """Trains for some steps in this process, and prints what was found as JSON."""
    import timm
    import torch

    from tocom.calib.distill import DistillOptions, distill

    class Noise:
        """Images made before the clock starts."""

        def __init__(self, network: torch.nn.Module) -> None:
            draw = torch.Generator().manual_seed(0)
            self.images = torch.randn(batch, 3, *network.patch_embed.img_size, generator=draw)

        def batch(self, first_pair: int, pairs: int) -> torch.Tensor:  # noqa: ARG002
            """The same images again."""
            return self.images

    torch.manual_seed(0)
    network = timm.create_model(model, **model_args)
    ends: list[float] = []
    options = DistillOptions(steps=UNTIMED + steps, batch=batch, precision=precision, device=device)
    distill(
        network,
        Noise(network),
        backbone=model,
        backbone_sha256="random",
        options=options,
        on_step=lambda _step, _loss: ends.append(time.perf_counter()),  # the loss was fetched: the device is done
    )
    on_gpu = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [end - begin for begin, end in pairwise(ends[UNTIMED - 1 :])]
    print(json.dumps({"seconds": seconds, "peak_gib": peak / (1 << 30)}))


def measured(model: str, batch: int, precision: str, steps: int, device: str, model_args: str) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        SystemExit: If it fails.
    """
    arguments = [model, str(batch), precision, str(steps), device, model_args]
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(f"{model} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """The processor, and the GPU where there is one."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{name}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads{gpu}"


def main(
    models: Annotated[str, typer.Option(help="timm model names.")] = "deit_small_patch16_224,deit_base_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 32,
    steps: Annotated[int, typer.Option(help="Timed steps of each configuration; degrees are drawn for each.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model_args: Annotated[str, typer.Option(help="Further timm model arguments, JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("bench/results/distill.md"),
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures every model at every precision, and writes a table."""
    if one is not None:
        name, images, precision, timed, where, arguments = json.loads(one)
        measure(name, int(images), precision, int(timed), where, json.loads(arguments))
        return
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    rows = []
    for name in models.split(","):
        for precision in ("fp32", "bf16") if device == "cuda" else ("fp32",):
            found = measured(name, batch, precision, steps, device, model_args)
            seconds = found["seconds"]
            rows.append((name, precision, str(batch), f"{median(seconds):.3f}",
                         f"{min(seconds):.3f} - {max(seconds):.3f}", f"{batch * len(seconds) / sum(seconds):.1f}",
                         f"{found['peak_gib']:.2f} GiB"))  # fmt: skip
            print("  ".join(rows[-1]), flush=True)
    lines = [
        "# Cost of training a compensator",
        "",
        f"`python bench/distill_cost.py --models {models} --batch {batch} --steps {steps}`, {date.today()}, "
        f"{machine()}, torch {version('torch')}. {steps} steps on {device}, after {UNTIMED} untimed "
        "ones: median, range, and images/s over all of them. Every step draws its two degrees, so steps differ; random "
        "weights, images at hand.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
