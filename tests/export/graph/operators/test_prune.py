"""The body of ai.tocom::TokenPrune, run by ONNX Runtime and by ONNX's own evaluator, against the loop over tokens."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tocom.export.graph.operators import DOMAIN, VERSION, operator_of
from tocom.reduction import PRUNE

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
operator = operator_of(PRUNE)


def graph_of(r: int, tokens: int, protected: int) -> onnx.ModelProto:
    """A graph of the one node; every dimension dynamic."""
    inputs = {"x": ["B", "N", "C"], "token_size": ["B", "N", 1], "attention": ["B", "N"]}
    outputs = {"pruned": ["B", "M", "C"], "pruned_size": ["B", "M", 1], "kept": ["B", "K", 1],
               "dropped": ["B", "D", 1]}  # fmt: skip
    attributes = {"r": r, "tokens": tokens, "protected": protected}
    node = helper.make_node(operator.name, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_pruning",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, FLOAT if "pruned" in name else INT64, shape)
            for name, shape in outputs.items()
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [operator.function_proto(attributes)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model


@cache
def session(r: int, tokens: int, protected: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = graph_of(r, tokens, protected).SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@cache
def evaluator(r: int, tokens: int, protected: int) -> ReferenceEvaluator:
    return ReferenceEvaluator(graph_of(r, tokens, protected))


def check(naive, attention: np.ndarray, r: int, protected: int, seed: int, runner=session) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((*attention.shape, 7), dtype=np.float32)
    token_size = random.integers(1, 30, (*attention.shape, 1)).astype(np.float32)
    feeds = {"x": x, "token_size": token_size, "attention": attention}
    tokens = attention.shape[1]
    pruned, sizes, kept, dropped = runner(r, tokens, protected).run(None, feeds)
    assert pruned.shape == (len(x), tokens - r, 7)
    assert kept.shape == (len(x), tokens - protected - r - 1, 1) and kept.dtype == dropped.dtype == np.int64
    for image, values in enumerate(attention.tolist()):
        decisions = naive.select(values, r, protected)
        assert [kept[image, :, 0].tolist(), dropped[image, :, 0].tolist()] == list(decisions)
        expected, expected_sizes = naive.prune(x[image], token_size[image, :, 0], values, decisions, protected)
        np.testing.assert_allclose(pruned[image], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(sizes[image, :, 0], expected_sizes)


# the last two of every list of (tokens behind the prefix, r) fuse all of them into one
SIZES = [(3, 1), (12, 1), (13, 6), (17, 5), (33, 16), (40, 13), (197, 16), (2, 1), (9, 8)]


@pytest.mark.parametrize("runner", [session, evaluator])
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_the_body_equals_the_loop_with_exact_ties_and_zeros(naive, tied_attention, protected, runner):
    for seed, (free, r) in enumerate(SIZES):
        attention = tied_attention(3, protected + free, seed=100 * protected + seed)
        check(naive, attention, r, protected, seed, runner)


@pytest.mark.parametrize("runner", [session, evaluator])
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_the_body_equals_the_loop_on_random_attention(naive, protected, runner):
    for seed, (free, r) in enumerate(SIZES):
        attention = np.random.default_rng(seed).random((2, protected + free), dtype=np.float32)
        check(naive, attention, r, protected, seed, runner)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1 / 15])
def test_everything_equally_attended_drops_the_last(naive, value):
    x = np.random.default_rng(0).standard_normal((1, 15, 4), dtype=np.float32)
    attention = np.full((1, 15), value, np.float32)
    feeds = {"x": x, "token_size": np.ones((1, 15, 1), np.float32), "attention": attention}
    pruned, sizes, kept, dropped = session(5, 15, 1).run(None, feeds)
    assert kept[..., 0].tolist() == [list(range(1, 9))] and dropped[..., 0].tolist() == [list(range(9, 15))]
    np.testing.assert_allclose(pruned[0, -1], x[0, 9:].mean(axis=0), rtol=1e-5, atol=1e-6)  # zeros, too: no NaN
    np.testing.assert_array_equal(pruned[0, :-1], x[0, :9])
    assert sizes[0, -1, 0] == 6


def test_the_body_uses_standard_operators_that_targets_accept():
    body = operator.function_proto({})
    assert {node.domain for node in body.node} == {""}
    assert not {node.op_type for node in body.node} & {"ScatterElements", "ScatterND", "NonZero", "Loop", "If"}
    assert list(body.output) == list(operator.outputs)
    assert set(body.attribute) == {"r", "tokens", "protected"}


def test_operator_names_are_the_documented_ones():
    assert (DOMAIN, operator.name, VERSION) == ("ai.tocom", "TokenPrune", 1)
    assert operator.outputs == ("pruned", "pruned_size", "kept", "dropped")
    assert operator.decision_names(3) == ("block.3.kept", "block.3.dropped")
