"""python -m bench.quantize: see --help."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from bench.harness import run
from bench.harness.state import State

_LIBRARIES = ("torch", "timm")
_DEGREES, _FEW = (0, 4, 8, 12, 16), (0, 8, 16)


def quantize(
    only: Annotated[str, typer.Option(help="Only these networks, e.g. example,board-0.")] = "",
    common: run.Common = run.COMMON,
) -> None:
    """Measure what int8, fp8 and int8 weights cost networks that merge tokens, with default settings.

    Quantized are the example's checkpoint and those of the experiment (`make experiment`; --quick needs only the
    example). Everything is computed by the quantized network in PyTorch, to which `tocom quantize` proves engines
    equal. The same command goes on where it stopped.
    """
    from bench.harness.page import keep_results, report
    from bench.quantize.page import TITLES, write_page

    place = common.places("quantize")
    if not common.report_only:
        from bench.quantize.accuracy import accuracy
        from bench.quantize.subjects import SEEDS, SUBJECTS, subject_named

        many, some = (64, 32) if common.quick else (4096, 512)
        formats = {form: (_DEGREES, many) if form == "int8" else (_FEW, some) for form in TITLES}
        state = State.load(place.state, {"sheets": [many, some]}, fresh=common.fresh)
        chosen = run.names("only", only or ("example" if common.quick else ""), tuple(SUBJECTS))
        cases = {name: partial(lambda name: accuracy(subject_named(name), formats), name) for name in chosen}
        rows = [row for records in run.run_cases(state, cases).values() for row in records]
        keep_results(place, _LIBRARIES, {"rows": rows}, seeds=SEEDS)
    report(place, write_page)


if __name__ == "__main__":
    run.main("bench.quantize", quantize)
