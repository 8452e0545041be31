"""Runs the experiment and writes docs/experiment.md: `make experiment`, or `make experiment QUICK=1`."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.experiment import plan, stages
from bench.experiment.frontier import measure_frontier
from bench.experiment.protocol import METHODS, PRESETS, Protocol
from bench.experiment.report import write_report
from tocom.runtime.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent.parent
LATENCY = "latency.json"


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "small",
    work: Annotated[Path | None, typer.Option(help="Finished stages. Default: build/experiment/PRESET.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    page: Annotated[Path | None, typer.Option(help="Default: docs/experiment.md, for quick docs in --work.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these, e.g. 0; the others can be added later.")] = None,
    methods: Annotated[str | None, typer.Option(help=f"Only these of {', '.join(METHODS)}; likewise.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the page from the results file.")] = False,
) -> None:
    """Repeats the paper's central experiment; finished stages are kept, so the same command goes on after a kill.

    Raises:
        SystemExit: With status 2, if something asked for does not exist.
    """
    if preset not in PRESETS or device not in ("auto", "cpu", "cuda"):
        _refuse(f"there is no preset {preset!r} or no device {device!r}.")
    protocol = _selected(PRESETS[preset], seeds, methods)
    work = work or ROOT / "build" / "experiment" / preset
    official = preset != "quick"
    results = ROOT / "bench" / "results" / f"experiment-{preset}.json" if official else work / "results.json"
    page = page or (ROOT / "docs" / "experiment.md" if official else work / "docs" / "experiment.md")
    if not report_only:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        bench = stages.Bench(protocol, work, chosen)
        _require_same_protocol(bench)
        _run(bench)
        write_atomically(results, (json.dumps(_gather(bench), indent=1) + "\n").encode())
    page.parent.mkdir(parents=True, exist_ok=True)
    write_report(json.loads(results.read_text()), page, page.with_suffix(""))
    print(f"wrote {page} from {results}")


def _require_same_protocol(bench: stages.Bench) -> None:
    """Files of another protocol are not mixed with this one's.

    Raises:
        SystemExit: With status 2, if the folder holds them.
    """
    bench.work.mkdir(parents=True, exist_ok=True)
    file = bench.work / "protocol.json"
    now = {name: value for name, value in asdict(bench.protocol).items() if name not in ("seeds", "methods")}
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(now)):
        _refuse(f"{bench.work} holds stages of another protocol: remove it, or give another --work.")
    write_atomically(file, json.dumps(now).encode())


def _selected(protocol: Protocol, seeds: str | None, methods: str | None) -> Protocol:
    """A preset with a part of its seeds and methods.

    Raises:
        SystemExit: With status 2, if there are no such ones.
    """
    numbers = protocol.seeds if seeds is None else tuple(int(part) for part in seeds.split(",") if part.isdecimal())
    names = protocol.methods if methods is None else tuple(methods.split(","))
    if not numbers or names[0] != "constant" or not set(names) <= METHODS.keys():
        _refuse("seeds must be whole numbers, and methods begin with constant and be some of "
                f"{', '.join(METHODS)}, got {seeds} and {methods}.")  # fmt: skip
    return replace(protocol, seeds=numbers, methods=names)


def _refuse(problem: str) -> NoReturn:
    print(f"experiment: {problem}", file=sys.stderr)
    raise SystemExit(2)


def _run(bench: stages.Bench) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        if not (bench.work / plan.BACKBONE).exists():
            steps = bench.protocol.pretraining_steps
            task = progress.add_task("backbone", total=steps)
            stages.pretrain(bench, plan.BACKBONE, partial(_tell, progress, task, "backbone"))
        jobs = plan.jobs(bench.protocol)
        task = progress.add_task("stages", total=len(jobs))
        lines: dict[str, Any] = {}
        last = -1

        def on_change(running: dict[str, tuple[int, str]], done: int) -> None:
            nonlocal last
            for name in [name for name in lines if name not in running]:
                progress.remove_task(lines.pop(name))
            for name, (step, text) in running.items():
                if name not in lines:
                    total = next(job.steps for job in jobs if job.name == name)
                    lines[name] = progress.add_task(f"  {name}", total=total or None)
                progress.update(lines[name], completed=step, description=f"  {Path(name).stem} {text}")
            progress.update(task, completed=done)
            if done != last and not progress.console.is_terminal:
                print(f"{done} of {len(jobs)} stages, {progress.tasks[0].elapsed or 0:.0f} s", flush=True)
            last = done

        plan.run_jobs(bench, jobs, on_change)
    if not (bench.work / LATENCY).exists() and "strided" in bench.protocol.methods:
        print("compiling and timing the constant and the strided family ...", flush=True)
        measure_frontier(bench, LATENCY)


def _tell(progress: Progress, task: Any, name: str, step: int, text: str) -> None:
    progress.update(task, completed=step, description=f"{name} {text}")
    if not progress.console.is_terminal and step % 200 == 0:
        print(f"{name}: {step} steps, {text}", flush=True)


def _gather(bench: stages.Bench) -> dict[str, Any]:
    """Everything the page is made of."""
    jobs = plan.jobs(bench.protocol)
    names = [plan.BACKBONE, *(job.name for job in jobs), LATENCY]

    def read(name: str) -> Any:
        return json.loads((bench.work / name).read_text())

    timed = [name for name in names if (bench.work / f"{name}.time.json").exists()]
    return {
        "protocol": asdict(bench.protocol),
        "machine": _machine(bench.device),
        "outcomes": {Path(job.name).stem: read(job.name) for job in jobs if job.run is stages.assess},
        "transfer": [read(job.name) for job in jobs if job.run is stages.transfer],
        "latency": read(LATENCY) if (bench.work / LATENCY).exists() else None,
        "seconds": {name: read(f"{name}.time.json")["seconds"] for name in timed},
    }


def _machine(device: str) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "onnxruntime": version("onnxruntime-gpu"),
        "engine": "ONNX Runtime fp32 on the CPU",
    }


if __name__ == "__main__":
    typer.run(main)
