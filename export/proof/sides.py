"""The two sides of a comparison, opened; `tocom.export.proof.side` has the words for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx

from tocom.export.artifacts import Engine
from tocom.export.engine.build import graph_precision, needs_inlining, runs_natively
from tocom.export.graph.half_precision import HALF, typed
from tocom.export.graph.inline import inline
from tocom.export.proof.debug_copy import temporary_graph
from tocom.export.proof.observe import Observer, observer_of
from tocom.export.proof.reference import TorchObserver
from tocom.export.proof.side import Side
from tocom.runtime.backends import BACKENDS
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT


@contextmanager
def open_side(side: Side, engine: Engine, reference: ReducedViT, batch: int | None) -> Iterator[Observer]:
    """Opens a side.

    Args:
        side: The candidate, or what it is compared with.
        engine: The listed engine of the degree; where the side is another family, that family's.
        reference: Of the same degree and family.
        batch: See `observer_of`.

    Raises:
        InputError: If a library does not run the graph.
    """
    if side.kind == "torch":
        yield TorchObserver(reference, side.precision)
    else:
        with engine_of(side, engine) as side_engine, observer_of(side_engine, reference, batch=batch) as observer:
            yield observer


@contextmanager
def engine_of(side: Side, engine: Engine) -> Iterator[Engine]:
    """The engine of a side: the listed one, or its graph in another library or number format.

    A float32 graph is typed anew where the library takes half precision from the graph. No plan is built: the graph
    runs on ONNX Runtime, half precision emulated.

    Args:
        side: One that is not torch.
        engine: The listed one.

    Raises:
        InputError: If the library would need another graph.
    """
    if side.kind != "graph":
        yield engine
        return
    graph = engine.graph
    needed = graph_precision(side.backend, side.precision)
    proto = onnx.load(graph.file, load_external_data=False)
    if needed in HALF and graph.precision == "fp32":
        proto = typed(proto, needed)
    elif needed != graph.precision:
        raise InputError(
            f"{side.backend} takes {side.precision} from a graph in {needed}, and this family's is in "
            f"{graph.precision}: compile one for {side.backend} {side.precision} and name its folder."
        )
    with temporary_graph(graph.file, proto) as typed_file:
        typed_graph = replace(graph, file=typed_file, precision=needed)
        variant = inline(proto) if needs_inlining(proto, side.backend) else proto
        with temporary_graph(graph.file, variant) as file:
            yield Engine(
                file=file,
                backend=side.backend,
                precision=side.precision,
                files=graph.files,
                graph=typed_graph,
                native=runs_natively(proto, side.backend),
                unrunnable="validated by its graph" if BACKENDS[side.backend].builds_plans else None,
            )
