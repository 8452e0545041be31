"""`--backend auto`: the fastest engine library here whose engine passes validation.

It is chosen on the highest degree asked for, where merging weighs most.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from tocom.export.artifacts import Engine, OnnxGraph, Report
from tocom.export.engine.build import AUTO, backends_for, build, graph_precision
from tocom.export.family.steps import Graphs
from tocom.export.proof.validate import validate
from tocom.export.source.load import CompileInputs, validation_batches
from tocom.export.source.options import QUANTIZED
from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import Family


@dataclass(frozen=True)
class ChosenBackend:
    """The backend of a family's engines.

    Attributes:
        name: Of the backend.
        report: On its engine of the highest degree; None where none was built to choose, or where the engine is a
            quantized one, as what it loses is still to be measured.
    """

    name: str
    report: Report | None = None


def choose_backend(graphs: Graphs, family: Family) -> ChosenBackend:
    """The backend that was asked for; of "auto" the one that the family has, else the fastest that passes.

    Args:
        graphs: What is compiled.
        family: As listed in the folder.
    """
    inputs = graphs.inputs
    options = inputs.options
    if options.backend != AUTO:
        return ChosenBackend(options.backend)
    candidates = backends_for(AUTO, options.precision)
    listed = candidates[0] if len(candidates) == 1 else _listed_backend(inputs, family, candidates)
    if listed is not None:
        return ChosenBackend(listed)
    degree = max(inputs.schedules)
    lowered: dict[str, OnnxGraph] = {}  # backends that compute in the formats of a graph share it
    for name in candidates:
        precision = graph_precision(name, options.precision)
        if precision not in lowered:
            lowered[precision] = graphs.graph(degree, name)
    graphs.notify(degree, f"choosing a backend: {' or '.join(candidates)}")
    report = _fastest(graphs, {name: lowered[graph_precision(name, options.precision)] for name in candidates})
    return ChosenBackend(report.engine.backend, None if options.precision in QUANTIZED else report)


def _listed_backend(inputs: CompileInputs, family: Family, candidates: list[str]) -> str | None:
    """The backend of an engine that the family has already, if it was made from the same things."""
    degree = max(inputs.schedules)
    entry = next((entry for entry in family.engines if entry.degree == degree), None)
    if entry is None or entry.backend not in candidates:
        return None
    return entry.backend if entry.recipe == inputs.recipe(degree, entry.backend) else None


def _fastest(graphs: Graphs, candidates: Mapping[str, OnnxGraph]) -> Report:
    """Builds the engine of every candidate, times them side by side, and validates them, the fastest first.

    Returns:
        The report on the fastest that passes; where none does, on the fastest.
    """
    inputs = graphs.inputs
    options = inputs.options
    engines = {
        name: build(graph, backend=name, precision=options.precision, plan=options.plan)
        for name, graph in candidates.items()
    }
    some_graph = next(iter(candidates.values()))
    reference, plain = graphs.reference(some_graph), graphs.plain_reference(some_graph)
    reports: list[Report] = []
    for name in _by_speed(engines, options.precision):
        reports.append(validate(engines[name], reference, validation_batches(inputs), plain))
        if reports[-1]:
            return reports[-1]
    return reports[0]


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
