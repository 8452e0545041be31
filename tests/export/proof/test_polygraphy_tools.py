"""Polygraphy on exported graphs: what fails is cut down to the node at fault, runners are compared, graphs shown."""

# ruff: noqa: E402 - what follows does not load without Polygraphy

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

for module in ("polygraphy", "onnx_graphsurgeon"):
    pytest.importorskip(
        module, reason="Polygraphy is not installed: pip install tocom[polygraphy]", exc_type=ImportError
    )

from tocom.export.artifacts import Report
from tocom.export.cli.__main__ import main
from tocom.export.cli.inspect_graph import examine
from tocom.export.graph.half_precision import typed
from tocom.export.proof.bisect import failing_piece
from tocom.export.proof.bisect.failing_piece import smallest_failing_piece
from tocom.export.proof.polygraphy_tools import REFERENCE, compare, comparison_table
from tocom.reduction import PRUNE

CASE = ("two_patches", 1, PRUNE)
SCATTER = (
    lambda x: [helper.make_node("ScatterElements", [x, "row", "one"], ["put"], axis=1, reduction="add")],
    {"row": np.zeros((1, 1, 1), np.int64), "one": np.ones((1, 1, 1), np.float32)},
)
RANDOM = (  # ONNX does not say which numbers come out, and every library has its own
    lambda x: [
        helper.make_node("RandomUniformLike", [x], ["noise"], seed=1.0),
        helper.make_node("Add", [x, "noise"], ["put"]),
    ],
    {},
)
CONSTANT_DET = (  # OpenVINO has no such operator, and does not need it once it is folded
    lambda x: [helper.make_node("Det", ["unit"], ["det"]), helper.make_node("Add", [x, "det"], ["put"])],
    {"unit": np.eye(3, dtype=np.float32)},
)


@pytest.fixture
def altered(exported, in_own_folder):
    """The file of a graph with nodes put before its last reduction, beside the weights that it refers to."""
    made = []

    def make(change, case=CASE, precision="fp32"):
        engine = in_own_folder(exported(*case))
        nodes, initializers = change
        graph = typed(onnx.load(engine.file, load_external_data=False), precision)
        reduction = [node for node in graph.graph.node if node.domain == "ai.tocom"][-1]
        at = list(graph.graph.node).index(reduction)
        for node in reversed(nodes(reduction.input[0])):
            graph.graph.node.insert(at, node)
        reduction.input[0] = "put"
        graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in initializers.items())
        made.append(engine.file.with_name(f"altered-{len(made)}.onnx"))
        made[-1].write_bytes(graph.SerializeToString())
        return made[-1]

    yield make
    for file in made:
        assert {other.name for other in file.parent.iterdir() if other.name.startswith(".")} == set()


@pytest.fixture
def run(monkeypatch, capsys):
    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return go


def crash(_trial, _piece):
    os.abort()


def hang(_trial, _piece):
    time.sleep(600)


def refused(result, *words):
    status, _, told = result
    assert status == 2 and "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("tocom: ")]
    assert line == told.splitlines()[-1]
    for word in words:
        assert word in line, line


