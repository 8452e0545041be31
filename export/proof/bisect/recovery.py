"""An engine in half precision or int8 that fails: which blocks, kept in float32, bring it back?

The block whose own part is wrong goes to float32, the engine is made anew and proven; and so on with what is wrong
then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import Quantization, quantized_model
from tocom.export.artifacts import Engine, OnnxGraph, Report
from tocom.export.engine.build import build
from tocom.export.engine.tensorrt.plan import PlanOptions
from tocom.export.graph.half_precision import HALF
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import Lowering
from tocom.export.graph.read_qdq import read_quantization
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.findings import Findings
from tocom.export.proof.reference import EXACT, in_format
from tocom.export.proof.validate import validate
from tocom.export.source.load import Source
from tocom.runtime.backends import BACKENDS
from tocom.vit import ReducedViT

Remake = Callable[[tuple[int, ...]], Report]
"""Blocks that stay float32 -> the report of an engine that is made so."""


@dataclass(frozen=True)
class Recovery:
    """What was tried.

    Attributes:
        blocks: Blocks kept in float32, in the order in which they were found.
        report: Of the engine with all of them; it passes where that helped. With no blocks: of the engine made anew,
            which passes where the listed file is what is wrong.
    """

    blocks: tuple[int, ...]
    report: Report


def recover(remake: Remake, blocks: int, notify: Callable[[str], None] = lambda _: None) -> Recovery:
    """Keeps one block after the other in float32, the first at fault each time, until the engine passes.

    Args:
        remake: Makes and proves an engine.
        blocks: How many may be kept: those of the network, or none where the format does not stand in the graph.
        notify: Told what is tried.
    """
    kept: tuple[int, ...] = ()
    notify("making the engine anew")
    report = remake(kept)
    while not report and len(kept) < blocks:
        block = _next(report.findings, kept)
        if block is None:
            break
        kept = (*kept, block)
        notify(f"with block{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))} in float32")
        report = remake(kept)
    return Recovery(kept, report)


def can_keep_blocks(engine: Engine) -> bool:
    """Whether the number formats of an engine stand in its graph, so that blocks of it can be kept in float32."""
    return engine.source.precision in (*HALF, *FORMATS)


def _next(found: Findings, kept: tuple[int, ...]) -> int | None:
    """The first block at fault that is not kept yet; where none is, the one whose parts are furthest off."""
    wrong: dict[int, float] = {}
    for index, block in found.blocks.items():
        if index not in kept and block.parts:
            wrong[index] = float(np.nan_to_num(max(block.parts.values()), nan=np.inf))
    first = [
        block
        for block in sorted(wrong)
        if not wrong[block] <= found.part_allowed
        or not max(found.blocks[block].middles.values(), default=0.0) <= found.middle_allowed
        or found.blocks[block].unexplained
    ]
    if first:
        return first[0]
    return max(wrong, key=wrong.__getitem__, default=None)


def remaker(source: Source, engine: Engine, plain: ReducedViT, batches: Callable[[], Any], folder: Path) -> Remake:
    """Makes the engine of a degree anew with blocks in float32, in a folder of its own.

    Args:
        source: What the family was made from.
        engine: The listed one.
        plain: The reference of the degree that is not quantized.
        batches: Makes the images to prove it on.
        folder: Where graphs and weights are put.
    """
    graph = engine.source
    exact = in_format(plain, EXACT)
    options = PlanOptions.from_json(engine.build["options"]) if engine.build else None
    lowering = Lowering(source.loaded.model, WeightStore(folder), source.reduction)
    schedule, fused = source.schedules[graph.source.degree], graph.source
    if graph.precision not in FORMATS:

        def typed_so(kept: tuple[int, ...]) -> Report:
            made = lowering.lower(schedule, fused, _name(kept), graph.precision, kept)
            own = build(made, backend=engine.backend, precision=engine.precision, plan=options)
            return validate(own, exact, batches())

        return typed_so
    whole = read_quantization(graph.file, plain.model, fused.weights, graph.precision)
    base = lowering.lower(schedule, fused, "plain.onnx")

    def quantized_so(kept: tuple[int, ...]) -> Report:
        left = [name for name in whole.weights if int(name.split(".")[1]) in kept]
        own = whole.without(left)
        made = _quantized(base, source, own, folder, engine.backend, kept)
        built = build(made, backend=engine.backend, precision=engine.precision, plan=options)
        network = ReducedViT(quantized_model(plain.model, own), plain.schedule, reduction=plain.reduction)
        return validate(built, in_format(network.eval(), EXACT), batches(), exact)

    return quantized_so


def _quantized(
    base: OnnxGraph, source: Source, own: Quantization, folder: Path, backend: str, kept: tuple[int, ...]
) -> OnnxGraph:
    if not own.weights:
        return base
    return quantized_graph(base, source.loaded.model, own, WeightStore(folder), _name(kept), BACKENDS[backend].qdq)


def _name(kept: tuple[int, ...]) -> str:
    return f"float-{'-'.join(map(str, kept)) or 'none'}.onnx"
