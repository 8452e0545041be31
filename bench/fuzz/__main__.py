"""python -m bench.fuzz: see --help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

import typer

from bench.harness import run
from bench.harness.state import State, fingerprint

_LIBRARIES = ("torch", "timm", "onnx", "onnxruntime-gpu", "openvino", "polygraphy", "pillow", "safetensors")
_LIMITS = "120 s and 2 GiB of memory for a case"


def fuzz(
    cases: Annotated[int, typer.Option(min=1, help="How many, over all entry points.")] = 5000,
    seconds: Annotated[float, typer.Option(help="Stop after this long.")] = 720.0,
    only: Annotated[str, typer.Option(help="Entry points with this in their names, like 'image'.")] = "",
    seed: run.Seed = 0,
    again: run.Again = False,
    common: run.Common = run.COMMON,
) -> None:
    """Damage real files and feed them to every entry point: each must refuse in one clear line, or answer rightly.

    The same command goes on where it stopped. Exit status: 0 no fault, 1 a fault, 2 bad input.
    """
    from bench.fuzz.case import FAULTS, FINE
    from bench.fuzz.page import summary, write_page
    from bench.harness.page import keep_results, report

    place = common.places("fuzz")
    if not common.report_only:
        from bench.fuzz.campaign import run as run_campaign
        from bench.fuzz.registry import ENTRIES

        run.matching("only", only, ENTRIES)
        code = fingerprint(Path(__file__).parent.glob("mutate_*.py"))
        state = State.load(place.state, {"seed": seed, "code": code}, fresh=common.fresh)
        if again:
            state.forget([key for key, each in state.results.items() if each["verdict"] not in FINE])
        cases = min(cases, 50) if common.quick else cases
        with run.progress(cases, "making whole files") as tell:
            run_campaign(place.work, state, count=cases, seconds=seconds, seed=seed, only=only, tell=tell)
        keep_results(place, _LIBRARIES, {**summary(state.results)}, seed=seed, limits=_LIMITS)
    results = report(place, write_page)
    faulty = [each for each in results["odd"] if each["verdict"] in FAULTS]
    for each in faulty:
        print(f"{each['entry point']}, {each['damage']} {each['number']}: {each['verdict']}: {each['message']}")
    if faulty:
        raise typer.Exit(1)


if __name__ == "__main__":
    run.main("bench.fuzz", fuzz)
