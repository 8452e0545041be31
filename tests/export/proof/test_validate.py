"""The gates of tocom.export.proof.validate: the right passes, the wrong fails, a matter of rounding is explained."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import tocom.export.proof.observe
from tocom.export.engine.build import build
from tocom.export.graph.lower import reference_model
from tocom.export.graph.operators import POINTS
from tocom.export.proof.debug_copy import debug_copy
from tocom.export.proof.decisions import decisions_of
from tocom.export.proof.findings import BlockFindings
from tocom.export.proof.gates import margin_allowed
from tocom.export.proof.reference import replay
from tocom.export.proof.tally import Tally
from tocom.export.proof.validate import validate
from tocom.export.source.images import default_images
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.vit import schedule_for

FAMILY, DEGREE = "deit_tiny", 8
ROUNDOFF = 2**-24  # of float32


@pytest.fixture(params=[MERGE], ids=["merge"])
def reduction(request):
    return request.param


with_both = pytest.mark.parametrize("reduction", [MERGE, PRUNE], ids=["merge", "prune"], indirect=True)
when_pruning = pytest.mark.parametrize("reduction", [PRUNE], ids=["prune"], indirect=True)


@pytest.fixture
def engine(exported, reduction):
    return exported(FAMILY, DEGREE, reduction)


@pytest.fixture
def reference(make_vit, fused_of, reduction):
    model = make_vit(FAMILY)
    return reference_model(model, schedule_for(model, DEGREE), fused_of(model, DEGREE), reduction)


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


def operator_body(graph):
    (function,) = [function for function in graph.functions if function.domain == "ai.tocom"]
    return function


def body(graph, op_type, position=0):
    function = operator_body(graph)
    return [node for node in function.node if node.op_type == op_type][position]


def set_attribute(name, value, op_type, position=0):
    def alter(graph):
        next(each for each in body(graph, op_type, position).attribute if each.name == name).i = value

    return alter


def worst_destination(graph):
    body(graph, "ArgMax").op_type = "ArgMin"


def scrambled_ranking(graph):
    function = operator_body(graph)
    ranking = body(graph, "TopK")
    index = list(function.node).index(ranking)
    scores = ranking.input[0]
    ranking.input[0] = "scrambled"
    function.node.insert(index, helper.make_node("Sin", ["stretched"], ["scrambled"]))
    function.node.insert(index, helper.make_node("Mul", [scores, "stretch"], ["stretched"]))
    function.node.insert(index, helper.make_node("Constant", [], ["stretch"], value_float=1e4))


def unweighted_mean(graph):
    """Takes the sizes out of the sum, but not out of what it is divided by."""
    weighted = next(node for node in graph.functions[0].node if node.op_type == "Mul" and "into" in node.input)
    weighted.op_type = "Identity"
    del weighted.input[:]
    weighted.input.append("into")


def rewire(graph, value, position, *nodes):
    """Puts nodes behind a value of the body and lets its readers read the last node's output instead."""
    function = operator_body(graph)
    readers = [node for node in function.node if value in node.input]
    index = min(list(function.node).index(reader) for reader in readers[position:])
    for reader in readers[position:]:
        reader.input[list(reader.input).index(value)] = nodes[-1].output[0]
    for node in reversed(nodes):
        function.node.insert(index, node)


def one_wrong_token(graph):
    """Keeps the most attended of the tokens to be dropped, and drops the least attended of those to be kept."""
    index = list(operator_body(graph).node).index(body(graph, "GreaterOrEqual"))
    before = operator_body(graph).node[index].input[0]
    rewire(
        graph, "ranked", 0,
        helper.make_node("Sub", ["stay", "one"], ["last_kept"]),
        helper.make_node("Equal", [before, "stay"], ["is_first"]),
        helper.make_node("Equal", [before, "last_kept"], ["is_last"]),
        helper.make_node("Where", ["is_first", "last_kept", before], ["once"]),
        helper.make_node("Where", ["is_last", "stay", "once"], ["swapped"]),
        helper.make_node("Gather", ["ranked", "swapped"], ["wrong"], axis=1),
    )  # fmt: skip


