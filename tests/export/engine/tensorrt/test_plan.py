"""Plans by TensorRT for RTX, which builds them without a GPU: every exported graph is accepted, in every format."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch

import tocom.export.engine.tensorrt.plan
from bench.plain_tome import PlainToMe
from tocom.export.cli.__main__ import main
from tocom.export.engine.tensorrt.plan import PlanOptions, build_plan
from tocom.export.graph.half_precision import FORMATS, typed
from tocom.reduction import PRUNE
from tocom.runtime.backends import available
from tocom.runtime.engines.base import open_engine
from tocom.runtime.engines.tensorrt.plan import check_header
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT

pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tocom[tensorrt-rtx]", exc_type=ImportError
)

RTX = "tensorrt-rtx"
SMALL = PlanOptions(batch=(1, 5, 8), targets=("sm80",))
here_is_a_gpu = any(status.name == RTX and status.usable for status in available())


@pytest.fixture
def typed_file(exported):
    """The file of an exported graph in a format, beside the weights that it refers to."""
    made = []

    def make(case, precision):
        engine = exported(*case)
        made.append(engine.file.with_name(f"{precision}-{len(made)}-{os.getpid()}.onnx"))
        made[-1].write_bytes(typed(onnx.load(engine.file, load_external_data=False), precision).SerializeToString())
        return made[-1]

    yield make
    for file in made:
        file.unlink()


@pytest.mark.full
def test_every_exported_graph_builds(case, typed_file):
    """In one format each, so that all three are spread over families, degrees and reductions."""
    family, degree, _ = case
    precision = FORMATS[(len(family) + degree) % 3]
    plan = build_plan(typed_file(case, precision), RTX, SMALL)
    assert len(plan.content) > 10_000 and not plan.log
    assert check_header(plan.content, RTX, "it")


def test_graphs_of_every_kind_build(kind, typed_file):
    test_every_exported_graph_builds(kind, typed_file)


def test_pruning_every_patch_into_one_token_builds(typed_file):
    assert build_plan(typed_file(("two_patches", 1, PRUNE), "fp16"), RTX, SMALL).content


def test_for_several_targets_and_byte_for_byte_again(typed_file):
    file = typed_file(("deit_tiny", 8), "fp16")
    options = PlanOptions(batch=(1, 8, 32), targets=("sm80", "sm89", "sm120"))
    one, again = (build_plan(file, RTX, options) for _ in range(2))
    assert one.content == again.content
    assert one.content != build_plan(file, RTX, SMALL).content
    assert {other.name for other in file.parent.iterdir() if other.name.startswith(".")} == set()


def test_what_cannot_be_built_is_told(exported, typed_file):
    file = typed_file(("deit_tiny", 8), "fp32")
    graph = onnx.load(file, load_external_data=False)
    next(node for node in graph.functions[0].node if node.op_type == "TopK").op_type = "BottomK"
    file.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match=r"tensorrt-rtx refuses fp32-.*BottomK"):
        build_plan(file, RTX, SMALL)


@pytest.mark.full
def test_a_straightforward_export_of_token_merging_is_refused(make_vit, tmp_path):
    """Why the operator's body is needed: merging by scatter, as PyTorch has it, is no TensorRT graph."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            PlainToMe(ReducedViT(make_vit("deit_tiny"), 8)).eval(),
            (torch.zeros(2, 3, 64, 64),),
            dynamo=True,
            input_names=["pixel_values"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
            opset_version=20,
            verbose=False,
        )
    program.save(tmp_path / "plain.onnx")
    assert any(node.op_type.startswith("Scatter") for node in program.model.graph)
    with pytest.raises(InputError, match=r"refuses plain.onnx: .*[Rr]eduction"):
        build_plan(tmp_path / "plain.onnx", RTX, SMALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("sm90",)}, "builds for sm75, sm80, sm86, sm89, sm120, sm121, current, got sm90"),
        ({"targets": ("ampere",)}, "a target must be a GPU architecture like sm89, got ampere"),
        ({"batch": (4, 2, 8)}, "MIN <= OPT <= MAX, like 1:8:32, got 4:2:8"),
        ({"batch": (0, 2, 8)}, "got 0:2:8"),
    ],
)
def test_bad_options_are_refused(options, words, typed_file):
    with pytest.raises(InputError, match=words):
        build_plan(typed_file(("deit_tiny", 8), "fp32"), RTX, PlanOptions(**options))


