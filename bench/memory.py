"""Memory of one degree and of three in one ONNX Runtime process, and what sharing weights costs in time.

python -m bench.memory --engines engines/deit --degrees 4,8,16
"""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import open_engine
from tocom.runtime.files import write_atomically
from tocom.runtime.manifest import Family

ROOT = Path(__file__).parents[1]


def resident(engines: Path, degrees: list[int], *, share: bool) -> float:
    """Resident memory, in MiB, of a process that has opened some degrees and run each on one image.

    Raises:
        CalledProcessError: If the process fails.
    """
    command = [sys.executable, "-m", "bench.memory", "--engines", engines, "--only", ",".join(map(str, degrees))]
    done = subprocess.run(
        [*map(str, command), *(["--share"] if share else [])], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(done.stdout)


def open_and_tell(engines: Path, degrees: list[int], *, share: bool) -> None:
    """What `resident` runs."""
    family = Family.read(engines)
    image = np.random.default_rng(0).standard_normal((1, *family.input.size), dtype=np.float32)
    runners = [
        open_engine(engines / family.entry(degree).engine, "onnxruntime", share_weights=share) for degree in degrees
    ]
    for runner in runners:
        runner.infer(image)
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS")))


def main(
    engines: Annotated[Path, typer.Option(help="A compiled family for ONNX Runtime.")],
    degrees: Annotated[
        str, typer.Option(help="The degrees to open together; the first is also opened alone.")
    ] = "4,8,16",
    out: Annotated[Path, typer.Option(help="Result file.")] = ROOT / "bench" / "results" / "memory.md",
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    share: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measures memory in processes of their own and time side by side, and writes a table."""
    engines = engines.resolve()
    if only is not None:  # the process that is measured
        return open_and_tell(engines, [int(degree) for degree in only.split(",") if degree], share=share)
    chosen, family = list(map(int, degrees.split(","))), Family.read(engines)
    empty = resident(engines, [], share=False)
    one = resident(engines, chosen[:1], share=False)
    lines = [
        "# Memory of several degrees in one process", "",
        f"{family.model}, ONNX Runtime, {date.today().isoformat()}; `python -m bench.memory`. Resident memory of a "
        "fresh process that has run each degree on one image; the process itself, with no engine, takes "
        f"{empty:.0f} MiB.", "",
        "| weights | degrees | MiB | of one, packed |", "|---|---|---:|---:|",
    ]  # fmt: skip
    for shared in (False, True):
        for some in (chosen[:1], chosen):
            found = one if some == chosen[:1] and not shared else resident(engines, some, share=shared)
            name = "shared" if shared else "packed (default)"
            lines.append(f"| {name} | {', '.join(map(str, some))} | {found:.0f} | {found / one:.2f}x |")
    lines += ["", "| batch | packed ms | shared ms | ratio |", "|---:|---:|---:|---:|"]
    for batch in (1, 8):
        file = engines / family.entry(chosen[-1]).engine
        with (
            open_engine(file, "onnxruntime") as packed,
            open_engine(file, "onnxruntime", share_weights=True) as sharing,
        ):
            times = measure({"packed": packed, "shared": sharing}, batch, seconds=20)
        first, second = times["packed"].p50, times["shared"].p50
        lines.append(f"| {batch} | {first:.1f} | {second:.1f} | {second / first:.2f}x |")
    write_atomically(out, ("\n".join(lines) + "\n").encode())
    print(f"wrote {out}")
    return None


if __name__ == "__main__":
    typer.run(main)
