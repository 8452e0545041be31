"""Numerical equivalence: families x reductions x degrees x engines x number formats, against the float64 reference.

By default every family, every engine and format in several of them, both reductions and every degree, on graphs that
other tests export too; `make test-full` runs the whole product.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from tests.conftest import DEGREES, FAMILIES, LIKE_OTHERS, _export_grid
from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.calib.quantize.network import quantized_model
from tocom.export.artifacts import Engine
from tocom.export.engine.build import build, graph_precision
from tocom.export.graph.half_precision import HALF, precision_of, typed
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.gates import GATES, gates_row
from tocom.export.proof.reference import in_format
from tocom.export.proof.validate import validate
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.backends import BACKENDS, available
from tocom.vit import ReducedViT, schedule_for

CARRIED_OUT = "carried-out"  # a typed graph, computed in float32 with every rounding that stands in it
FORMATS = [
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "bf16"),
    ("onnxruntime", "fp16"),
    ("openvino", "int8"),
    *((CARRIED_OUT, precision) for precision in HALF),
]
GRID = _export_grid()
PER_DEPTH = 8  # unit roundoffs that the logits of the image in the middle may be off in float32, times the depth


def by_default() -> set[tuple[object, tuple[str, str]]]:
    """Formats in turn over the cases that are exported by default; the first of every second family in two of them."""
    cases = [each.values[0] for each in GRID if not each.marks]
    chosen = {(case, FORMATS[index % len(FORMATS)]) for index, case in enumerate(cases)}
    return chosen | {(case, FORMATS[(index + 3) % len(FORMATS)]) for index, case in enumerate(cases) if index % 3 == 0}


DEFAULT = by_default()
MATRIX = [
    pytest.param(
        *case, *form, id="-".join((param.id, *form)), marks=() if (case, form) in DEFAULT else pytest.mark.full
    )
    for param in GRID
    for case in param.values
    for form in FORMATS
]


def usable(backend: str, precision: str) -> str | None:
    """Why a format cannot be run here; None where it can."""
    if backend == CARRIED_OUT:
        return None
    (status,) = [each for each in available() if each.name == backend]
    if not status.usable:
        return f"{backend}: {status.detail}"
    return f"{backend}: {status.detail}" if precision == "bf16" and "no bf16" in status.detail else None


@pytest.fixture
def images(noise, photographs):
    def of(model) -> Iterator[np.ndarray]:
        size = model.patch_embed.img_size
        yield noise(1, *size)
        yield photographs(*size)
        yield noise(3, *size, seed=1)

    return of


@pytest.fixture
def typed_engine(tmp_path):
    """A copy of an engine whose graph is typed: to be built, or to be carried out where there is no backend."""

    def make(engine: Engine, precision: str, backend: str) -> Engine:
        for name in engine.files:
            if name != engine.file.name:
                shutil.copy(engine.file.with_name(name), tmp_path)
        proto = typed(onnx.load(engine.file, load_external_data=False), precision)
        file = tmp_path / "typed.onnx"
        file.write_bytes(proto.SerializeToString())
        graph = replace(engine.source, file=file, precision=precision_of(proto))
        if backend != CARRIED_OUT:
            return build(graph, backend=backend, precision=precision)
        return replace(engine, precision=graph.precision, source=graph, unrunnable="it is carried out")

    return make


@pytest.fixture
def made(exported, make_vit, fused_of, noise, tmp_path, typed_engine):
    """The engine of a cell of the matrix, its reference, and that before quantization, if any."""

    def make(family, degree, reduction, backend, precision):
        engine, model = exported(family, degree, reduction), make_vit(family)
        schedule = schedule_for(model, degree)
        reference = reference_model(model, schedule, fused_of(model, degree), reduction)
        if precision == "int8":
            pixels = torch.from_numpy(noise(8, *model.patch_embed.img_size, seed=2))
            quantization = calibrate([reference], pixels, Method()).quantization(model)
            graph = quantized_graph(
                engine.source, model, quantization, WeightStore(tmp_path), "int8.onnx", BACKENDS[backend].qdq
            )
            quantized = ReducedViT(quantized_model(model, quantization), schedule, reduction=reduction)
            return build(graph, backend=backend, precision=precision), quantized, reference
        if backend == CARRIED_OUT or graph_precision(backend, precision) != "fp32":
            return typed_engine(engine, precision, backend), reference, None
        if backend != engine.backend:
            engine = build(engine.source, backend=backend, precision=precision)
        return engine, reference, None

    return make


@pytest.mark.parametrize(("family", "degree", "reduction", "backend", "precision"), MATRIX)
def test_the_engine_equals_the_reference(family, degree, reduction, backend, precision, made, images):
    if (why := usable(backend, precision)) is not None:
        pytest.skip(why)
    engine, reference, plain = made(family, degree, reduction, backend, precision)
    report = validate(engine, in_format(reference, "fp64"), images(reference.model), plain)
    found = report.findings
    assert found.precision == gates_row(engine.backend, precision) and found.images == 9
    assert report, "\n".join(found.faults)
    assert found.unexplained == 0
    if precision == "fp32":
        depth = len(reference.model.blocks)
        assert found.typical_logit_error <= PER_DEPTH * depth * GATES["fp32"].unit_roundoff


def test_the_default_selection_covers_every_kind():
    assert {case[0] for case, _ in DEFAULT} == set(FAMILIES) - set(LIKE_OTHERS)
    assert {case[1] for case, _ in DEFAULT} == set(DEGREES)
    assert {case[2] for case, _ in DEFAULT} == {MERGE, PRUNE}
    for form in FORMATS:
        assert len({case[0] for case, each in DEFAULT if each == form}) >= 3, form