def highest_positions_first_on_ties(graph):
    """Ranks the tokens from the last to the first, so that the last of equals is kept."""
    rewire(
        graph, "free", 0,
        helper.make_node("Constant", [], ["back"], value_ints=[-1]),
        helper.make_node("Constant", [], ["front"], value_ints=[-(1 << 40)]),
        helper.make_node("Slice", ["free", "back", "front", "one", "back"], ["reversed"]),
    )  # fmt: skip
    rewire(
        graph, "ranked", 0,
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Sub", ["last", "ranked"], ["unreversed"]),
    )  # fmt: skip


def kept_backwards(graph):
    """Keeps the right tokens, the last of them first."""
    body(graph, "Unsqueeze").output[0] = "forwards"
    rewire(
        graph, "kept", 0,
        helper.make_node("Constant", [], ["back"], value_ints=[-1]),
        helper.make_node("Constant", [], ["front"], value_ints=[-(1 << 40)]),
        helper.make_node("Slice", ["forwards", "back", "front", "one", "back"], ["kept"]),
    )  # fmt: skip


def plain_mean(graph):
    """A floor so high that every dropped token weighs the same."""
    for node in operator_body(graph).node:
        for attribute in node.attribute:
            if attribute.name == "value_float":
                attribute.f = 1e6


def largest_size(graph):
    """The fused token counts for the largest of those it stands for, not for all."""
    body(graph, "ReduceSum", 1).op_type = "ReduceMax"


def test_the_good_engine_passes(engine, reference):
    report = validate(engine, reference, images())
    assert report
    found = report.findings
    assert found.passed is True
    assert (found.images, found.decisions, found.unexplained) == (12, 12 * 3 * DEGREE, 0)
    assert found.agreement > 0.99
    assert found.max_logit_error < 1e-4
    assert found.top1_agreement == 1


@when_pruning
def test_the_good_pruned_engine_passes(engine, reference):
    report = validate(engine, reference, images())
    assert report
    found = report.findings
    assert (found.images, found.decisions, found.unexplained) == (12, 12 * 3 * (DEGREE + 1), 0)
    assert found.agreement > 0.99
    assert found.largest_margin < margin_allowed("fp32", "prune")
    assert found.max_logit_error < 1e-4
    assert found.top1_agreement == 1


@with_both
def test_the_same_graph_untouched_passes(tampered, reference):
    assert validate(tampered(scale_logits(1.0)), reference, images())


@with_both
@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0, 0.0])
def test_scaled_logits_fail(tampered, reference, factor):
    report = validate(tampered(scale_logits(factor)), reference, images())
    assert not report
    assert report.findings.max_logit_error > 1e-3
    assert report.findings.unexplained == 0


@pytest.mark.parametrize(
    "alter",
    [worst_destination, scrambled_ranking, set_attribute("largest", 0, "TopK")],
    ids=["worst destination", "random tokens", "least similar tokens"],
)
def test_wrong_decisions_fail_although_the_logits_follow_from_them(tampered, reference, alter):
    report = validate(tampered(alter), reference, images())
    assert not report
    assert report.findings.agreement < 0.6
    assert report.findings.unexplained > 0
    assert report.findings.largest_margin > 1e-3
    assert report.findings.max_logit_error <= 1e-4
    assert report.findings.blocks_with_unexplained == [0, 1, 2]


@when_pruning
@pytest.mark.parametrize(
    ("alter", "agreement"),
    [(scrambled_ranking, 0.6), (set_attribute("largest", 0, "TopK"), 0.6), (one_wrong_token, 0.9)],
    ids=["random tokens", "most attended tokens", "one token"],
)
def test_wrongly_dropped_tokens_fail_although_the_logits_follow_from_them(tampered, reference, alter, agreement):
    report = validate(tampered(alter), reference, images())
    assert not report
    assert report.findings.agreement < agreement
    assert report.findings.unexplained > 0
    assert report.findings.largest_margin > 1e-3
    assert report.findings.max_logit_error <= 1e-4
    assert report.findings.blocks_with_unexplained == [0, 1, 2]


@when_pruning
def test_one_wrong_token_is_told_from_rounding_in_every_image(tampered, reference):
    report = validate(tampered(one_wrong_token), reference, images())
    assert report.findings.explained == 0
    assert report.findings.unexplained == 12 * 3
    assert report.findings.agreement == pytest.approx(DEGREE / (DEGREE + 1))


@when_pruning
def test_pruned_tokens_in_a_wrong_order_fail(tampered, reference):
    report = validate(tampered(kept_backwards), reference, images())
    assert not report
    assert report.findings.largest_margin == float("inf")
    assert report.findings.blocks_with_unexplained == [0, 1, 2]


