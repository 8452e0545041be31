"""python -m bench.proof: see --help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads

import typer

from bench.harness import run
from bench.harness.state import State, fingerprint

_LIBRARIES = ("torch", "timm", "onnx", "onnxruntime-gpu", "openvino")
_MEASURING = ("decisions.py", "observe.py", "parts.py", "validate.py")


def proof(
    models: Annotated[int, typer.Option(min=1, help="How many random models.")] = 500,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that validate models.")] = 1,
    seed: run.Seed = 0,
    common: run.Common = run.COMMON,
) -> None:
    """Compile random healthy models and validate them: every gate that one of them does not hold is a false alarm.

    The same command goes on where it stopped. Exit status: 0 no alarm, 1 an alarm, 2 bad input.
    """
    from bench.harness.page import keep_results, report
    from bench.proof.page import write_page

    place = common.places("proof")
    if not common.report_only:
        from bench.proof.campaign import run as validate_all
        from bench.proof.summary import summary

        models = min(models, 6) if common.quick else models
        state = State.load(place.state, {"seed": seed, "code": _code()}, fresh=common.fresh)
        with run.progress(models) as tell:
            records = validate_all(state, models=models, seed=seed, tell=tell, jobs=jobs)
        keep_results(place, _LIBRARIES, {**summary(records)}, seed=seed)
    results = report(place, write_page)
    for each in results["alarms"]:
        print(f"model {each['model']}: {each['alarm']}")
    if results["alarms"]:
        raise typer.Exit(1)


def _code() -> str:
    """Tells the models and what is measured of them from others."""
    validation = run.ROOT / "export" / "proof"
    return fingerprint([Path(__file__).with_name("models.py"), *(validation / name for name in _MEASURING)])


if __name__ == "__main__":
    run.main("bench.proof", proof)
