"""What graphs become before OpenVINO compiles them: fewer passes, in bfloat16, and the same logits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import openvino
import pytest
from openvino import opset15

import tocom.runtime.engines.openvino_fusion
from tocom.runtime.engines.openvino_engine import _read
from tocom.runtime.engines.openvino_fusion import embed_patches_by_product, fuse, narrow
from tocom.runtime.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="the native operator is not built (make native)")

BF16, F32 = openvino.Type.bf16, openvino.Type.f32


def kinds(model):
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def logits(model, images, precision="f32"):
    model.reshape(list(images.shape))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return compiled({"pixel_values": images})["logits"]


@pytest.fixture
def model(exported):
    """Three blocks; tokens merge behind the first two."""
    return _read(exported("deit_distilled", 8).file)


def test_nothing_stands_between_products_but_native_operators(model):
    assert kinds(model)["MVN"] == 7 and kinds(model)["AddLayerNorm"] == 0
    merges = fuse(model, half=False)
    found = kinds(model)
    assert [merge.names[0] for merge in merges] == ["block.0.src", "block.1.src"]
    assert (found["TokenMerge"], found["AddLayerNorm"], found["MVN"], found["Log"]) == (2, 4, 1, 0)
    assert found["Convolution"] == 0
    fused = [node for node in model.get_ordered_ops() if node.get_type_name() == "TokenMerge"]
    assert all(node.get_input_size() == 6 and len(node.get_input_partial_shape(2)) == 4 for node in fused)


def test_a_fused_graph_gives_the_logits_of_the_graph_it_was(exported, noise, monkeypatch):
    fused = _read(exported("deit_distilled", 8).file)
    fuse(fused, half=False)
    images = noise(3, 64, 64)
    np.testing.assert_allclose(
        logits(fused, images), logits(_read(exported("deit_distilled", 8).file), images), atol=2e-5
    )
    monkeypatch.setattr(tocom.runtime.engines.openvino_fusion, "library", lambda: None)
    alone = _read(exported("deit_distilled", 0).file)
    assert fuse(alone, half=False) == [] and kinds(alone)["AddLayerNorm"] == 0


def test_a_narrow_graph_computes_in_bfloat16_without_conversions_in_between(model, noise):
    images = noise(3, 64, 64)
    wide = logits(model.clone(), images)
    fuse(model, half=True)
    native = [node for node in model.get_ordered_ops() if node.get_type_name() in ("TokenMerge", "AddLayerNorm")]
    assert {node.get_input_element_type(0) for node in native} == {BF16}
    assert all(node.get_input_element_type(1) == F32 for node in native if node.get_type_name() == "TokenMerge")
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert":  # of what enters, of weights, and of what leaves
            source, readers = node.input_value(0).get_node(), node.output(0).get_target_inputs()
            assert source.get_type_name() in ("Constant", "Parameter") or {
                port.get_node().get_type_name() for port in readers
            } == {"Result"}
    (result,) = model.outputs
    assert result.get_element_type() == F32 and result.get_names() == {"logits"}
    np.testing.assert_allclose(logits(model, images, "bf16"), wide, atol=0.1)


def test_an_operator_that_is_not_known_leaves_a_graph_in_float32():
    x = opset15.parameter([1, 4], openvino.Type.f32)
    strange = openvino.Model([opset15.cum_sum(opset15.multiply(x, np.float32(2)), 1)], [x])
    narrow(strange)
    assert kinds(strange)["Convert"] == 0


@pytest.mark.parametrize(
    ("stride", "padding", "expected"), [((8, 4), (0, 0), 0), ((4, 4), (0, 0), 1), ((8, 4), (4, 2), 1)]
)
def test_patches_that_do_not_overlap_are_embedded_by_a_product(stride, padding, expected):
    random = np.random.default_rng(0)
    x = opset15.parameter([2, 3, 16, 16], openvino.Type.f32)
    weight = random.standard_normal((5, 3, 8, 4), dtype=np.float32)
    bias = opset15.reshape(random.standard_normal(5, dtype=np.float32), np.array([1, 5, 1, 1]), special_zero=False)
    features = opset15.add(opset15.convolution(x, weight, stride, padding, padding, [1, 1]), bias)
    flat = opset15.reshape(features, np.array([2, 5, -1]), special_zero=False)
    model = openvino.Model([opset15.transpose(flat, np.array([0, 2, 1]))], [x])
    images = random.standard_normal((2, 3, 16, 16), dtype=np.float32)
    core = openvino.Core()
    before = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    embed_patches_by_product(model)
    model.validate_nodes_and_infer_types()
    assert kinds(model)["Convolution"] == expected
    after = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    np.testing.assert_allclose(after, before, atol=2e-5)


def test_dropping_tokens_unseen_is_part_of_the_pass_too():
    """As the slice bound does: adding, dropping the last tokens, and the norm."""
    random = np.random.default_rng(0)
    x, y = opset15.parameter([2, 6, 32], F32), opset15.parameter([2, 6, 32], F32)
    kept = opset15.slice(opset15.add(x, y), np.array([0]), np.array([-2]), np.array([1]), np.array([1]))
    normed = opset15.mvn(kept, np.array([-1]), True, 1e-6, "INSIDE_SQRT")
    weight, bias = random.standard_normal((2, 32), dtype=np.float32)
    out = opset15.add(opset15.multiply(normed, weight), bias)
    model = openvino.Model([kept.output(0), out.output(0)], [x, y])
    feeds = [random.standard_normal((2, 6, 32), dtype=np.float32) for _ in range(2)]
    core = openvino.Core()
    before = [*core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds).values()]
    fuse(model, half=False)
    assert (kinds(model)["AddLayerNorm"], kinds(model)["Slice"], kinds(model)["MVN"]) == (1, 0, 0)
    after = [*core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds).values()]
    for one, other in zip(after, before, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
