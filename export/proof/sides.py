"""The two sides of a comparison: what `tocom validate --candidate` and `--against` take, and what they open.

engines                 the family's engines, as listed
torch:fp64|fp32|bf16|fp16   the PyTorch reference in that number format
BACKEND:PRECISION       the family's graph in another engine library, as far as the graph allows it
DIR                     the engines of another family of the same checkpoint: with or without the compensator, quantized
or not, of any library
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx

from tocom.export.artifacts import Engine
from tocom.export.engine.build import graph_precision, needs_inlining, runs_natively
from tocom.export.graph.half_precision import HALF, typed
from tocom.export.graph.inline import inline
from tocom.export.proof.debug_copy import temporary_graph
from tocom.export.proof.observe import Observer, observer_of
from tocom.export.proof.reference import DTYPES, TorchObserver
from tocom.runtime.backends import BACKENDS, engine_module
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import MANIFEST
from tocom.vit import ReducedViT

ENGINES, REFERENCE = "engines", "torch:fp64"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        kind: See above.
        backend: Of kind "graph".
        precision: Of kinds "torch" and "graph".
        folder: Of kind "family".
    """

    kind: Literal["engines", "torch", "graph", "family"]
    backend: str = ""
    precision: str = ""
    folder: Path = Path()

    @classmethod
    def read(cls, text: str) -> Side:
        """Reads what the command takes.

        Raises:
            InputError: If it is none of the above.

        >>> Side.read("torch:bf16").precision
        'bf16'
        """
        if text == ENGINES:
            return cls("engines")
        name, colon, precision = text.partition(":")
        if name == "torch" and colon:
            if precision not in DTYPES:
                raise InputError(f"torch computes in {', '.join(DTYPES)}, got {one_line(precision)}.")
            return cls("torch", precision=precision)
        if name in BACKENDS:
            precision = precision or "fp32"
            known = BACKENDS[name].precisions
            if precision not in known:
                raise InputError(f"{name} computes in {', '.join(known)}, got {one_line(precision)}.")
            engine_module(name)  # refuses one that is not installed
            return cls("graph", backend=name, precision=precision)
        if (Path(text) / MANIFEST).is_file():
            return cls("family", folder=Path(text))
        libraries = ", ".join(BACKENDS)
        raise InputError(f"what is compared must be {ENGINES}, torch:FORMAT, BACKEND:PRECISION ({libraries}) or the "
                         f"folder of a family, got {one_line(text)}.")  # fmt: skip

    @property
    def is_exact(self) -> bool:
        """Whether it is the reference itself, in a format that others are compared with."""
        return self.kind == "torch" and self.precision in ("fp64", "fp32")


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
    graph = engine.source
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
                source=typed_graph,
                native=runs_natively(proto, side.backend),
                unrunnable="validated by its graph" if BACKENDS[side.backend].builds_plans else None,
            )
