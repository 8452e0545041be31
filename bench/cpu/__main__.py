"""python -m bench.cpu: see --help."""

from __future__ import annotations

from functools import cache, partial
from typing import Annotated

import typer

from bench.harness import run
from bench.harness.state import State

_LIBRARIES = ("torch", "timm", "onnxruntime-gpu", "openvino", "nncf")


def cpu(
    models: Annotated[str, typer.Option(help="timm names.")] = "deit_small_patch16_224,deit_base_patch16_224",
    batches: Annotated[str, typer.Option(help="Images per call.")] = "1,8",
    degrees: Annotated[str, typer.Option(help="Degrees beside 0.")] = "4,8,12,16",
    seconds: Annotated[float, typer.Option(help="Seconds to measure each group for, at least 15 rounds.")] = 60.0,
    only: Annotated[str, typer.Option(help="Only contenders whose names match: fewer, so more rounds.")] = "",
    common: run.Common = run.COMMON,
) -> None:
    """Time our engines beside what a user would pick instead; randomly initialized weights, real sizes.

    For every model, batch size and degree all contenders, each also without merging, take turns in one process. The
    peers are the same token merging in PyTorch, run by torch itself and exported by torch.onnx.export without this
    project's operator, and the untouched timm model where nothing is merged. The same command goes on where it stopped.
    """
    from bench.cpu.page import write_page
    from bench.harness.page import keep_results, report

    place = common.places("cpu")
    if common.quick:
        models, batches, degrees, seconds, only = "deit_tiny_patch16_224", "1", "16", 0.0, only or "fp32"
    if not common.report_only:
        from bench.cpu.groups import run_group
        from bench.cpu.subject import Subject

        state = State.load(place.state, {"only": only, "seconds": seconds}, fresh=common.fresh)
        subject = cache(lambda name: Subject(name, place.work))
        cases = {
            f"{name}, batch {batch}, r = {degree}": partial(
                lambda *given: run_group(subject(given[0]), *given[1:]), name, batch, degree, seconds, only
            )
            for name in models.split(",")
            for batch in run.numbers("batches", batches, 1)
            for degree in run.numbers("degrees", degrees, 1)
        }
        rows = [row for group in run.run_cases(state, cases).values() for row in group]
        keep_results(place, _LIBRARIES, {"rows": rows}, only=only)
    report(place, write_page)


if __name__ == "__main__":
    run.main("bench.cpu", cpu)
