"""`--backend auto`: the fastest engine library here whose engine passes validation.

It is decided on the highest degree asked for, where merging weighs most.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from export.build import AUTO, backends_for, build
from export.lower import reference_model
from export.source import Source, validation_batches
from export.validate import validate
from runtime.artifacts import OnnxGraph, Report
from runtime.engines import open_engine
from runtime.latency import measure
from runtime.manifest import Family


def listed_backend(source: Source, family: Family) -> str | None:
    """The backend of an engine that the family has already, if it was made from the same things."""
    degree = max(source.schedules)
    entry = next((entry for entry in family.engines if entry.degree == degree), None)
    if entry is None or entry.backend not in backends_for(AUTO, source.options.precision):
        return None
    as_listed = replace(source, options=replace(source.options, backend=entry.backend))
    return entry.backend if entry.recipe == as_listed.recipe(degree) else None


def fastest(source: Source, graph: OnnxGraph) -> Report:
    """Builds a graph for every candidate, proves the engines, and times those that pass side by side.

    Args:
        source: What is compiled.
        graph: The highest degree, lowered.

    Returns:
        What was found about the fastest; where none passes, about the first candidate.
    """
    precision = source.options.precision
    reference = reference_model(
        source.loaded.model, source.schedules[graph.source.degree], graph.source, source.reduction
    )
    reports = [
        validate(build(graph, backend=name, precision=precision), reference, validation_batches(source))
        for name in backends_for(AUTO, precision)
    ]
    passed = {report.engine.backend: report for report in reports if report}
    if len(passed) < 2:
        return next(iter(passed.values()), reports[0])
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_engine(report.engine.file, name, precision=precision, batch=1))
            for name, report in passed.items()
        }
        times = measure(runners, batch=1, min_rounds=20)
    return passed[min(times, key=lambda name: times[name].p50)]
