"""`--backend auto`: the fastest engine library here whose engine passes validation.

It is decided on the highest degree asked for, where merging weighs most.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from tocom.export.artifacts import Engine, OnnxGraph, Report
from tocom.export.engine.build import AUTO, backends_for, build
from tocom.export.proof.validate import validate
from tocom.export.source.load import Source, validation_batches
from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT


def listed_backend(source: Source, family: Family) -> str | None:
    """The backend of an engine that the family has already, if it was made from the same things."""
    degree = max(source.schedules)
    entry = next((entry for entry in family.engines if entry.degree == degree), None)
    if entry is None or entry.backend not in backends_for(AUTO, source.options.precision):
        return None
    as_listed = replace(source, options=replace(source.options, backend=entry.backend))
    return entry.backend if entry.recipe == as_listed.recipe(degree) else None


def fastest(
    source: Source, graphs: Mapping[str, OnnxGraph], reference: ReducedViT, plain: ReducedViT | None = None
) -> Report:
    """Builds the engine of every candidate, times them side by side, and proves them, the fastest first.

    Args:
        source: What is compiled.
        graphs: Candidate -> the highest degree, lowered for it.
        reference: Of that degree.
        plain: The one that is not quantized, where that is.

    Returns:
        What was found about the fastest that passes; where none does, about the fastest.
    """
    precision = source.options.precision
    engines = {
        name: build(graph, backend=name, precision=precision, plan=source.options.plan)
        for name, graph in graphs.items()
    }
    first = None
    for name in _by_speed(engines, precision):
        report = validate(engines[name], reference, validation_batches(source), plain)
        if report:
            return report
        first = first or report
    return first


def _by_speed(engines: Mapping[str, Engine], precision: str) -> list[str]:
    if len(engines) == 1:
        return list(engines)
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_engine(engine.file, name, precision=precision, batch=1))
            for name, engine in engines.items()
        }
        times = measure(runners, batch=1, seconds=1.0, min_rounds=10)
    return sorted(times, key=lambda name: times[name].p50)
