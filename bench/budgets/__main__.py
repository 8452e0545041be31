"""What a choice of degree and a cascade bring, on the example and the experiment's tasks: `python -m bench.budgets`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from bench.budgets import measure
from bench.budgets.measure import FULL, QUICK, Effort, Given
from bench.budgets.page import write_page
from bench.budgets.subjects import DEGREES, ROOT, Subject
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.errors import InputError
from tocom.runtime.files import write_atomically

STAGES = ("singles", "equal", "gmacs", "promises", "times")
RESULTS = ROOT / "bench" / "results"


def main(
    work: Annotated[Path, typer.Option(help="Families, and finished stages.")] = ROOT / "build" / "bench" / "budgets",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page; numbers and pictures go beside it. Default: bench/results/budgets.md, with --quick in --work."
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Only these subjects, e.g. example,board-0.")] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Measure times anew: where the machine was busy the last time.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two subjects, few sheets: whether it runs, no result.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing; write the page of what is finished.")
    ] = False,
) -> None:
    """Measures frontiers and cascades of the example and of the experiment's checkpoints (`make experiment`).

    Finished stages are kept, so the same command goes on after it was stopped. Times come last, one subject after the
    other: let the machine do nothing else.

        python -m bench.budgets --quick --only example       does it run?
        python -m bench.budgets                              all of it
        python -m bench.budgets --report-only                the page of what is finished by now
    """
    effort = QUICK if quick else FULL
    folder = work / effort.name
    folder.mkdir(parents=True, exist_ok=True)
    listed = subjects(effort)
    strange = [name for name in only.split(",") if name and name not in listed]
    if strange:
        _refuse(f"subjects are {', '.join(listed)}, got {strange[0]!r}.")
    chosen = [name for name in listed if not only or name in only.split(",")]
    if not report_only:
        try:
            _run(effort, folder, [listed[name] for name in chosen], again)
        except InputError as error:
            _refuse(str(error))
    results = _gathered(effort, folder, listed)
    if not any({*STAGES[:-1]} <= each.keys() for each in results["subjects"].values()):
        _refuse(f"nothing finished lies in {folder}: run without --report-only.")
    out = out or (folder / "budgets.md" if quick else RESULTS / "budgets.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out.with_suffix(".json"), (json.dumps(results) + "\n").encode())
    write_page(json.loads(out.with_suffix(".json").read_text()), out)
    print(f"wrote {out}")


def subjects(effort: Effort) -> dict[str, Subject]:
    """By name, the example first."""
    found = [Subject("example", "board")]
    found += [Subject(f"{task}-{seed}", task) for task in effort.tasks for seed in effort.seeds]
    return {subject.name: subject for subject in found}


def stages_of(subject: Subject, effort: Effort) -> tuple[str, ...]:
    """What is measured of a subject: times, which hardly depend on weights, only of one fine-tuning of a task."""
    return STAGES if subject.seed in (None, effort.seeds[0]) else STAGES[:-1]


def _run(effort: Effort, folder: Path, chosen: list[Subject], again: bool) -> None:
    for round_stages in (STAGES[:-1], STAGES[-1:]):
        for subject in chosen:
            due = [stage for stage in round_stages if stage in stages_of(subject, effort)]
            files = {stage: folder / f"{stage}-{subject.name}.json" for stage in due}
            wanted = [stage for stage, file in files.items() if not file.exists() or (again and stage == "times")]
            if not wanted:
                continue
            given = _given(subject, effort, folder)
            for stage in wanted:
                began = time.monotonic()
                _tell(f"{subject.name}: {stage} ...")
                write_atomically(
                    files[stage], (json.dumps(_stage(stage, given, effort, folder, again)) + "\n").encode()
                )
                _tell(f"{subject.name}: {stage} took {time.monotonic() - began:.0f} s")


def _given(subject: Subject, effort: Effort, folder: Path) -> Given:
    engines = subject.compile(folder, effort.compile_sheets, lambda text: _tell(f"{subject.name}: {text} ..."))
    return Given.of(subject, engines, effort, folder / f"logits-{subject.name}.npz")


def _stage(stage: str, given: Given, effort: Effort, folder: Path, again: bool) -> Any:
    if stage == "singles":
        return measure.singles(given)
    if stage == "equal":
        return measure.at_equal_cost(given)
    if stage == "gmacs":
        return measure.by_gmacs(given, effort)
    if stage == "promises":
        return measure.promises(given, effort)
    cache = folder / "latency"
    if again:
        for file in cache.glob("*.json"):
            file.unlink()
    say: Callable[[str], object] = lambda text: _tell(f"{given.subject.name}: {text}")  # noqa: E731
    rows = measure.by_time(given, effort, cache, say)
    return {"machine": this_machine(), "backend": given.family.engines[0].backend, "load": os.getloadavg()[0],
            "rows": rows}  # fmt: skip


def _gathered(effort: Effort, folder: Path, listed: dict[str, Subject]) -> dict[str, Any]:
    """Everything that is finished."""
    found: dict[str, dict[str, Any]] = {}
    for name in listed:
        files = {stage: folder / f"{stage}-{name}.json" for stage in STAGES}
        found[name] = {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}
    setup = {
        "effort": effort.name,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__.partition("+")[0],
        "openvino": version("openvino"),
        "degrees": list(DEGREES),
        "seeds": list(effort.seeds),
        "drops": list(effort.drops),
        "val_sheets": effort.val_sheets,
        "test_sheets": effort.test_sheets,
        "draw_sheets": effort.draw_sheets,
        "unfinished": [
            f"{stage} of {name}"
            for name, each in found.items()
            for stage in stages_of(listed[name], effort)
            if stage not in each
        ],
    }
    return {"setup": setup, "subjects": found}


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refuse(problem: str) -> NoReturn:
    print(f"budgets: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    typer.run(main)