@when_pruning
@pytest.mark.parametrize("alter", [plain_mean, largest_size])
def test_a_wrong_fused_token_fails_although_the_first_decisions_are_right(tampered, reference, alter):
    report = validate(tampered(alter), reference, images())
    assert not report
    assert report.findings.max_logit_error > 1e-3


def test_a_wrong_order_of_the_tokens_that_stay_fails(tampered, reference):
    report = validate(tampered(set_attribute("largest", 1, "TopK", 1)), reference, images())
    assert not report
    assert report.findings.agreement > 0.99
    assert report.findings.largest_margin == float("inf")


def test_a_wrong_mean_fails_although_the_first_decisions_are_right(tampered, reference):
    report = validate(tampered(unweighted_mean), reference, images())
    assert not report
    assert report.findings.max_logit_error > 1e-3


@pytest.mark.parametrize(
    ("reduction", "alter"),
    [(MERGE, set_attribute("select_last_index", 1, "ArgMax")), (PRUNE, highest_positions_first_on_ties)],
    ids=["merge", "prune"],
    indirect=["reduction"],
)
def test_another_choice_among_exact_ties_is_explained(tampered, reference, reduction, alter):
    """Flat images are all ties: preferring the last of them instead of the first is no error."""
    flat = [np.full((2, 3, 64, 64), value, np.float32) for value in (0.0, 0.5)]
    model = reference.model
    model.pos_embed.data[:] = 0
    graph = tampered(alter)
    loaded = onnx.load(graph.file)
    for tensor in loaded.graph.initializer:
        if tensor.name == "pos_embed":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), "pos_embed"))
    onnx.save(loaded, graph.file)
    report = validate(graph, reference, iter(flat))
    assert report, report.findings
    assert report.findings.agreement < 0.5
    assert report.findings.explained > 0
    assert report.findings.largest_margin < margin_allowed("fp32", reduction.name)


@pytest.mark.parametrize(
    ("reduction", "decision"),
    [(MERGE, "dst"), (PRUNE, "kept"), (PRUNE, "dropped")],
    ids=["merge", "kept", "dropped"],
    indirect=["reduction"],
)
def test_decisions_that_are_none_fail_instead_of_crashing(tampered, reference, decision):
    def beyond_the_last_token(graph):
        nodes = operator_body(graph).node
        for node in nodes:
            if list(node.output) == [decision]:
                node.output[0] = "true"
            node.input[:] = ["true" if name == decision else name for name in node.input]
        nodes.append(helper.make_node("Constant", [], ["far"], value_ints=[1000]))
        nodes.append(helper.make_node("Add", ["true", "far"], [decision]))

    report = validate(tampered(beyond_the_last_token), reference, images())
    assert not report
    assert report.findings.largest_margin == float("inf")


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
    true_copy = tocom.export.proof.observe.debug_copy

    @contextmanager
    def altered_copy(engine):
        with true_copy(engine) as runner:
            yield Altered(runner, alter)

    monkeypatch.setattr(tocom.export.proof.observe, "debug_copy", altered_copy)
    report = validate(engine, reference, images())
    assert not report
    assert report.findings.max_logit_error <= 1e-4
    assert report.findings.unexplained == 0
    assert report.findings.debug_copy_error > 1e-3


def test_nan_logits_fail(tampered, reference):
    report = validate(tampered(scale_logits(np.nan)), reference, images())
    assert not report
    assert report.findings.max_logit_error == float("inf")


def test_building_refuses_an_engine_that_answers_nan(tampered):
    with pytest.raises(AssertionError, match="NaN or infinity"):
        build(tampered(scale_logits(np.nan)).source)


@pytest.mark.parametrize(
    ("options", "named"), [({"backend": "abacus"}, "backend"), ({"precision": "int3"}, "precision")]
)
def test_building_refuses_what_there_is_not(engine, options, named):
    with pytest.raises(InputError, match=f"{named} must be .*got '{options[named]}'"):
        build(engine.source, **options)


@with_both
def test_the_debug_copy_leaves_no_file_and_the_engine_alone(tampered, reference):
    engine = tampered(lambda graph: None)  # in a folder of its own: other processes prove the shared one
    before = {file.name: file.read_bytes() for file in engine.file.parent.iterdir()}
    validate(engine, reference, images())
    assert {file.name: file.read_bytes() for file in engine.file.parent.iterdir()} == before