@pytest.mark.full
def test_what_a_plan_builder_refuses_is_cut_out(altered, run, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    file = altered(SCATTER)
    status, said, told = run("inspect", file, "--bisect", "tensorrt-rtx", "--out", tmp_path / "piece.onnx")
    assert status == 0, told
    assert "1 of " in said and "ScatterElements" in said and "refuses" in said and "reduction" in said
    assert "nodes" in told and len(told.splitlines()) > 5
    piece = onnx.load(tmp_path / "piece.onnx")
    onnx.checker.check_model(piece, full_check=True)
    assert [node.op_type for node in piece.graph.node] == ["ScatterElements"]
    assert [file.name for file in tmp_path.iterdir()] == ["piece.onnx"]


def test_what_a_library_computes_otherwise_is_cut_out_of_degrees_that_fail(altered, exported, tmp_path, capsys):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    engine = exported(*CASE)
    file = altered(RANDOM)
    wrong = replace(engine, file=file, graph=replace(engine.graph, file=file), backend="openvino")
    reports = {0: Report(engine, True, {}), 16: Report(wrong, False, {})}
    examine(reports, comparing=False, folder=tmp_path / "pieces")
    assert [file.name for file in (tmp_path / "pieces").iterdir()] == ["r16.onnx"]
    piece = onnx.load(tmp_path / "pieces" / "r16.onnx")
    assert len(piece.graph.node) <= 3
    assert "RandomUniformLike" in [node.op_type for node in piece.graph.node]
    said = capsys.readouterr().out
    assert said.startswith("r=16: ") and "openvino differs from ONNX Runtime" in said


def test_runners_agree_and_a_tampered_engine_does_not(exported, in_own_folder, tmp_path, run):
    engine = in_own_folder(exported(*CASE))
    graph = onnx.load(engine.file)
    output = next(node for node in graph.graph.node if "logits" in node.output)
    output.output[list(output.output).index("logits")] = "less"
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "little"))
    graph.graph.node.append(helper.make_node("Add", ["less", "little"], ["logits"]))
    onnx.save(graph, tmp_path / "tampered.onnx")

    found = compare(engine)
    pairs = {(each.one, each.other) for each in found.differences}
    assert {one for one, _ in pairs} >= {REFERENCE} and (REFERENCE, "onnxruntime fp32 (listed)") in pairs
    assert all(0 <= each.mean <= each.largest < 1e-4 for each in found.differences)
    assert {each.output for each in found.differences} == {"logits"} and not found.absent

    found = compare(replace(engine, file=tmp_path / "tampered.onnx"))
    for each in found.differences:
        if "onnxruntime fp32 (listed)" in (each.one, each.other):
            assert each.largest == pytest.approx(0.01, abs=1e-4) and each.mean == pytest.approx(0.01, abs=1e-4)
    assert comparison_table({1: found}).row_count == len(found.differences)
    assert not [file for file in engine.file.parent.iterdir() if file.name.startswith(".")]


def test_a_runner_that_cannot_run_the_graph_is_told(exported, tmp_path):
    engine = exported(*CASE)
    (tmp_path / "no.plan").write_bytes(b"no plan")
    found = compare(replace(engine, file=tmp_path / "no.plan"))
    assert (
        list(found.absent) == ["onnxruntime fp32 (listed)"] and "no.plan" in found.absent["onnxruntime fp32 (listed)"]
    )
    assert not any("(listed)" in each.one + each.other for each in found.differences)


def chain(folder, *operators):
    names = [f"value{index}" for index in range(len(operators) + 1)]
    nodes = [helper.make_node(each, [a], [b]) for each, a, b in zip(operators, names, names[1:], strict=False)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), folder / "whole.onnx")
    return folder / "whole.onnx"


def test_only_what_fails_like_the_whole_counts(tmp_path):
    """A piece may fail for a reason that is none of the whole graph's: then it is not what is looked for."""
    whole = chain(tmp_path, "Relu", "Neg", "Exp", "Abs", "Tanh", "Sqrt", "Floor", "Neg")

    def fails(piece):
        operators = [node.op_type for node in onnx.load(piece).graph.node]
        if operators[0] != "Neg" and len(operators) < 8:
            return "a piece must begin with Neg"
        return f"value{len(operators)}: there must be no Abs" if "Abs" in operators else None

    told = []
    piece = failing_piece._reduced(whole, fails(whole), fails, lambda name: np.zeros((2, 3), np.float32), told.append)
    assert piece.operators == Counter(["Neg", "Exp", "Abs"])
    assert str(piece) == "3 of 8 nodes still fail: Neg, Exp, Abs"
    assert piece.reason == "value3: there must be no Abs" and told[-1].startswith(f"piece {len(told)}: ")


def test_a_graph_is_shown(exported, run):
    file = exported(*CASE).file
    nodes = len(onnx.load(file, load_external_data=False).graph.node)
    status, said, told = run("inspect", file)
    assert status == 0 and not told
    assert "pixel_values" in said and "logits" in said and f"{nodes} Node(s)" in said and "TokenPrune" not in said
    status, said, _ = run("inspect", file, "--show", "layers,attrs")
    assert status == 0 and "TokenPrune" in said and ".protected = " in said


