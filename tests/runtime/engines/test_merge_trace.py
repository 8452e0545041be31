"""Patches followed without torch: against the reference's pictures, sets of patches merged naively, and the engine."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from tests.waiting import eventually
from tocom.export.proof.debug_copy import debug_copy
from tocom.export.proof.decisions import decisions_of
from tocom.export.proof.report.pictures import group_indices, patch_groups
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.graph_file import removals, telling
from tocom.runtime.engines.merge_trace import MergeTracer, moved, patch_grid
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import EngineEntry, Family, InputSpec
from tocom.runtime.native import library
from tocom.vit import ReducedViT

CASES = [("deit_tiny", 16, MERGE), ("deit_distilled", 8, MERGE), ("reg4_dinov2", 13, MERGE), ("gap", 4, MERGE),
         ("map", 16, MERGE), ("hybrid", 1, MERGE), ("deit_small", 8, MERGE),
         ("deit_tiny", 8, PRUNE), ("reg4_dinov2", 13, PRUNE)]  # fmt: skip
BY_DEFAULT = ("deit_tiny", "reg4_dinov2", "gap")  # the others in the full run
SEVERAL = pytest.mark.parametrize(
    ("name", "degree", "reduction"),
    [pytest.param(name, degree, reduction, id=f"{name}-{reduction.name}",
                  marks=() if name in BY_DEFAULT else pytest.mark.full) for name, degree, reduction in CASES],
)  # fmt: skip


def listed(engine, degree, backend="onnxruntime", **changes):
    """An entry for an exported engine."""
    tokens = engine.graph.tokens
    file = engine.file.name
    fields = {
        "degree": degree, "scale": None, "tokens": tokens,
        "schedule": tuple(one - other for one, other in pairwise(tokens)),
        "gmacs": 0.1, "backend": backend, "precision": "fp32", "onnx": file, "engine": file, "sha256": engine.files,
        "recipe": "", "validation": {}, "latency_ms": {}, "accuracy": {},
    }  # fmt: skip
    return EngineEntry(**(fields | changes))


def family_of(size, reduction, *entries):
    spec = InputSpec((3, *size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "center")
    return Family("tiny", 10, spec, 0, None, None, None, entries, reduction=reduction.name)


@pytest.fixture
def case(make_vit, exported, noise):
    """Everything about a family at a degree."""

    def made(name, degree, reduction=MERGE, **changes):
        engine = exported(name, degree, reduction)
        reference = ReducedViT(make_vit(name), degree, reduction=reduction).eval()
        size = reference.model.patch_embed.img_size
        entry = listed(engine, degree, **changes)
        return SimpleNamespace(
            engine=engine, reference=reference, folder=engine.file.parent, entry=entry,
            family=family_of(size, reduction, entry), pixels=noise(1, *size, seed=degree),
        )  # fmt: skip

    return made


@SEVERAL
def test_groups_are_those_of_the_reference_s_pictures(case, name, degree, reduction, in_own_folder):
    it = case(name, degree, reduction)
    with debug_copy(it.engine) as runner:
        expected = patch_groups(decisions_of(runner.infer_all(it.pixels), it.reference), it.reference)
    folder = in_own_folder(it.engine).file.parent
    before = sorted(path.name for path in folder.iterdir())
    with MergeTracer(folder, it.family) as tracer:
        found = tracer.trace(it.pixels, degree)
        assert sorted(path.name for path in folder.iterdir()) == before
    assert found.grid == tuple(it.reference.model.patch_embed.grid_size)
    assert tuple(found.groups) == it.reference.deciding_blocks == tuple(expected)
    for block, groups in found.groups.items():
        np.testing.assert_array_equal(groups, expected[block])


@SEVERAL
def test_groups_are_sets_of_patches_merged_one_by_one(case, name, degree, reduction):
    it = case(name, degree, reduction)
    with debug_copy(it.engine) as runner:
        outputs = runner.infer_all(it.pixels)
    with MergeTracer(it.folder, it.family) as tracer:
        found = tracer.trace(it.pixels, degree)
    prefix, patches = it.reference.model.num_prefix_tokens, found.grid[0] * found.grid[1]
    tokens = [set() for _ in range(prefix)] + [{patch} for patch in range(patches)]
    for block in it.reference.deciding_blocks:
        there = [name for name in outputs if name.startswith(f"block.{block}.") and outputs[name].dtype == np.int64]
        chosen = {name.rpartition(".")[2]: outputs[name].ravel().tolist() for name in there}
        if reduction is PRUNE:
            left = [tokens[i] for i in [*range(prefix), *chosen["kept"]]]
            tokens = [*left, set().union(*(tokens[i] for i in chosen["dropped"]))]
        else:
            for source, destination in zip(chosen["src"], chosen["dst"], strict=True):
                tokens[destination] = tokens[destination] | tokens[source]
            odd = [i for i in range(prefix, len(tokens)) if i % 2]
            tokens = [tokens[i] for i in [*range(prefix), *chosen["unm"], *odd]]
        expected = {frozenset(each) for each in tokens if each}
        flat = found.groups[block].ravel()
        assert {frozenset(np.flatnonzero(flat == group).tolist()) for group in np.unique(flat)} == expected
        assert len(tokens) == found.tokens[block + 1]


def test_degree_zero_leaves_every_patch_alone(exported, noise):
    plain = exported("deit_tiny", 0)
    with MergeTracer(plain.file.parent, family_of((64, 64), MERGE, listed(plain, 0))) as tracer:
        found = tracer.trace(noise(1, 64, 64), 0)
    assert found.groups == {} and found.grid == (8, 8) and found.to_json()["blocks"] == []
    assert set(found.tokens) == {65}


def test_a_degree_that_removes_nothing_learns_of_the_prefix_from_another(case):
    it = case("reg4_dinov2", 13)
    with MergeTracer(it.folder, it.family) as tracer:
        assert tracer._protected(SimpleNamespace(removals=())) == 5


def test_json_numbers_groups_from_zero(case):
    it = case("deit_tiny", 16)
    with MergeTracer(it.folder, it.family) as tracer:
        found = tracer.trace(it.pixels, 16)
    told = json.loads(json.dumps(found.to_json()))
    assert told["degree"] == 16 and told["grid"] == [8, 8] and told["reduction"] == "merge"
    assert told["tokens"] == list(found.tokens)
    for block in told["blocks"]:
        groups = np.array(block["groups"])
        assert sorted(set(groups.ravel().tolist())) == list(range(groups.max() + 1))
        np.testing.assert_array_equal(groups, group_indices(found.groups[block["block"]]))


needs_native = pytest.mark.skipif(library() is None, reason="the native merge operator is not built (make native)")


@needs_native
def test_a_native_engine_tells_itself_what_it_decides(case):
    it = case("deit_tiny", 16, backend="openvino", native=True)
    with open_engine(it.engine.file, "openvino") as runner:
        expected = patch_groups(decisions_of(runner.infer_all(it.pixels), it.reference), it.reference)
    with MergeTracer(it.folder, it.family) as tracer:
        found = tracer.trace(it.pixels, 16)
    assert found.decided_by == "engine"
    for block, groups in found.groups.items():
        np.testing.assert_array_equal(groups, expected[block])


@needs_native
@pytest.mark.timing
def test_other_engines_that_merge_meanwhile_do_not_get_in(case):
    it = case("deit_tiny", 8, backend="openvino", native=True)
    other = case("deit_tiny", 16)
    done, merging = threading.Event(), threading.Event()

    def keep_merging():
        with open_engine(other.engine.file, "openvino") as runner:
            while not done.is_set():
                runner.infer(other.pixels)
                merging.set()

    with MergeTracer(it.folder, it.family) as tracer:
        alone = tracer.trace(it.pixels, 8)
        thread = threading.Thread(target=keep_merging)
        thread.start()
        try:
            assert merging.wait(60)
            crowded = []

            def disturbed():
                crowded.append(tracer.trace(it.pixels, 8))
                return len(crowded) > 10 and "graph" in {each.decided_by for each in crowded}

            eventually(disturbed, "a trace that the other engine gets into", every=0)
        finally:
            done.set()
            thread.join()
    assert alone.decided_by == "engine"
    for each in crowded:
        for block, groups in alone.groups.items():
            np.testing.assert_array_equal(groups, each.groups[block])


def test_engines_that_were_used_long_ago_are_closed(exported, case):
    it = case("deit_tiny", 16)
    with MergeTracer(it.folder, it.family, keep=1) as tracer:
        first = tracer.trace(it.pixels, 16).to_json()
        tracer._forget(16)
        assert not tracer._copies and tracer.trace(it.pixels, 16).to_json() == first
    with pytest.raises(InputError, match="open"):
        tracer.trace(it.pixels, 16)


def test_refusals_are_one_line(case, tmp_path):
    it = case("deit_tiny", 16)
    with MergeTracer(it.folder, it.family) as tracer:
        with pytest.raises(InputError, match="one image at a time, got 2"):
            tracer.trace(np.repeat(it.pixels, 2, axis=0), 16)
        with pytest.raises(InputError, match="degree must be one"):
            tracer.trace(it.pixels, 5)
        with pytest.raises(InputError, match="must have shape"):
            tracer.trace(it.pixels[..., :32], 16)
    (tmp_path / it.entry.onnx).write_bytes(b"something else")
    with MergeTracer(tmp_path, it.family) as tracer, pytest.raises(InputError, match="has changed"):
        tracer.trace(it.pixels, 16)
    with MergeTracer(tmp_path / "gone", it.family) as tracer, pytest.raises(InputError, match="cannot be read"):
        tracer.trace(it.pixels, 16)


@pytest.mark.parametrize("wrong", [{"src": [1]}, {"dst": [4]}, {"unm": [2, 2]}, {"unm": [2, 99]}])
def test_what_is_no_decision_is_refused(wrong):
    removal = SimpleNamespace(block=0, decisions=("block.0.src", "block.0.dst", "block.0.unm"), tokens=7, protected=1)
    chosen = {"src": [4], "dst": [1], "unm": [2, 6]}
    as_read = lambda kinds: {f"block.0.{kind}": np.array(positions) for kind, positions in kinds.items()}  # noqa: E731
    assert moved(removal, as_read(chosen)).tolist() == [0, 3, 1, 4, 3, 5, 2]
    with pytest.raises(InputError, match="block 0"):
        moved(removal, as_read(chosen | wrong))


@pytest.mark.parametrize(
    ("size", "tokens", "prefix", "expected"),
    [((224, 224), 197, None, ((14, 14), 1)), ((224, 224), 198, 2, ((14, 14), 2)), ((56, 72), 64, 1, ((7, 9), 1)),
     ((384, 384), 729, 0, ((27, 27), 0)), ((32, 32), 65, None, ((8, 8), 1)), ((48, 80), 16, 1, ((3, 5), 1))],
)  # fmt: skip
def test_grids(size, tokens, prefix, expected):
    assert patch_grid(*size, tokens, prefix) == expected


def test_a_grid_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="no grid"):
        patch_grid(224, 224, 198, 1)


def test_a_graph_that_tells_more_is_the_same_otherwise(exported):
    engine = exported("deit_distilled", 8)
    content = engine.file.read_bytes()
    original, debug = onnx.load_from_string(content), onnx.load_from_string(
        telling(content, [name for each in removals(content) for name in each.decisions])
    )  # fmt: skip
    added = [value.name for value in debug.graph.output][1:]
    assert added == [name for node in original.graph.node if node.domain == "ai.tocom" for name in node.output[2:]]
    del debug.graph.output[1:]
    assert debug == original
    for removal, node in zip(
        removals(content), [n for n in original.graph.node if n.domain == "ai.tocom"], strict=True
    ):
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        assert (removal.tokens, removal.protected) == (numbers["tokens"], numbers["protected"])
