"""Typed graphs: what is half and what stays float32, validated against the float32 reference with every rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tocom.export.graph.emulate_half import emulate_half
from tocom.export.graph.half_precision import HALF, precision_of, typed
from tocom.export.graph.inline import inline
from tocom.export.graph.lower import reference_model
from tocom.export.proof.gates import margin_allowed
from tocom.export.proof.validate import validate
from tocom.reduction import MERGE, PRUNE
from tocom.vit import schedule_for

TYPES = {name: int(dtype) for name, dtype in HALF.items()}
FAMILIES = ["deit_tiny", "deit_distilled", "reg4_dinov2", "map", "deit3", "augreg_384", "gap", "reg1_gap", "clip",
            "normed", "gated", "avgmax_with_class", "hybrid", "reg4_dinov2_swiglu"]  # fmt: skip
BY_DEFAULT = [("deit_tiny", "fp16"), ("map", "bf16")]  # by default


@pytest.fixture
def validated(exported, make_vit, fused_of, photographs, noise, tmp_path):
    """The report on the typed graph of a family, carried out with every rounding in it."""

    def report(family, degree, precision, reduction=MERGE, alter=lambda proto: None):
        engine, model = exported(family, degree, reduction), make_vit(family)
        proto = typed(onnx.load(engine.file, load_external_data=False), precision)
        alter(proto)
        file = tmp_path / "typed.onnx"
        for name in engine.files:
            if name != engine.file.name:
                shutil.copy(engine.file.with_name(name), tmp_path)
        file.write_bytes(proto.SerializeToString())
        graph = replace(engine.graph, file=file, precision=precision_of(proto))
        stand_in = replace(engine, precision=precision_of(proto), graph=graph, unrunnable="it is a graph")
        size = model.patch_embed.img_size
        reference = reference_model(model, schedule_for(model, degree), fused_of(model, degree), reduction)
        return validate(stand_in, reference, iter([photographs(*size), noise(3, *size)]))

    return report


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(family, precision, marks=() if (family, precision) in BY_DEFAULT else pytest.mark.full)
        for family in FAMILIES
        for precision in HALF
    ],
)
def test_decisions_flip_only_where_rounding_allows_it(validated, family, precision):
    report = validated(family, 8, precision)
    assert report, report.findings
    found = report.findings
    assert found.precision == precision and found.run is None
    assert 0.9 < found.agreement <= 1 and found.largest_margin < margin_allowed(precision, "merge")
    assert found.max_logit_error > 1e-5  # it is not float32 that was computed
    for block in found.blocks.values():
        assert 0 < block.output_error < (4e-3 if precision == "fp16" else 3e-2)
        assert block.unexplained == 0


@pytest.mark.parametrize("precision", HALF)
def test_pruning_too(validated, precision):
    report = validated("deit_tiny", 8, precision, PRUNE)
    assert report, report.findings
    assert report.findings.largest_margin < margin_allowed(precision, "prune")


def test_what_is_computed_wrong_still_fails(validated):
    def forget_sizes(proto):
        """The logarithm of sizes is not added to attention."""
        (log, *_) = [node for node in proto.graph.node if node.op_type == "Log"]
        log.op_type = "Neg"

    report = validated("deit_tiny", 8, "bf16", alter=forget_sizes)
    assert not report


@pytest.mark.full
def test_typed_graphs_are_valid_and_keep_the_signal_wide(case, exported):
    """Strict type inference accepts them; scores and sizes are float32, products and softmax half."""
    family, degree, _ = case
    precision = ("fp16", "bf16")[(len(family) + degree) % 2]
    plain = onnx.load(exported(*case).file, load_external_data=False)
    proto = typed(plain, precision)
    assert precision_of(plain) == "fp32" and precision_of(proto) == precision
    flat = shape_inference.infer_shapes(inline(proto), strict_mode=True, check_type=True)
    values = (*flat.graph.value_info, *flat.graph.output, *flat.graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {each.name: each.data_type for each in flat.graph.initializer}
    half = TYPES[precision]
    assert types["pixel_values"] == types["logits"] == TensorProto.FLOAT
    moving = {"pixel_values"}
    for node in flat.graph.node:
        if not moving & set(node.input):
            continue  # made of weights alone
        moving.update(node.output)
        if node.op_type in ("Conv", "Gemm"):
            assert types[node.output[0]] == half
        if node.op_type in ("TopK", "LpNormalization", "Log"):
            assert types[node.input[0]] in (TensorProto.FLOAT, TensorProto.INT64)
    softmax = [types[node.output[0]] for node in flat.graph.node if node.op_type == "Softmax"]
    assert softmax.count(half) >= len(softmax) // 2  # pruning's own row of attention is float32
    assert any(node.op_type == "MatMul" and types[node.output[0]] == half for node in flat.graph.node)


def test_typed_graphs_of_every_kind(kind, exported):
    test_typed_graphs_are_valid_and_keep_the_signal_wide(kind, exported)


@pytest.mark.parametrize(("precision", "torch_type"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_roundings_are_those_of_the_format(precision, torch_type, tmp_path):
    """Against torch, which rounds by itself: products accumulate in float32 and are rounded once."""
    weight = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    half = TYPES[precision]
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=half),
        helper.make_node("Cast", ["w"], ["weight"], to=half),
        helper.make_node("MatMul", ["narrow", "weight"], ["product"]),
        helper.make_node("Mul", ["product", "product"], ["square"]),
        helper.make_node("Cast", ["square"], ["y"], to=TensorProto.FLOAT),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
             (("x", ["batch", 5]), ("y", ["batch", 4]))]  # fmt: skip
    graph = helper.make_graph(nodes, "small", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    proto = emulate_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10))
    x = np.random.default_rng(1).standard_normal((7, 5), dtype=np.float32)
    (y,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})

    def narrow(values):
        return values.to(torch_type).float()

    product = narrow(narrow(torch.from_numpy(x)) @ narrow(torch.from_numpy(weight)))
    expected = narrow(product * product)
    spacing = torch.finfo(torch_type).eps
    assert ((torch.from_numpy(y) - expected).abs() <= spacing * expected.abs()).all()  # a sum may round the other way
    assert (torch.from_numpy(y) == expected).float().mean() > 0.9
    assert not torch.equal(expected, (torch.from_numpy(x) @ torch.from_numpy(weight)) ** 2)


def test_onnx_runtime_itself_runs_float16(exported, make_vit, noise):
    """Its own roundings are fewer than the graph's, so it must be at least about as close."""
    engine = exported("deit_tiny", 0)
    proto = typed(onnx.load(engine.file, load_external_data=False), "fp16")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.file.parent))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    images = noise(2, 64, 64)
    (logits,) = session.run(None, {"pixel_values": images})
    expected = make_vit("deit_tiny")(torch.from_numpy(images)).numpy()
    assert 0 < np.abs(logits - expected).max() <= 5e-3 * max(1, np.abs(expected).max())