def test_bad_input_is_one_line(exported, run, tmp_path):
    file = exported(*CASE).file
    (tmp_path / "text.onnx").write_text("no graph")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "alone.onnx").write_bytes(file.read_bytes())
    piece = tmp_path / "piece.onnx"
    cases = (
        ([tmp_path / "text.onnx"], "text.onnx"),
        ([tmp_path / "empty.onnx"], "empty.onnx"),
        ([tmp_path / "nowhere.onnx"], "nowhere.onnx"),
        ([tmp_path / "alone.onnx", "--bisect", "onnxruntime", "--out", piece], "alone.onnx"),
        ([file, "--show", "colours"], "colours"),
        ([file, "--bisect", "onnxruntime"], "--out"),
        ([file, "--out", piece], "--fails-on"),
        ([file, "--bisect", "warp", "--out", piece], "warp"),
        ([file, "--bisect", "onnxruntime", "--out", tmp_path / "nowhere" / "piece.onnx"], "nowhere"),
        ([file, "--bisect", "onnxruntime", "--out", file], "not the graph"),
        ([tmp_path, "--show", "layers"], ".onnx"),
    )
    for arguments, word in cases:
        refused(run("inspect", *arguments), word)
    (tmp_path / "family.json").touch()
    refused(run("validate", "--engines", tmp_path, "--model", "x", "--bisect", tmp_path / "text.onnx"), "text.onnx")
    assert not piece.exists()


def test_without_polygraphy_it_says_what_to_install(exported, run, monkeypatch, tmp_path):
    for name in (
        "tocom.export.cli.inspect_graph",
        "tocom.export.proof.bisect.failing_piece",
        "tocom.export.proof.polygraphy_tools",
    ):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    refused(run("inspect", exported(*CASE).file), "pip install 'tocom[polygraphy]'")
    (tmp_path / "family.json").touch()
    refused(run("validate", tmp_path, "--model", "x", "--compare"), "pip install 'tocom[polygraphy]'")


@pytest.mark.full
def test_a_graph_that_does_not_fail_is_no_graph_to_bisect(exported, run, tmp_path, capsys):
    result = run("inspect", exported("deit_tiny", 8).file, "--bisect", "openvino", "--out", tmp_path / "piece.onnx")
    refused(result, "there is nothing to bisect")
    examine({8: Report(exported("deit_tiny", 8), False, {})}, comparing=False, folder=tmp_path / "pieces")
    assert "r=8: onnxruntime does not fail on the graph as it stands" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_what_fails_only_with_its_batch_open_is_cut_at_its_outputs(altered):
    piece = smallest_failing_piece(altered(CONSTANT_DET, ("deit_tiny", 8)), "openvino")
    assert piece.operators == Counter(["Det"])


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_typed_graphs_that_onnx_runtime_may_not_run_are_cut_as_well(precision, altered):
    def nodes(x):
        (scatter,) = SCATTER[0]("wide")
        scatter.output[0] = "added"
        half = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
        return [helper.make_node("Cast", [x], ["wide"], to=TensorProto.FLOAT), scatter,
                helper.make_node("Cast", ["added"], ["put"], to=half)]  # fmt: skip

    file = altered((nodes, SCATTER[1]), ("deit_tiny", 8), precision)
    assert smallest_failing_piece(file, "tensorrt-rtx").operators == Counter(["ScatterElements"])


@pytest.mark.full
def test_a_piece_that_takes_its_process_down_fails(exported, monkeypatch):
    trial = failing_piece.Trial("onnxruntime", "fp32", None, Path("no values"))
    with failing_piece._Worker("onnxruntime") as worker:
        with monkeypatch.context() as patch:
            patch.setattr(failing_piece, "_failure", crash)
            assert worker.failure(trial, exported(*CASE).file) == "onnxruntime takes its process down"
        with pytest.raises(FileNotFoundError):  # the next one is tried in another process
            worker.failure(trial, exported(*CASE).file)


@pytest.mark.full
def test_a_piece_that_never_ends_fails(tmp_path, monkeypatch):
    trial = failing_piece.Trial("onnxruntime", "fp32", None, Path("no values"))
    monkeypatch.setattr(failing_piece, "_failure", hang)
    with failing_piece._Worker("onnxruntime", seconds=0.5) as worker:
        for _ in range(2):
            assert worker.failure(trial, tmp_path) == "onnxruntime is not done with it after 0.5 seconds"


@pytest.mark.full
def test_validate_compares_a_family(run, tmp_path):
    example = Path(__file__).resolve().parents[3] / "examples" / "digits"
    files = ["--model", example, "--compensator", example / "compensator.safetensors", "--degrees", "8"]
    assert run("compile", *files, "--source-degree", 0, "--backend", "openvino", "--out", tmp_path / "family")[0] == 0
    before = {file.name for file in (tmp_path / "family").iterdir()}
    status, said, told = run(
        "validate", *files, "--engines", tmp_path / "family", "--compare", "--bisect", tmp_path / "no"
    )
    assert status == 0, told
    assert "openvino fp32 (listed)" in said and "onnxruntime fp32" in said and not (tmp_path / "no").exists()
    assert {file.name for file in (tmp_path / "family").iterdir()} == before
