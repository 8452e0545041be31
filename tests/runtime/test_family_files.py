"""Tests runtime/family_files: names as they have always been, and what a clean-up may delete."""

import ast
from pathlib import Path

import pytest

from tocom.runtime import family_files as names

ROOT = Path(__file__).resolve().parents[2]
GRAPH = Path("family/r08-0123456789ab.onnx")
PLAN = names.plan_of(GRAPH, {"library": "1.0", "options": {}})


def test_names_are_what_families_on_disk_have():
    assert names.graph_name(8, "0123456789abcdef") == GRAPH.name
    assert names.graph_name(101, "0123456789abcdef") == "r101-0123456789ab.onnx"
    assert names.inlined(GRAPH) == Path("family/r08-0123456789ab.inlined.onnx")
    assert Path("family/r08-0123456789ab.070f0dc9.plan") == PLAN
    assert names.log_of(PLAN) == Path(f"{PLAN}.log") and names.layers_of(PLAN) == Path(f"{PLAN}.layers.json")
    assert names.kernels_of(PLAN, "NVIDIA L40S") == Path(f"{PLAN}.nvidia-l40s.cache")
    assert names.timing_of(GRAPH, "tensorrt") == Path("family/tensorrt.timing")
    assert names.weights_name("f" * 64) == f"weights-{'f' * 16}.bin"
    assert names.calibration_name("e" * 64) == f"calibration-{'e' * 16}.safetensors"
    assert names.slice_bound_of(GRAPH) == Path("family/.r08-0123456789ab.slice.onnx")
    assert names.flat_of(GRAPH) == Path("family/.r08-0123456789ab.plan.onnx")


def debug_copy(graph: Path) -> Path:
    """As tempfile names it."""
    prefix, suffix = names.debug_affixes(graph)
    return graph.with_name(f"{prefix}ab_cd_12{suffix}")


VARIANTS = [names.slice_bound_of(GRAPH), debug_copy(GRAPH), debug_copy(names.inlined(GRAPH))]
GENERATED = [GRAPH, names.inlined(GRAPH), GRAPH.with_name(names.weights_name("f" * 64)), PLAN, names.log_of(PLAN),
             names.layers_of(PLAN), names.kernels_of(PLAN, "NVIDIA RTX A2000"), *VARIANTS,
             *(names.passing_plan_of(variant) for variant in VARIANTS),
             *(names.flat_of(variant) for variant in [GRAPH, *VARIANTS])]  # fmt: skip


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.name)
def test_what_a_compile_generates_may_be_deleted_once_nothing_lists_it(file):
    assert names.may_be_deleted(file.name, ())
    assert not names.may_be_deleted(file.name, [file.name])


def test_unfinished_files_may_be_deleted():
    for file in (GRAPH.name, PLAN.name, names.weights_name("f" * 64), names.MANIFEST):
        assert names.may_be_deleted(f".{file}.123.tmp", ())


def test_what_lies_beside_a_listed_plan_stays():
    for file in (names.log_of(PLAN), names.layers_of(PLAN), names.kernels_of(PLAN, "NVIDIA L40S")):
        assert not names.may_be_deleted(file.name, [PLAN.name])


@pytest.mark.parametrize("name", [
    names.MANIFEST, names.SCALES, names.CASCADE, names.LOCK, "tensorrt.timing", names.calibration_name("e" * 64),
    "r08.onnx", ".mine.debug.onnx", ".notes.tmp", "weights.bin", "model.onnx", "r08-0123456789ab.onnx.bak",
])  # fmt: skip
def test_nobody_elses_file_may_be_deleted(name):
    assert not names.may_be_deleted(name, ())


def test_data_is_told_from_graphs_and_plans():
    assert names.is_data("weights-ff.bin") and names.is_data("deeper/model.weights")
    assert not names.is_data(GRAPH.name) and not names.is_data(PLAN.name)


def test_no_other_module_spells_a_name():
    for room in ("calib", "export", "runtime", "serving", "tocom"):
        for file in (ROOT / room).rglob("*.py"):
            texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            spelled = texts & {names.MANIFEST, names.SCALES, names.CASCADE, ".inlined.onnx", ".slice.onnx"}
            assert not spelled or file.name == "family_files.py", file
