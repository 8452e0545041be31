"""Exported graphs in ONNX Runtime against the PyTorch reference: every decision, then the logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch

from tocom.export.engine.build import build
from tocom.export.graph.inline import inline
from tocom.export.graph.lower import count_gmacs, lower, reference_model
from tocom.export.graph.trace import INPUT, OPSET, OUTPUT
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.debug_copy import debug_copy
from tocom.export.proof.decisions import decisions_of
from tocom.export.proof.validate import validate
from tocom.export.source.images import default_images
from tocom.merging import match, merge
from tocom.pruning import prune, select
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.engines.base import open_engine
from tocom.runtime.files import sha256_file
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT, schedule_for, tokens_in


def batches(model, noise, photographs) -> Iterator[np.ndarray]:
    height, width = model.patch_embed.img_size
    photos = photographs(height, width)
    yield noise(1, height, width)
    yield noise(5, height, width, seed=1)
    yield photos[:1]
    yield photos


@torch.no_grad()
def recorded(reference: ReducedViT, images: np.ndarray) -> tuple[np.ndarray, list]:
    """The reference's own logits and decisions; nothing is forced on it."""
    seen = []

    def step(block, x, token_size, signal, r):
        if reference.reduction is PRUNE:
            seen.append(select(signal, r, protected=tokens_in_front))
            return prune(x, token_size, signal, seen[-1])
        seen.append(match(signal, r, protected=tokens_in_front, keep_order=reference.model.has_class_token))
        return merge(x, token_size, seen[-1])

    tokens_in_front = reference.model.num_prefix_tokens
    return reference(torch.from_numpy(images), step).numpy(), seen


def needed_reductions(reference: ReducedViT) -> tuple[int, ...]:
    """Tokens removed per block, but for a last block of which only prefix tokens are read, which are never removed."""
    removed = reference.schedule.removed
    return removed[:-1] if reference.model.global_pool == "token" else removed


def test_onnx_runtime_decides_and_computes_as_the_reference(case, exported, make_vit, fused_of, noise, photographs):
    family, degree, reduction = case
    model, engine = make_vit(family), exported(*case)
    reference = reference_model(model, schedule_for(model, degree), fused_of(model, degree), reduction)
    names = {MERGE: ("src", "dst", "unm"), PRUNE: ("kept", "dropped")}[reduction]
    needed = needed_reductions(reference)
    alike = {"noise": 0, "photographs": 0}
    with open_engine(engine.file, "onnxruntime") as shipped, debug_copy(engine) as debugged:
        for number, images in enumerate(batches(model, noise, photographs)):
            expected, decisions = recorded(reference, images)
            logits = shipped.infer(images)
            found = decisions_of(debugged.infer_all(images), reference)
            assert list(found) == [block for block, removed in enumerate(needed) if removed]
            for image in range(len(images)):
                same = all(
                    torch.equal(getattr(one, name)[image], getattr(other, name)[image])
                    for one, other in zip(found.values(), decisions[: len(found)], strict=True)
                    for name in names
                )
                if same:
                    alike["noise" if number < 2 else "photographs"] += 1
                    assert np.abs(logits[image] - expected[image]).max() <= 1e-4
    assert min(alike.values()) >= 5  # of six each: what differs below is the exception
    # the decisions that do differ are as good as the best ones to within rounding, and the logits follow from them
    report = validate(engine, reference, batches(model, noise, photographs))
    assert report, report.findings
    assert report.findings.max_logit_error <= 1e-4
    assert report.findings.largest_margin < 1e-6
    removed = sum(each + (reduction is PRUNE) for each in needed if each)
    assert (report.findings.images, report.findings.decisions) == (12, 12 * removed)


@pytest.mark.parametrize("degree", [pytest.param(0, marks=pytest.mark.full), 8])
def test_a_graph_keeps_the_contract_of_the_runtime(exported, degree):
    engine = exported("deit_distilled", degree)
    graph = onnx.load(engine.file)
    onnx.checker.check_model(graph, full_check=True)
    imports = {opset.domain: opset.version for opset in graph.opset_import}
    assert imports[""] == OPSET >= 20
    (source,), (sink,) = graph.graph.input, graph.graph.output
    assert (source.name, sink.name) == (INPUT, OUTPUT) == ("pixel_values", "logits")
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (source, sink)]
    assert shapes == [["batch", 3, 64, 64], ["batch", 10]]
    merges = [node for node in graph.graph.node if node.domain == "ai.tocom"]
    assert len(merges) == (2 if degree else 0)  # three blocks, and of the last one two tokens are read
    assert [function.name for function in graph.functions if function.domain == "ai.tocom"] == (
        ["TokenMerge"] if degree else []
    )
    for node, tokens in zip(merges, (66, 58), strict=False):
        assert {attribute.name: attribute.i for attribute in node.attribute} == {
            "r": 8, "tokens": tokens, "protected": 2, "keep_order": 1,
        }  # fmt: skip
    assert engine.source.tokens == ((66, 58, 50, 42) if degree else (66, 66, 66, 66))
    named = {"pos_embed", "blocks.2.attn.k.weight", "blocks.2.attn.v.bias", "head.bias"}
    assert {value.name for value in graph.graph.initializer} >= named
    assert {name: sha256_file(engine.file.parent / name) for name in engine.source.files} == engine.source.files


