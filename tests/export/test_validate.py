"""The gates of export.validate: the right passes, the wrong fails, a matter of rounding is explained."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import export.validate
from export.build import build
from export.lower import reference_model
from export.validate import MARGIN, Findings, decision_margin, decisions_of, default_images, replay, validate
from runtime.engines import open_engine
from runtime.errors import InputError
from tocom.merging import Matching
from tocom.vit import schedule_for

FAMILY, DEGREE = "deit_tiny", 8


@pytest.fixture
def engine(exported):
    return exported(FAMILY, DEGREE)


@pytest.fixture
def reference(make_vit, fused_of):
    model = make_vit(FAMILY)
    return reference_model(model, schedule_for(model, DEGREE), fused_of(model, DEGREE))


@pytest.fixture
def tampered(engine, tmp_path, engine_at):
    """The engine with its graph altered by a function."""

    def tamper(alter):
        shutil.copytree(engine.file.parent, tmp_path / "tampered")
        file = tmp_path / "tampered" / engine.file.name
        graph = onnx.load(file, load_external_data=False)
        alter(graph)
        file.write_bytes(graph.SerializeToString())
        return engine_at(engine, file)

    return tamper


def images():
    return default_images((3, 64, 64))


def scale_logits(factor):
    def alter(graph):
        producer = next(node for node in graph.graph.node if "logits" in node.output)
        producer.output[list(producer.output).index("logits")] = "unscaled"
        graph.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
        graph.graph.node.append(helper.make_node("Mul", ["unscaled", "factor"], ["logits"]))

    return alter


def body(graph, op_type, position=0):
    function = next(function for function in graph.functions if function.name == "TokenMerge")
    return [node for node in function.node if node.op_type == op_type][position]


def set_attribute(name, value, op_type, position=0):
    def alter(graph):
        next(each for each in body(graph, op_type, position).attribute if each.name == name).i = value

    return alter


def worst_destination(graph):
    body(graph, "ArgMax").op_type = "ArgMin"


def scrambled_ranking(graph):
    function = next(function for function in graph.functions if function.name == "TokenMerge")
    ranking = body(graph, "TopK")
    index = list(function.node).index(ranking)
    scores = ranking.input[0]
    ranking.input[0] = "scrambled"
    function.node.insert(index, helper.make_node("Sin", ["stretched"], ["scrambled"]))
    function.node.insert(index, helper.make_node("Mul", [scores, "stretch"], ["stretched"]))
    function.node.insert(index, helper.make_node("Constant", [], ["stretch"], value_float=1e4))


def unweighted_mean(graph):
    """Takes the sizes out of the sum, but not out of what it is divided by."""
    product = next(
        node for node in graph.functions[0].node if node.op_type == "Mul" and any("src_size" in i for i in node.input)
    )
    moved = next(i for i in product.input if "src_size" not in i)
    product.op_type = "Identity"
    del product.input[:]
    product.input.append(moved)


def test_the_good_engine_passes(engine, reference):
    report = validate(engine, reference, images())
    assert report
    found = report.findings
    assert found["passed"] is True
    assert (found["images"], found["decisions"], found["unexplained"]) == (12, 12 * 4 * DEGREE, 0)
    assert found["agreement"] > 0.99
    assert found["max_logit_error"] < 1e-4
    assert found["top1_agreement"] == 1


def test_the_same_graph_untouched_passes(tampered, reference):
    assert validate(tampered(scale_logits(1.0)), reference, images())


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0, 0.0])
def test_scaled_logits_fail(tampered, reference, factor):
    report = validate(tampered(scale_logits(factor)), reference, images())
    assert not report
    assert report.findings["max_logit_error"] > 1e-3
    assert report.findings["unexplained"] == 0


@pytest.mark.parametrize(
    "alter",
    [worst_destination, scrambled_ranking, set_attribute("largest", 0, "TopK")],
    ids=["worst destination", "random tokens", "least similar tokens"],
)
def test_wrong_decisions_fail_although_the_logits_follow_from_them(tampered, reference, alter):
    report = validate(tampered(alter), reference, images())
    assert not report
    assert report.findings["agreement"] < 0.6
    assert report.findings["unexplained"] > 0
    assert report.findings["largest_margin"] > 1e-3
    assert report.findings["max_logit_error"] <= 1e-4
    assert report.findings["blocks_with_unexplained"] == [0, 1, 2, 3]


def test_a_wrong_order_of_the_tokens_that_stay_fails(tampered, reference):
    report = validate(tampered(set_attribute("largest", 1, "TopK", 1)), reference, images())
    assert not report
    assert report.findings["agreement"] > 0.99
    assert report.findings["largest_margin"] == float("inf")


def test_a_wrong_mean_fails_although_the_first_decisions_are_right(tampered, reference):
    report = validate(tampered(unweighted_mean), reference, images())
    assert not report
    assert report.findings["max_logit_error"] > 1e-3


def test_another_choice_among_exact_ties_is_explained(tampered, reference):
    """Flat images are all ties: preferring the last of them instead of the first is no error."""
    flat = [np.full((2, 3, 64, 64), value, np.float32) for value in (0.0, 0.5)]
    model = reference.model
    model.pos_embed.data[:] = 0
    graph = tampered(set_attribute("select_last_index", 1, "ArgMax"))
    loaded = onnx.load(graph.file)
    for tensor in loaded.graph.initializer:
        if tensor.name == "pos_embed":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), "pos_embed"))
    onnx.save(loaded, graph.file)
    report = validate(graph, reference, iter(flat))
    assert report, report.findings
    assert report.findings["agreement"] < 0.5
    assert report.findings["explained"] > 0
    assert report.findings["largest_margin"] < MARGIN


def test_decisions_that_are_none_fail_instead_of_crashing(tampered, reference):
    def beyond_the_last_token(graph):
        for node in graph.functions[0].node:
            if list(node.output) == ["dst"]:
                node.output[0] = "true_dst"
        graph.functions[0].node.append(helper.make_node("Constant", [], ["far"], value_ints=[1000]))
        graph.functions[0].node.append(helper.make_node("Add", ["true_dst", "far"], ["dst"]))

    report = validate(tampered(beyond_the_last_token), reference, images())
    assert not report
    assert report.findings["largest_margin"] == float("inf")


class Altered:
    """A runner whose answers are altered on the way."""

    def __init__(self, runner, alter):
        self.runner, self.alter = runner, alter

    def infer(self, pixel_values):
        return self.alter(self.runner.infer(pixel_values))

    def infer_all(self, pixel_values):
        outputs = self.runner.infer_all(pixel_values)
        return outputs | {"logits": self.alter(outputs["logits"])}


@pytest.mark.parametrize(
    "alter", [lambda x: x * np.float32(1.01), lambda x: x * np.float32(np.nan)], ids=["scaled", "NaN"]
)
def test_a_debug_copy_that_computes_something_else_fails(engine, reference, monkeypatch, alter):
    true_copy = export.validate.debug_copy

    @contextmanager
    def altered_copy(engine):
        with true_copy(engine) as runner:
            yield Altered(runner, alter)

    monkeypatch.setattr(export.validate, "debug_copy", altered_copy)
    report = validate(engine, reference, images())
    assert not report
    assert report.findings["max_logit_error"] <= 1e-4
    assert report.findings["unexplained"] == 0
    assert report.findings["debug_copy_error"] > 1e-3


def test_nan_logits_fail(tampered, reference):
    report = validate(tampered(scale_logits(np.nan)), reference, images())
    assert not report
    assert report.findings["max_logit_error"] == float("inf")


def test_building_refuses_an_engine_that_answers_nan(tampered):
    with pytest.raises(AssertionError, match="NaN or infinity"):
        build(tampered(scale_logits(np.nan)).source)


@pytest.mark.parametrize(
    ("options", "named"), [({"backend": "abacus"}, "backend"), ({"precision": "int3"}, "precision")]
)
def test_building_refuses_what_there_is_not(engine, options, named):
    with pytest.raises(InputError, match=f"{named} must be .*got '{options[named]}'"):
        build(engine.source, **options)


def test_the_debug_copy_leaves_no_file_and_the_engine_alone(engine, reference):
    before = {file.name: file.read_bytes() for file in engine.file.parent.iterdir()}
    validate(engine, reference, images())
    assert {file.name: file.read_bytes() for file in engine.file.parent.iterdir()} == before


def test_replay_of_ones_own_decisions_changes_nothing(engine, reference):
    pixel_values = next(images())
    with export.validate.debug_copy(engine) as runner:
        decisions = decisions_of(runner.infer_all(pixel_values), reference)
    logits, natural, scores = replay(reference, torch.from_numpy(pixel_values), decisions)
    assert torch.equal(logits, reference(torch.from_numpy(pixel_values)))
    assert natural.keys() == scores.keys() == {0, 1, 2, 3}
    with open_engine(engine.file, engine.backend) as runner:
        assert np.abs(runner.infer(pixel_values) - logits.numpy()).max() <= 1e-4


def test_default_images_are_of_both_kinds_and_batches():
    shapes = [batch.shape for batch in default_images((3, 16, 24))]
    assert shapes == [(1, 3, 16, 24), (5, 3, 16, 24)] * 2
    again = list(default_images((3, 16, 24)))
    assert all(np.array_equal(one, other) for one, other in zip(again, default_images((3, 16, 24)), strict=True))
    assert (again[3] == -2).mean() > 0.005  # clipped: there are flat areas, so there are ties


# tokens: 0 protected, then b a b a b a b -> a-tokens 2, 4, 6 and b-tokens 1, 3, 5, 7
SCORES = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.2, 0.8, 0.0, 0.8 - 4e-7], [0.1, 0.0, 0.8 - 5e-7, 0.3]]).double()


def margin_of(src, dst, unm, *, ordered_by_score=False, scores=SCORES):
    chosen = Matching(torch.tensor([src]), torch.tensor([dst]), torch.tensor([unm], dtype=torch.int64), protected=1)
    return decision_margin(scores[None].clone(), chosen, 0, ordered_by_score)


def test_the_best_decisions_have_no_margin():
    assert margin_of([2, 4], [1, 3], [6]) == 0
    assert margin_of([4, 2], [3, 1], [6]) == 0  # in which order they merge makes no difference
    assert margin_of([2, 4, 6], [1, 3, 5], []) == 0


def test_near_ties_have_a_margin_that_is_explained():
    assert margin_of([2, 4], [1, 7], [6]) == pytest.approx(4e-7, rel=0.2)  # another destination, nearly as good
    assert margin_of([2, 6], [1, 5], [4]) == pytest.approx(5e-7, rel=0.2)  # another token, nearly as good
    assert margin_of([2, 6], [1, 5], [4]) < MARGIN


def test_real_errors_have_a_margin_that_is_not():
    assert margin_of([2, 4], [3, 3], [6]) == pytest.approx(0.8)  # a bad destination
    assert margin_of([4, 6], [3, 5], [2]) == pytest.approx(0.1, rel=1e-4)  # the best token left out
    assert margin_of([2, 4], [1, 5], [6]) == pytest.approx(0.8)


def test_the_margin_that_is_explained_is_a_rounding_error_wide():
    assert MARGIN == 1e-6
    small = SCORES.clone()
    small[0, 1] = 0.9 - 2e-6
    assert margin_of([2, 4], [3, 3], [6], scores=small) > MARGIN  # small, but no rounding


def test_the_order_of_the_tokens_that_stay_counts():
    assert margin_of([2], [1], [4, 6]) == 0
    assert margin_of([2], [1], [6, 4]) == float("inf")
    assert margin_of([2], [1], [4, 6], ordered_by_score=True) == 0
    assert margin_of([2], [1], [6, 4], ordered_by_score=True) == pytest.approx(5e-7, rel=0.2)
    worse = SCORES.clone()
    worse[2] = 0.5
    assert margin_of([2], [1], [6, 4], ordered_by_score=True, scores=worse) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("src", "dst", "unm"),
    [
        ([2, 2], [1, 1], [6]),  # one token twice
        ([2, 4], [1, 3], [4]),  # one token merged and kept
        ([2, 3], [1, 3], [6]),  # a token of the other side
        ([0, 4], [1, 3], [6]),  # a protected token
        ([2, 8], [1, 3], [6]),  # beyond the last
        ([2, 4], [1, 4], [6]),  # into a token of its own side
        ([2, 4], [1, 9], [6]),  # into one beyond the last
        ([2, 4], [1, -1], [6]),
    ],
)
def test_what_is_no_decision_has_an_infinite_margin(src, dst, unm):
    assert margin_of(src, dst, unm) == float("inf")


def test_scores_that_are_not_numbers_explain_nothing():
    scores = SCORES.clone()
    scores[0, 0] = torch.nan
    assert not margin_of([2, 4], [1, 3], [6], scores=scores) < MARGIN


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"unexplained": 1}, False),
        ({"explained": 9}, True),
        ({"max_logit_error": 0.9e-4}, True),
        ({"max_logit_error": 1.1e-4}, False),
        ({"max_logit_error": 1.1e-4, "max_logit": 5.0}, True),
        ({"max_logit_error": 6e-4, "max_logit": 5.0}, False),
        ({"debug_copy_error": 2e-6}, False),
        ({"max_logit_error": float("inf")}, False),
    ],
)
def test_every_gate_decides(change, passed):
    findings = Findings(images=1, **change)
    assert findings.passed is passed
    assert findings.to_json()["passed"] is passed