@with_both
def test_replay_of_ones_own_decisions_changes_nothing(engine, reference):
    pixel_values = next(images())
    with debug_copy(engine) as runner:
        decisions = decisions_of(runner.infer_all(pixel_values), reference)
    forced = replay(reference, torch.from_numpy(pixel_values), decisions)
    logits = forced.logits
    assert torch.equal(logits, reference(torch.from_numpy(pixel_values)))
    assert forced.natural.keys() == forced.signals.keys() == {0, 1, 2, 3}
    assert {f"block.{block}.{point}" for block in range(4) for point in POINTS} <= forced.values.keys()
    with open_engine(engine.file, engine.backend) as runner:
        assert np.abs(runner.infer(pixel_values) - logits.numpy()).max() <= 1e-4


def test_default_images_are_of_both_kinds_and_batches():
    shapes = [batch.shape for batch in default_images((3, 16, 24))]
    assert shapes == [(1, 3, 16, 24), (5, 3, 16, 24)] * 2
    again = list(default_images((3, 16, 24)))
    assert all(np.array_equal(one, other) for one, other in zip(again, default_images((3, 16, 24)), strict=True))
    assert (again[3] == -2).mean() > 0.005  # clipped: there are flat areas, so there are ties


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"blocks": {3: BlockFindings(unexplained=1)}}, False),
        ({"blocks": {3: BlockFindings(explained=9)}}, True),
        ({"blocks": {3: BlockFindings(parts={"mlp": 39 * ROUNDOFF})}}, True),
        ({"blocks": {3: BlockFindings(parts={"mlp": 41 * ROUNDOFF})}}, False),
        ({"blocks": {3: BlockFindings(parts={"mlp": float("nan")})}}, False),
        ({"blocks": {3: BlockFindings(parts={"mlp": 30 * ROUNDOFF}, middles={"mlp": 19 * ROUNDOFF})}}, True),
        ({"blocks": {3: BlockFindings(parts={"mlp": 30 * ROUNDOFF}, middles={"mlp": 21 * ROUNDOFF})}}, False),
        ({"logit_errors": [23 * ROUNDOFF, 71 * ROUNDOFF, 23 * ROUNDOFF]}, True),
        ({"logit_errors": [23 * ROUNDOFF, 73 * ROUNDOFF, 23 * ROUNDOFF]}, False),
        ({"logit_errors": [23 * ROUNDOFF, 25 * ROUNDOFF, 25 * ROUNDOFF]}, False),
        ({"logit_errors": [47 * ROUNDOFF], "shaken": [4 * ROUNDOFF]}, True),
        ({"logit_errors": [49 * ROUNDOFF], "shaken": [4 * ROUNDOFF]}, False),
        ({"logit_errors": [23 * ROUNDOFF] * 2 + [71 * ROUNDOFF], "shaken": [4 * ROUNDOFF, 0.0, 0.0]}, True),
        ({"logit_errors": [23 * ROUNDOFF] * 2 + [73 * ROUNDOFF], "shaken": [4 * ROUNDOFF, 0.0, 0.0]}, False),
        ({"logit_errors": [float("inf")]}, False),
        ({"debug_copy_errors": [0.0, 73 * ROUNDOFF]}, False),
        ({"debug_copy_errors": [2**-11], "precision": "fp16"}, True),
    ],
)
def test_every_gate_decides(change, passed):
    tally = Tally(images=1, depth=2, **change)  # the root of depth + 2 is 2
    assert tally.passed is passed
    assert tally.findings().passed is passed and tally.findings().to_json()["passed"] is passed


def test_the_first_fault_is_where_the_network_first_goes_wrong():
    wrong = 1e-2
    blocks = {
        2: BlockFindings(parts={"attention": wrong}),
        1: BlockFindings(unexplained=1, margin=wrong, parts={"reduction": wrong, "signal": 0.0, "mlp": wrong}),
    }
    tally = Tally(images=1, blocks=blocks, logit_errors=[wrong], depth=3)
    assert [(fault.block, fault.part) for fault in tally.faults] == [
        (1, "decision"), (1, "reduction"), (1, "mlp"), (2, "attention"),
        (None, "logits of the worst image"), (None, "logits of the image in the middle"),
    ]  # fmt: skip
    assert tally.findings().to_json()["first_fault"]["block"] == 1
