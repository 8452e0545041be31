"""Repeats the paper's experiment and writes docs/experiment.md: `make experiment`, or `make experiment QUICK=1`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.experiment import plan, stages
from bench.experiment.protocol import METHODS, PRESETS, Protocol
from bench.experiment.report import write_report
from bench.harness import run
from bench.harness.page import read_results, setup, write_results
from tocom.runtime.errors import InputError
from tocom.runtime.files import write_atomically

_LIBRARIES = ("torch", "timm", "onnxruntime-gpu")


def experiment(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "small",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seeds: Annotated[str, typer.Option(help="Only these, e.g. 0; the others can be added later.")] = "",
    methods: Annotated[str, typer.Option(help=f"Only these of {', '.join(METHODS)}; likewise.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="The page. Default: docs/experiment.md; of preset quick, docs in --work.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Finished stages. Default: build/experiment/PRESET.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the page from the results file.")] = False,
) -> None:
    """Repeat the paper's central experiment; finished stages are kept, so the same command goes on after a kill."""
    if preset not in PRESETS or device not in ("auto", "cpu", "cuda"):
        raise InputError(f"there is no preset {preset!r} or no device {device!r}.")
    work, official = work or run.ROOT / "build" / "experiment" / preset, preset != "quick"
    results = run.RESULTS / f"experiment-{preset}.json" if official else work / "results.json"
    page = out or (run.ROOT / "docs" / "experiment.md" if official else work / "docs" / "experiment.md")
    protocol = selected(PRESETS[preset], seeds, methods)
    if not report_only:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        bench = stages.Bench(protocol, work, chosen)
        _require_same_protocol(bench)
        _run(bench)
        write_results(results, _gather(bench))
    write_report(read_results(results), page)
    print(f"wrote {page} from {results}")


def selected(protocol: Protocol, seeds: str, methods: str) -> Protocol:
    """A preset with a part of its seeds and methods."""
    names = tuple(run.names("methods", methods, protocol.methods))
    if names[0] != "constant":
        raise InputError(f"--methods must begin with constant, got {methods!r}")
    return replace(protocol, seeds=run.numbers("seeds", seeds) if seeds else protocol.seeds, methods=names)


def _require_same_protocol(bench: stages.Bench) -> None:
    """Files of another protocol are not mixed with this one's."""
    bench.work.mkdir(parents=True, exist_ok=True)
    file = bench.work / "protocol.json"
    now = {name: value for name, value in asdict(bench.protocol).items() if name not in ("seeds", "methods")}
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(now)):
        raise InputError(f"{bench.work} holds stages of another protocol: remove it, or give another --work.")
    write_atomically(file, json.dumps(now).encode())


def _run(bench: stages.Bench) -> None:
    if not (bench.work / plan.BACKBONE).exists():
        with run.progress(bench.protocol.pretraining_steps, "backbone") as tell:
            stages.pretrain(bench, plan.BACKBONE, tell)
    jobs = plan.jobs(bench.protocol)
    with run.progress(len(jobs), "stages") as tell:
        plan.run_jobs(bench, jobs, tell)
    if not (bench.work / plan.LATENCY).exists() and "strided" in bench.protocol.methods:
        print("compiling and timing the constant and the strided family ...", flush=True)
        stages.time_families(bench, plan.LATENCY)


def _gather(bench: stages.Bench) -> dict[str, Any]:
    """Everything the page is made of."""
    jobs = plan.jobs(bench.protocol)
    names = [plan.BACKBONE, *(job.name for job in jobs), plan.LATENCY]

    def read(name: str) -> Any:
        return json.loads((bench.work / name).read_text())

    timed = [name for name in names if (bench.work / f"{name}.time.json").exists()]
    return {
        "setup": setup(_LIBRARIES, device=bench.device),
        "protocol": asdict(bench.protocol),
        "outcomes": {Path(job.name).stem: read(job.name) for job in jobs if job.run is stages.assess},
        "transfer": [read(job.name) for job in jobs if job.run is stages.transfer],
        "latency": read(plan.LATENCY) if (bench.work / plan.LATENCY).exists() else None,
        "seconds": {name: read(f"{name}.time.json")["seconds"] for name in timed},
    }


if __name__ == "__main__":
    run.main("experiment", experiment)
