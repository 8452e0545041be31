"""Does a degree pay? Every engine of a family against degree 0 and its slice bound, in interleaved runs.

The slice bound is the same engine whose blocks simply drop the last r tokens: the same products, no matching. What an
engine takes beyond it is the price of deciding and merging.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tocom.export.artifacts import Engine
from tocom.export.engine.build import as_engine
from tocom.export.graph.slice_bound import slice_bound
from tocom.runtime.degrees.choose import SAVES
from tocom.runtime.degrees.latency import Latency, measure
from tocom.runtime.degrees.local_latency import this_machine
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import EngineEntry

BATCHES = (1, 8)

_SECONDS, _ROUNDS = 2.0, 5
_TOGETHER = 4  # degrees that are open beside 0, each with its slice bound: all of a large family would fill the memory


def measured(
    entries: Sequence[EngineEntry],
    folder: Path,
    rival_of: Callable[[int], Engine | None] = lambda _degree: None,
    batches: Sequence[int] = BATCHES,
) -> list[EngineEntry]:
    """Fills in latencies, engines and slice bounds side by side with degree 0, and at which batch sizes a degree pays.

    Args:
        entries: Engines of one family, degree 0 among them.
        folder: Where their files lie.
        rival_of: Degree -> the engine that a quantized one competes with, in the same precision as without it.
        batches: Images per call.
    """
    measured_entries = {entry.degree: entry for entry in entries}
    (base,) = [entry for entry in entries if entry.degree == 0]
    others = [entry for entry in entries if entry.degree]
    rivals = {entry.degree: rival for entry in entries if (rival := rival_of(entry.degree)) is not None}
    groups = [others[start : start + _TOGETHER] for start in range(0, len(others), _TOGETHER)] or [[]]
    for batch in batches:
        runs = [(group, _times([base, *group], folder, batch, rivals)) for group in groups]
        typical = statistics.median(times["0"].p50 for _, times in runs)
        for group, times in runs:
            scale = typical / times["0"].p50  # a slow minute slows degree 0 of its group as well
            for degree in [0, *(entry.degree for entry in group)]:
                measured_entries[degree] = _with_times(measured_entries[degree], batch, times, scale)
    return list(measured_entries.values())


def _with_times(entry: EngineEntry, batch: int, times: Mapping[str, Latency], scale: float) -> EngineEntry:
    latency, bound = times[str(entry.degree)], times.get(_bound_of(entry.degree))
    figures = {"p50": round(latency.p50 * scale, 4), "p99": round(latency.p99 * scale, 4)}
    if bound is not None:
        figures["slice_bound"] = round(bound.p50 * scale, 4)
    if (rival := times.get(_rival_of(entry.degree))) is not None:
        figures["unquantized"] = round(rival.p50 * scale, 4)
    return replace(
        entry,
        latency_ms={**entry.latency_ms, str(batch): figures},
        pays={**entry.pays, str(batch): entry.degree == 0 or latency.p50 <= (1 - SAVES) * times["0"].p50},
        machine=this_machine(),
    )


def _times(
    entries: Sequence[EngineEntry], folder: Path, batch: int, rivals: Mapping[int, Engine]
) -> dict[str, Latency]:
    with ExitStack() as stack:
        runners = {}
        for entry in entries:
            settings = {"precision": entry.precision, "batch": batch}
            engine = open_engine(folder / entry.engine, entry.backend, **settings)
            runners[str(entry.degree)] = stack.enter_context(engine)
            if (rival := rivals.get(entry.degree)) is not None:
                opened = open_engine(rival.file, rival.backend, precision=rival.precision, batch=batch)
                runners[_rival_of(entry.degree)] = stack.enter_context(opened)
            if any(entry.schedule):
                # once it is open, its file is not needed any more
                with slice_bound(folder / entry.onnx) as graph, as_engine(graph, entry.backend, entry.build) as file:
                    bound = open_engine(file, entry.backend, **settings)
                runners[_bound_of(entry.degree)] = stack.enter_context(bound)
        return measure(runners, batch=batch, seconds=_SECONDS, min_rounds=_ROUNDS)


def _bound_of(degree: int) -> str:
    return f"slice bound of {degree}"


def _rival_of(degree: int) -> str:
    return f"unquantized {degree}"