@pytest.fixture(scope="module")
def plans(small_example, tmp_path_factory):
    """The example in miniature at degree 8 as plans, by the command line."""
    folder = tmp_path_factory.mktemp("plans")
    command = ["compile", "--model", str(small_example), "--degrees", "8", "--out", str(folder / "family")]
    command += ["--compensator", f"{small_example}/compensator.safetensors", "--source-degree", "0"]
    return [*command, "--backend", RTX, "--precision", "fp16", "--batch", "1:8:32", "--target", "sm80,sm89,sm120"]


def run(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tocom", *map(str, command)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_the_command_line_compiles_the_example(plans, monkeypatch, capsys, tmp_path):
    out = Path(plans[plans.index("--out") + 1])
    status, table, told = run(plans, monkeypatch, capsys)
    assert status == 0, told
    assert "plan MiB" in table and "build s" in table and "sm80, sm89, sm120; batch 1 to 32, best at 8" in table
    family = Family.read(out)
    for entry in family.engines:
        family.check_files(out, entry)
        plan = (out / entry.engine).read_bytes()
        assert check_header(plan, RTX, "it") and entry.build["bytes"] == len(plan)
        assert entry.precision == "fp16" and entry.validation["passed"]
        assert json.loads((out / f"{entry.engine}.log").read_text())["layers"] == entry.build["layers"]
        if not here_is_a_gpu:
            assert "Not run here" in table.replace("\n", " ")
            assert entry.validation["run"] is None and not entry.latency_ms and not entry.pays
            with pytest.raises(InputError, match=r"^backend tensorrt-rtx cannot run here, no usable CUDA device"):
                open_engine(out / entry.engine, RTX, precision="fp16")

    require_folded(out / Family.read(out).entry(8).onnx, tmp_path)

    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix == ".plan"}
    status, _, told = run(plans, monkeypatch, capsys)
    assert status == 0 and told.count("reused") == 2
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix == ".plan"} == before

    validate = ["validate", "--engines", out, "--model", plans[plans.index("--model") + 1]]
    compensator = plans[plans.index("--compensator") + 1]
    status, table, told = run([*validate, "--compensator", compensator, "--per-block"], monkeypatch, capsys)
    assert status == 0, told
    assert "pass" in table and "reduction" in table


def require_folded(graph, folder):
    """TensorRT for RTX would add the compensation to the weights again in every call."""
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    assert any(each.name.endswith(".gate") for each in initializers)
    folded = onnx.load(tocom.export.engine.tensorrt.plan.folded(graph, folder), load_external_data=False)
    moving = {"pixel_values"}
    for node in folded.graph.node:
        assert moving & set(node.input), node
        moving.update(node.output)
    weights = [each for each in folded.graph.initializer if len(each.dims) == 2 and min(each.dims) > 64]
    assert weights and all(each.data_type == onnx.TensorProto.FLOAT16 for each in weights)


def test_bad_plan_options_are_one_line(plans, monkeypatch, capsys):
    for change, words in (
        (["--batch", "8"], "batch of a plan must be MIN:OPT:MAX"),
        (
            ["--plan-option", "fast"],
            '"fast" for --plan-option. Choose from: "hardware-compatible", "version-compatible", "stripped"',
        ),
        (["--target", "sm90"], "tensorrt-rtx .* builds for sm75"),
        (["--precision", "int2"], '"int2" for --precision. Choose from: "fp32", "fp16", "bf16", "int8", "fp8"'),
    ):
        out = Path(plans[plans.index("--out") + 1]).with_name("refused")
        status, _, told = run([*plans, "--out", out, *change], monkeypatch, capsys)
        assert status == 2 and len(told.strip().splitlines()[-1:]) == 1
        assert re.search(words, told), told
        assert not (out / "family.json").exists()
