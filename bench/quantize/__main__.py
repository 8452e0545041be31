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
    out: run.Out = None,
    work: run.Work = None,
    fresh: run.Fresh = False,
    quick: run.Quick = False,
    report_only: run.ReportOnly = False,
) -> None:
    """Measure what int8, fp8 and int8 weights cost networks that merge tokens, with default settings.

    Quantized are the example's checkpoint and those of the experiment (`make experiment`; --quick needs only the
    example). Everything is computed by the quantized network in PyTorch, to which `tocom quantize` proves engines
    equal. The same command goes on where it stopped.
    """
    from bench.harness.page import read_results, setup, write_results
    from bench.quantize.page import TITLES, write_page

    place = run.Places.of("quantize", out, work, quick=quick)
    if not report_only:
        from bench.quantize.accuracy import accuracy
        from bench.quantize.subjects import SEEDS, SUBJECTS, subject_named

        many, some = (64, 32) if quick else (4096, 512)
        formats = {form: (_DEGREES, many) if form == "int8" else (_FEW, some) for form in TITLES}
        state = State.load(place.state, {"sheets": [many, some]}, fresh=fresh)
        chosen = run.names("only", only or ("example" if quick else ""), tuple(SUBJECTS))
        cases = {name: partial(lambda name: accuracy(subject_named(name), formats), name) for name in chosen}
        rows = [row for records in run.run_cases(state, cases).values() for row in records]
        head = setup(run.command_line("bench.quantize"), _LIBRARIES, seeds=SEEDS)
        write_results(place.results, {"setup": head, "rows": rows})
    write_page(read_results(place.results), place.page)
    print(f"wrote {place.page}")


if __name__ == "__main__":
    run.main("bench.quantize", quantize)
