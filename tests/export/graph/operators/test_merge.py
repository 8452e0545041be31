"""The body of ai.tocom::TokenMerge, run by ONNX Runtime, against the loop over tokens."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tocom.export.graph.operators import DOMAIN, VERSION, operator_of
from tocom.reduction import MERGE

FLOAT = TensorProto.FLOAT
operator = operator_of(MERGE)


@cache
def session(**attributes: int) -> onnxruntime.InferenceSession:
    """A graph of the one node; every dimension dynamic."""
    node = helper.make_node(
        operator.name, ["x", "token_size", "metric"], list(operator.outputs), domain=DOMAIN, **attributes
    )
    inputs = [
        helper.make_tensor_value_info(name, FLOAT, ["B", "N", size])
        for name, size in (("x", "C"), ("token_size", 1), ("metric", "D"))
    ]
    shapes = {"merged": ["B", "M", "C"], "merged_size": ["B", "M", 1], "src": ["B", "R", 1], "dst": ["B", "R", 1]}
    outputs = [
        helper.make_tensor_value_info(
            name, FLOAT if "merged" in name else TensorProto.INT64, shapes.get(name, ["B", "U", 1])
        )
        for name in operator.outputs
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    graph = helper.make_graph([node], "one_merge", inputs, outputs)
    functions = [operator.function_proto(attributes)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(naive, metric: np.ndarray, r: int, protected: int, keep_order: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((*metric.shape[:2], 7), dtype=np.float32)
    token_size = random.integers(1, 30, (*metric.shape[:2], 1)).astype(np.float32)
    feeds = {"x": x, "token_size": token_size, "metric": metric}
    attributes = {"r": r, "tokens": metric.shape[1], "protected": protected, "keep_order": int(keep_order)}
    merged, sizes, *decided = session(**attributes).run(list(operator.outputs), feeds)
    for image in range(len(metric)):
        decisions = naive.match(metric[image].tolist(), r, protected, keep_order)
        assert [each[image, :, 0].tolist() for each in decided] == list(decisions)
        expected, expected_sizes = naive.merge(x[image], token_size[image, :, 0], decisions, protected)
        np.testing.assert_allclose(merged[image], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(sizes[image, :, 0], expected_sizes)


@pytest.mark.parametrize("keep_order", [True, False])
@pytest.mark.parametrize("protected", range(6))
def test_the_body_equals_the_loop_with_exact_ties_and_zero_vectors(naive, tied_metric, protected, keep_order):
    for seed, (free, r) in enumerate([(2, 1), (3, 1), (12, 1), (13, 6), (16, 8), (17, 5), (33, 16), (40, 13)]):
        metric = tied_metric(3, protected + free, seed=100 * protected + seed)
        check(naive, metric, r, protected, keep_order, seed)


@pytest.mark.parametrize("keep_order", [True, False])
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_the_body_equals_the_loop_on_random_metrics(naive, protected, keep_order):
    for seed, (free, r) in enumerate([(6, 3), (25, 12), (64, 16), (65, 1)]):
        metric = np.random.default_rng(seed).standard_normal((2, protected + free, 8), dtype=np.float32)
        check(naive, metric, r, protected, keep_order, seed)


def test_everything_equally_similar_merges_in_position_order_into_the_first(naive):
    metric = np.ones((1, 15, 4), np.float32)
    check(naive, metric, 5, 1, True, seed=0)
    check(naive, np.zeros_like(metric), 5, 2, False, seed=0)


@pytest.mark.parametrize("keep_order", [0, 1])
def test_the_body_uses_standard_operators_that_targets_accept(keep_order):
    body = operator.function_proto({"keep_order": keep_order})
    assert {node.domain for node in body.node} == {""}
    assert not {node.op_type for node in body.node} & {"ScatterElements", "ScatterND", "NonZero", "Loop", "If"}
    assert list(body.output) == list(operator.outputs)
    assert set(body.attribute) == {"r", "tokens", "protected", "keep_order"}
    assert sum(node.op_type == "TopK" for node in body.node) == 1 + keep_order  # no second sort where none is needed


def test_operator_names_are_the_documented_ones():
    assert (DOMAIN, operator.name, VERSION) == ("ai.tocom", "TokenMerge", 1)
    assert operator.decisions == ("src", "dst", "unm")
    assert operator.decision_names(3) == ("block.3.src", "block.3.dst", "block.3.unm")
