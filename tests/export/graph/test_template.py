"""Graphs made from another degree's graph: the same as traced ones, and traced where that is not sure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tocom.export.graph.lower
from tocom.export.artifacts import FusedCheckpoint
from tocom.export.graph.fuse import fuse
from tocom.export.graph.lower import Lowering, lower
from tocom.export.graph.weight_store import WeightStore
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.engines.base import open_engine
from tocom.vit import schedule_for


@pytest.fixture
def traces(monkeypatch) -> list[int]:
    """Grows by the first block's r whenever a degree is traced."""
    seen, trace = [], tocom.export.graph.lower.trace

    def counted(reference, steps):
        seen.append(reference.schedule.removed[0])
        return trace(reference, steps)

    monkeypatch.setattr(tocom.export.graph.lower, "trace", counted)
    return seen


def shapes_of(graph: onnx.ModelProto) -> list[tuple[str, list]]:
    """Of all values in the order in which they are computed; the exporter's own names of them may differ."""
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in graph.graph.value_info
    }
    return [(node.op_type, shapes[name]) for node in graph.graph.node for name in node.output if name in shapes]


def check_alike(made: Path, traced: Path, images: np.ndarray) -> None:
    """Same nodes, shapes and values; the counts in reshapes may be given otherwise."""
    one, other = (onnx.load(file, load_external_data=False) for file in (made, traced))
    onnx.checker.check_model(made, full_check=True)
    assert [(node.op_type, node.name if node.domain else "", len(node.input)) for node in one.graph.node] == [
        (node.op_type, node.name if node.domain else "", len(node.input)) for node in other.graph.node
    ]
    assert shapes_of(one) == shapes_of(other) and len(one.graph.value_info) > 50
    with open_engine(made, "onnxruntime") as first, open_engine(traced, "onnxruntime") as second:
        assert np.array_equal(first.infer(images), second.infer(images))


@pytest.mark.parametrize(
    ("family", "reduction", "degrees", "expected"),
    [
        pytest.param(
            "deit_tiny", MERGE, (1, 5, 0, 3), [1, 5], marks=pytest.mark.full
        ),  # 1 leaves 64 tokens, and other things are 64 too
        ("reg4_dinov2", PRUNE, (9, 13), [9]),
        pytest.param("clip", MERGE, (5, 9), [5], marks=pytest.mark.full),
    ],
)
def test_a_degree_made_from_another_is_as_if_traced(
    tmp_path, make_vit, fused_of, noise, traces, family, reduction, degrees, expected
):
    model = make_vit(family)
    lowering = Lowering(model, WeightStore(tmp_path), reduction)
    made = {}
    for degree in degrees:
        planned = schedule_for(model, degree)
        made[degree] = lowering.lower(planned, fused_of(model, degree), f"{degree}.onnx")
    assert traces == expected
    for degree, graph in made.items():
        if degree in expected:
            continue
        planned = schedule_for(model, degree)
        alone = lower(model, planned, fused_of(model, degree), WeightStore(tmp_path), "alone.onnx", reduction)
        assert (graph.tokens, graph.gmacs) == (alone.tokens, alone.gmacs)
        assert set(graph.files) - {f"{degree}.onnx"} == set(alone.files) - {"alone.onnx"}
        check_alike(graph.file, alone.file, noise(3, *model.patch_embed.img_size))


def test_a_compensated_degree_has_gates_of_its_own(tmp_path, make_vit, make_compensator, noise, traces):
    model, compensator = make_vit("deit3"), make_compensator(48, 2)

    def fused_at(degree: int) -> FusedCheckpoint:
        compensation = compensator.between(3, degree)
        weights = fuse(model.state_dict(), compensation)
        return FusedCheckpoint(weights, "tiny", degree, 3, 0.1, "a" * 64, "b" * 64, compensation)

    lowering = Lowering(model, WeightStore(tmp_path))
    for degree in (5, 7, 3, 9):  # at 3 nothing is compensated
        made = lowering.lower(schedule_for(model, degree), fused_at(degree), f"{degree}.onnx")
    assert traces == [5]
    plain = lower(model, schedule_for(model, 3), fused_at(3), WeightStore(tmp_path), "plain.onnx")
    check_alike(tmp_path / "3.onnx", plain.file, noise(2, 64, 64))
    alone = lower(model, schedule_for(model, 9), fused_at(9), WeightStore(tmp_path), "alone.onnx")
    check_alike(made.file, alone.file, noise(2, 64, 64))
    gates = [
        sorted(numpy_helper.to_array(each).tolist() for each in onnx.load(tmp_path / f"{degree}.onnx").graph.initializer
               if each.name.endswith(".gate"))
        for degree in (5, 7, 9)
    ]  # fmt: skip
    assert len(gates[0]) == 2 and gates[0] != gates[1] != gates[2]


def test_weights_of_ones_own_are_traced(tmp_path, make_vit, fused_of, traces):
    """What was folded into the weights by somebody else is no other degree's."""
    model, other = make_vit("deit3"), make_vit("deit3")
    other.blocks[0].attn.qkv.weight.data *= 2
    lowering = Lowering(model, WeightStore(tmp_path))
    for degree, source in ((5, model), (6, other)):
        lowering.lower(schedule_for(model, degree), fused_of(source, degree), f"{degree}.onnx")
    assert traces == [5, 6]
