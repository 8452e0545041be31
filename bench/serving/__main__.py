"""python -m bench.serving: see --help."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the local engine must not take the server's core
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it remarks on every process that is started

import typer

from bench.harness import run
from bench.harness.state import State

_LIBRARIES = ("mlserver", "openvino", "onnxruntime-gpu", "grpcio", "numpy")

Engines = Annotated[Path, typer.Option(help="Folder of a family of the digits example, degree 0 among it.")]
Images = Annotated[Path, typer.Option(help="Labelled sheets: one folder per class.")]
_ENGINES, _IMAGES = Path("engines/digits"), Path("examples/digits/sheets")


def load(
    engines: Engines = _ENGINES,
    images: Images = _IMAGES,
    objective_ms: Annotated[float, typer.Option(help="Of the 99th percentile.")] = 100.0,
    request: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, max=180, help="For each measurement.")] = 60.0,
    trial_s: Annotated[float, typer.Option(min=1, help="For each step of the search for what r=0 sustains.")] = 15.0,
    seed: run.Seed = 0,
    common: run.Common = run.COMMON,
) -> None:
    """Offer 0.5x to 4x of what r=0 sustains to fixed r=0, fixed most compressed, and adaptive; then a step of load.

    The same command goes on where it stopped. Exit status: 0 all claims hold, 1 one does not, 2 bad input.
    """
    from dataclasses import asdict

    from bench.harness.page import keep_results, report
    from bench.serving.load import LoadOptions, LoadTest
    from bench.serving.load_page import summary, verdicts, write_load_page

    place = common.places("serving")
    if not common.report_only:
        from bench.serving.subject import Subject

        options = LoadOptions(
            objective_ms, request, 4.0 if common.quick else seconds, 2.0 if common.quick else trial_s, seed=seed
        )
        state = State.load(place.work / "load.jsonl", {**asdict(options), "family": _hash(engines)}, fresh=common.fresh)
        subject = Subject(engines, images)
        with run.progress(None) as tell:
            LoadTest(subject, options, state, place.work / "load", tell).run()
        keep_results(place, _LIBRARIES, {**summary(state.results, options, max(subject.expected))})
    results = report(place, write_load_page)
    _end(verdicts(results))


def faults(
    engines: Engines = _ENGINES,
    images: Images = _IMAGES,
    only: Annotated[str, typer.Option(help="Cases with this in their names.")] = "",
    malformed: Annotated[int, typer.Option(min=1, help="Malformed requests.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=1, help="Of steady traffic around a fault.")] = 12.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of the soak, the last case.")] = 10.0,
    seed: run.Seed = 0,
    again: run.Again = False,
    common: run.Common = run.COMMON,
) -> None:
    """Break things under steady traffic: every valid request gets a right answer or a clear refusal, none is lost.

    The same command goes on where it stopped. Exit status: 0 every case passes, 1 one does not, 2 bad input.
    """
    from bench.harness.page import keep_results, report
    from bench.serving.faults_page import fault_verdicts, write_faults_page

    place = common.places("serving-faults")
    if not common.report_only:
        from bench.serving.case import FaultOptions, run_case
        from bench.serving.fault_cases import CASES
        from bench.serving.subject import Subject
        from bench.serving.traffic import mixed_bodies

        options = FaultOptions(4.0, 200, 1.0, seed) if common.quick else FaultOptions(seconds, malformed, minutes, seed)
        state = State.load(place.state, {**vars(options), "family": _hash(engines)}, fresh=common.fresh)
        if again:
            state.forget([name for name, each in state.results.items() if not each["passed"] and not each["skipped"]])
        subject = Subject(engines, images)
        bodies = mixed_bodies(subject)
        run.run_cases(state, {
            name: partial(run_case, name, CASES[name], subject, bodies, options, place.work / "faults")
            for name in run.matching("only", only, CASES)
        })  # fmt: skip
        keep_results(place, _LIBRARIES, {"cases": state.results})
    results = report(place, write_faults_page)
    _end(fault_verdicts(results["cases"]))


def _hash(engines: Path) -> str:
    from tocom.runtime.errors import InputError, one_line
    from tocom.runtime.files import sha256_file

    file = engines / "family.json"
    if not file.is_file():
        raise InputError(f"there is no family in {one_line(engines)}: give --engines")
    return sha256_file(file)


def _end(lines: list[str]) -> None:
    print("\n".join(lines))
    if not all(line.startswith(("PASS", "SKIPPED")) for line in lines):
        raise typer.Exit(1)


if __name__ == "__main__":
    run.main("bench.serving", load, faults)