def test_a_pruned_graph_keeps_the_contract_of_the_runtime(exported):
    engine = exported("reg4_dinov2", 13, PRUNE)
    graph = onnx.load(engine.file)
    onnx.checker.check_model(graph, full_check=True)
    (source,), (sink,) = graph.graph.input, graph.graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (source, sink)]
    assert shapes == [["batch", 3, 64, 64], ["batch", 10]]
    prunings = [node for node in graph.graph.node if node.domain == "ai.tocom"]
    assert [function.name for function in graph.functions if function.domain == "ai.tocom"] == ["TokenPrune"]
    for block, (node, tokens) in enumerate(zip(prunings, (69, 56), strict=True)):
        assert (node.op_type, node.name) == ("TokenPrune", f"block.{block}.prune")
        assert {attribute.name: attribute.i for attribute in node.attribute} == {
            "r": 13, "tokens": tokens, "protected": 5,
        }  # fmt: skip
        assert list(node.output[2:]) == [f"block.{block}.kept", f"block.{block}.dropped"]
    assert len(prunings) == 2 and engine.source.tokens == (69, 56, 43, 30)
    inlined = inline(graph)
    assert {node.domain for node in inlined.graph.node} == {""}
    forbidden = {"ScatterElements", "ScatterND", "NonZero", "Unique", "Loop", "If", "Scan"}
    assert not forbidden & {node.op_type for node in inlined.graph.node}


def test_pruning_every_patch_into_one_token(exported, make_vit, fused_of):
    """Two patches, one removed: none is kept as it is. Nothing is left to remove after that."""
    model, engine = make_vit("two_patches"), exported("two_patches", 1, PRUNE)
    assert engine.source.tokens == (3, 2, 2)
    reference = reference_model(model, schedule_for(model, 1), fused_of(model, 1), PRUNE)
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 16), dtype=np.float32)
    report = validate(engine, reference, iter([images, images[:1]]))
    assert report, report.findings
    assert (report.findings.decisions, report.findings.agreement) == (5 * 2, 1)


def test_a_graph_says_nothing_about_the_machine_that_made_it(exported):
    engine = exported("deit_distilled", 8)
    text = engine.file.read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", str(engine.file.parent.parent).encode()):
        assert trace not in text


def test_the_same_degree_exports_to_the_same_bytes(tmp_path, exported, make_vit, fused_of):
    model = make_vit("deit3")
    again = lower(model, schedule_for(model, 1), fused_of(model, 1), WeightStore(tmp_path), "model.onnx")
    assert dict(again.files) == dict(exported("deit3", 1).files)


def test_inlining_leaves_standard_operators_only(exported):
    graph = inline(onnx.load(exported("deit_distilled", 8).file, load_external_data=False))
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}
    forbidden = {"ScatterElements", "ScatterND", "NonZero", "Unique", "Loop", "If", "Scan"}
    assert not forbidden & {node.op_type for node in graph.graph.node}


def test_a_schedule_that_merges_in_some_blocks_only(tmp_path, make_vit, fused_of):
    model = make_vit("map")
    schedule = MergeSchedule((0, 20, 3), tokens_in(model), protected=0)
    fused = fused_of(model, 0)
    engine = build(lower(model, schedule, fused, WeightStore(tmp_path), "model.onnx"))
    assert engine.source.tokens == (64, 64, 44, 41)
    report = validate(engine, reference_model(model, schedule, fused), default_images((3, 64, 64)))
    assert report, report.findings
    assert report.findings.decisions == 12 * 23


def test_multiplications_are_those_of_the_formula(make_vit):
    model = make_vit("deit_tiny")
    width, head_width = 48, 16
    expected = 64 * 3 * 8 * 8 * width + width * 10  # patches and classifier
    for attending, left in ((65, 49), (49, 33), (33, 17), (17, 9)):
        expected += attending * 4 * width**2 + 2 * attending**2 * width  # qkv and proj; logits and weighted values
        expected += ((attending - 1) // 2) ** 2 * head_width  # cosines
        expected += left * 8 * width**2  # MLP
    assert count_gmacs(ReducedViT(model, 16)) * 1e9 == pytest.approx(expected, rel=1e-9)


def test_pruning_counts_the_class_token_row_where_it_is_needed(make_vit):
    model = make_vit("deit_tiny")
    expected = 64 * 3 * 8 * 8 * 48 + 48 * 10  # patches and classifier
    for attending, left in ((65, 65), (65, 33), (33, 33), (33, 17)):
        expected += attending * 4 * 48**2 + 2 * attending**2 * 48 + left * 8 * 48**2
    expected += (65 + 33) * 48  # the class token's logits once more
    expected += (33 + 17) * 48  # the weighted mean of those that are dropped
    schedule = MergeSchedule((0, 32, 0, 16), 65)
    assert count_gmacs(ReducedViT(model, schedule, reduction=PRUNE)) * 1e9 == pytest.approx(expected, rel=1e-9)


def test_the_reference_of_a_degree_has_its_own_weights(make_vit, fused_of):
    model = make_vit("deit_tiny")
    fused = fused_of(make_vit("deit_tiny"), 8)
    fused.weights["head.bias"] += 1
    reference = reference_model(model, schedule_for(model, 8), fused)
    assert torch.equal(reference.model.head.bias, model.head.bias + 1)
    assert reference.model is not model
    assert not reference.model.training


def test_lowering_needs_no_frozen_model(make_vit, fused_of):
    """A model as timm.create_model gives it is trainable, and counting multiplications in its pooling needs it not."""
    model = make_vit("map").requires_grad_(True)
    assert count_gmacs(reference_model(model, schedule_for(model, 4), fused_of(model, 4))) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
