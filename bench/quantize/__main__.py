"""Accuracy of quantized networks that merge tokens: `python -m bench.quantize`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from bench.quantize import accuracy, insight
from bench.quantize.comparison import rounded
from bench.quantize.page import write_page
from bench.quantize.protocol import FULL, QUICK, Effort, stress_formats
from bench.quantize.subjects import ROOT, Subject, downstream, example, keep_json
from tocom.runtime.errors import InputError
from tocom.runtime.files import write_atomically

TASKS = ("board", "letters", "missing")
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Stage:
    """One part of the study.

    Attributes:
        run: (subject, effort, folder for float logits) -> records.
        names: Effort -> the subjects that it is run on.
    """

    run: Callable[[Subject, Effort, Path], accuracy.Records]
    names: Callable[[Effort], tuple[str, ...]]


def _seeds_of(*tasks: str) -> Callable[[Effort], tuple[str, ...]]:
    return lambda effort: ("example", *(f"{task}-{seed}" for task in tasks for seed in effort.seeds))


def _one_of_each(effort: Effort) -> tuple[str, ...]:
    return ("example", *(f"{task}-{effort.seeds[0]}" for task in TASKS))


STAGES: Mapping[str, Stage] = {
    "default": Stage(accuracy.default, lambda effort: ("example-shipped", *_seeds_of(*TASKS)(effort))),
    "decisions": Stage(insight.decisions, _seeds_of("board", "letters")),
    "degrees": Stage(accuracy.degrees, _seeds_of("board", "letters")),
    "methods": Stage(accuracy.methods, _seeds_of("board")),
    "ranges": Stage(insight.ranges, _seeds_of(*TASKS)),
    "products": Stage(insight.products, _one_of_each),
    "data": Stage(accuracy.data, _one_of_each),
    "reconstruction": Stage(accuracy.reconstruction, lambda effort: tuple(effort.reconstructed)),
}


def main(
    work: Annotated[Path, typer.Option(help="Finished stages, one file for each stage and network.")] = ROOT
    / "build"
    / "bench"
    / "quantize",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page; numbers and plots go beside it. Default: bench/results/quantize.md, with --quick in --work."
        ),
    ] = None,
    only: Annotated[str, typer.Option(help=f"Only these stages, of {', '.join(STAGES)}.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few sheets and one seed: whether it runs, no result.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing; write the page of what is finished.")
    ] = False,
) -> None:
    """Measures what low precision does to networks that merge tokens, and which method helps.

    Quantized are the example's checkpoint and those of the experiment (`make experiment`). Everything is computed by
    the quantized network in PyTorch, to which `tocom quantize` proves engines equal. Finished stages are kept, so the
    same command goes on after it was stopped; it takes about an hour on one core.

        python -m bench.quantize --quick                     does it run?
        python -m bench.quantize                             all of it
        python -m bench.quantize --only default,decisions    a part
        python -m bench.quantize --report-only               the page of what is finished by now
    """
    effort = QUICK if quick else FULL
    folder = work / effort.name
    chosen = [name for name in only.split(",") if name] or list(STAGES)
    strange = [name for name in chosen if name not in STAGES]
    if strange:
        _refuse(f"stages are {', '.join(STAGES)}, got {strange[0]!r}.")
    if not report_only:
        try:
            with stress_formats():
                _run(effort, folder, chosen)
        except InputError as error:
            _refuse(str(error))
    out = out or (folder / "quantize.md" if quick else RESULTS / "quantize.md")
    results = _gathered(effort, folder)
    if "default" not in results["stages"]:
        _refuse(f"no finished stage of the default table lies in {folder}: run without --report-only.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), _as_lines(results).encode())
    write_page(json.loads(out.with_suffix(".json").read_text()), out)
    print(f"wrote {out}")


def jobs(effort: Effort, chosen: list[str]) -> Iterator[tuple[str, str]]:
    """Every stage with every network it is run on, stages in their own order."""
    for stage, each in STAGES.items():
        if stage in chosen:
            for name in each.names(effort):
                yield stage, name


def _run(effort: Effort, folder: Path, chosen: list[str]) -> None:
    listed = list(jobs(effort, chosen))
    subjects: dict[str, Subject] = {}
    for index, (stage, name) in enumerate(listed):
        file = folder / f"{stage}-{name}.json"
        if file.exists():
            continue
        began = time.monotonic()
        print(f"{index + 1} of {len(listed)}: {stage}, {name} ...", file=sys.stderr, flush=True)
        subject = subjects.setdefault(name, _subject(name))
        keep_json(file, rounded(STAGES[stage].run(subject, effort, folder)))
        print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _subject(name: str) -> Subject:
    if name.startswith("example"):
        return example(shipped=name.endswith("shipped"))
    task, _, seed = name.rpartition("-")
    return downstream(task, int(seed))


def _gathered(effort: Effort, folder: Path) -> dict[str, Any]:
    """Everything that is finished."""
    stages: dict[str, dict[str, accuracy.Records]] = {}
    for stage, name in jobs(effort, list(STAGES)):
        file = folder / f"{stage}-{name}.json"
        if file.exists():
            stages.setdefault(stage, {})[name] = json.loads(file.read_text())
    setup = {
        "effort": effort.name,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__.partition("+")[0],
        "timm": version("timm"),
        "python": platform.python_version(),
        "seeds": list(effort.seeds),
        "unfinished": [f"{stage}-{name}" for stage, name in jobs(effort, list(STAGES))
                       if name not in stages.get(stage, {})],
    }  # fmt: skip
    return {"setup": setup, "stages": stages}


def _as_lines(results: Mapping[str, Any]) -> str:
    """JSON with a line for every record."""
    parts = []
    for stage, found in results["stages"].items():
        networks = []
        for name, records in found.items():
            lines = ",\n".join(json.dumps(record) for record in records)
            networks.append(f"{json.dumps(name)}: [\n{lines}\n]")
        parts.append(f"{json.dumps(stage)}: {{\n" + ",\n".join(networks) + "\n}")
    return f'{{"setup": {json.dumps(results["setup"])},\n"stages": {{\n' + ",\n".join(parts) + "\n}}\n"


def _refuse(problem: str) -> NoReturn:
    print(f"quantize: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    typer.run(main)
