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
from runtime.artifacts import OnnxGraph
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


def fastest_backend(source: Source, graph: OnnxGraph) -> str:
    """Builds a graph for every candidate, proves the engines, and times those that pass side by side.

    Args:
        source: What is compiled.
        graph: The highest degree, lowered.

    Returns:
        The fastest; the first candidate where none passes, which the compile then reports.
    """
    precision = source.options.precision
    names = backends_for(AUTO, precision)
    reference = reference_model(
        source.loaded.model, source.schedules[graph.source.degree], graph.source, source.reduction
    )
    with ExitStack() as stack:
        runners = {}
        for name in names:
            engine = build(graph, backend=name, precision=precision)
            if validate(engine, reference, validation_batches(source)):
                opened = open_engine(engine.file, name, precision=precision, batch=1)
                runners[name] = stack.enter_context(opened)
        if not runners:
            return names[0]
        times = measure(runners, batch=1, min_rounds=20)
    return min(times, key=lambda name: times[name].p50)
