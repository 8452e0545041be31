"""`tocom validate` between any two sides, and what it says where one goes wrong: a network that overflows float16."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import onnx
import pytest
import sklearn.datasets
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from tocom.export.artifacts import Report
from tocom.export.cli import __main__ as cli
from tocom.export.proof.bisect.operators import operators_of_block
from tocom.export.proof.bisect.recovery import recover
from tocom.export.proof.findings import BlockFindings
from tocom.export.proof.gates import GATES
from tocom.export.proof.reference import in_format
from tocom.export.proof.side import Side
from tocom.export.proof.tally import Tally
from tocom.export.proof.validate import validate
from tocom.export.proof.validate_family import ValidateOptions, validate_family
from tocom.export.source.images import default_images
from tocom.export.source.options import CompileOptions
from tocom.runtime.errors import InputError

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
OVERFLOWING = 1  # the block whose MLP does


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with numbers above 65,504, the largest of float16, behind one product; the next scales them back."""
    torch.manual_seed(0)
    state = timm.create_model(NAME, **ARGS).state_dict()
    product = f"blocks.{OVERFLOWING}.mlp"
    for name in ("weight", "bias"):
        state[f"{product}.fc1.{name}"][:4] *= 1e6
    state[f"{product}.fc2.weight"][:, :4] /= 1e6
    file = tmp_path_factory.mktemp("given") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def given(checkpoint: Path) -> list[object]:
    words = [
        part for name, value in ARGS.items() if name != "num_classes" for part in ("--model-arg", f"{name}={value}")
    ]
    return ["--model", NAME, *words, "--checkpoint", checkpoint]


@pytest.fixture(scope="module")
def family(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, "compile", *given(checkpoint), "--degrees", 2, "--out", out) == 0
    return out


def options_for(checkpoint: Path, family: Path, **sides: object) -> ValidateOptions:
    arguments = {name: value for name, value in ARGS.items() if name != "num_classes"}
    files = CompileOptions(model=NAME, out=family, degrees=(2,), checkpoint=checkpoint, model_args=arguments)
    return ValidateOptions(files, **sides)


@pytest.mark.parametrize(
    "sides",
    [
        {},
        {"against": "torch:fp32"},
        {"candidate": "torch:bf16"},
        {"candidate": "openvino", "batch": 1},
        {"candidate": "openvino:bf16"},
        {"candidate": "tensorrt-rtx:bf16"},
    ],
    ids=lambda sides: " ".join(map(str, sides.values())) or "as listed",
)
def test_every_side_passes(checkpoint: Path, family: Path, sides: dict[str, object]) -> None:
    report = validate_family(options_for(checkpoint, family, **sides)).reports[2]
    found = report.findings
    assert report, found.faults
    assert found.reference == sides.get("against", "torch:fp64").replace(":", " ")
    assert found.unexplained == 0 and found.images == 12
    parts = {part for block in found.blocks.values() for part in block.parts}
    assert {"embedding", "reduction", "mlp", "head"} <= parts


def test_two_engines_are_proven_each_and_put_beside_each_other(checkpoint: Path, family: Path) -> None:
    found = validate_family(options_for(checkpoint, family, against="openvino:bf16")).reports[2].findings
    assert found.passed and found.against.passed
    assert (found.candidate, found.against.candidate) == ("onnxruntime fp32", "openvino bf16")
    pair = found.pair
    assert pair.images == 12 and 0 < pair.images_alike <= 12
    assert pair.images_alike + sum(pair.first_difference.values()) == 12
    assert 1e-5 < pair.logit_error_alike < 0.1  # as far as bfloat16 is from float32


@pytest.mark.full
def test_where_float16_goes_wrong_and_what_brings_it_back(
    checkpoint: Path,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    half = ["--precision", "fp16", "--backend", "onnxruntime", "--degrees", 2, "--out", tmp_path / "half"]
    assert run(monkeypatch, "compile", *given(checkpoint), *half) == 1
    said = capsys.readouterr().err
    assert "block 1, mlp" in said and "--candidate onnxruntime:fp16 --bisect" in said

    sides = ["--engines", family, "--candidate", "onnxruntime:fp16", "--degrees", 2, "--bisect", tmp_path / "pieces"]
    assert run(monkeypatch, "validate", *given(checkpoint), *sides) == 1
    said = capsys.readouterr().out
    assert "r=2 FAILS: block 1, mlp" in said
    assert "r=2: blocks.1.mlp.fc1: inf" in said
    assert "it passes with blocks 1 in float32: tocom compile --float-blocks 1" in said
    assert not [file for file in family.iterdir() if "debug" in file.name]

    assert run(monkeypatch, "compile", *given(checkpoint), *half, "--float-blocks", "1") == 0
    beside = options_for(checkpoint, family, against=str(tmp_path / "half"))
    assert validate_family(beside).reports[2].findings.against.passed
    listed = json.loads((tmp_path / "half" / "family.json").read_text())["engines"]
    assert [engine["validation"]["float_blocks"] for engine in listed] == [[1], [1]]


BAD_SIDES = pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidate", "abacus"], "what is compared must be engines, torch:FORMAT"),
        (["--against", "torch:int8"], "torch computes in fp64"),
        (["--candidate", "openvino:fp16"], "openvino computes in"),
        (["--candidate", "onnxruntime:int8"], "takes int8 from a graph in"),
        (["--image", "nowhere.png"], "--image is for the report"),
        (["--batch", "0"], "must be 1 or more"),
    ],
)


def test_the_report_is_written_with_pictures(
    checkpoint: Path, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    words = ["--engines", family, "--report", tmp_path / "proof", "--image", image]
    assert run(monkeypatch, "validate", *given(checkpoint), *words) == 0
    told = json.loads((tmp_path / "proof" / "report.json").read_text())
    assert told["passed"] and set(told["degrees"]) == {"0", "2"}
    assert told["candidate"] == "onnxruntime fp32" and told["against"] == "torch fp64"
    assert told["degrees"]["2"]["pictures"] is not None
    assert "# " in (tmp_path / "proof" / "report.md").read_text()
    assert "<svg" in (tmp_path / "proof" / "report.html").read_text()


@BAD_SIDES
def test_bad_sides(
    checkpoint: Path,
    family: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    assert run(monkeypatch, "validate", *given(checkpoint), "--engines", family, *words) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]


@pytest.mark.parametrize(
    ("blocks", "said"), [("9", "float blocks must be among 0 to 2"), ("x", "blocks must be whole numbers")]
)
def test_bad_float_blocks(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    blocks: str,
    said: str,
) -> None:
    half = ["--precision", "fp16", "--backend", "onnxruntime", "--degrees", 2, "--out", tmp_path / "out"]
    assert run(monkeypatch, "compile", *given(checkpoint), *half, "--float-blocks", blocks) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_float_blocks_need_a_typed_graph(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = ["--backend", "onnxruntime", "--degrees", 2, "--out", tmp_path / "out", "--float-blocks", "1"]
    assert run(monkeypatch, "compile", *given(checkpoint), *wide) == 2
    assert "float blocks are for fp16 and bf16" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["attn.v", "attn.proj", "mlp.fc2"])
def test_the_first_operator_to_be_wrong_is_named(
    exported, make_vit, fused_of, engine_at, tmp_path: Path, wrong: str
) -> None:
    from tocom.export.graph.lower import reference_model
    from tocom.vit import schedule_for

    engine, model = exported("deit_tiny", 8), make_vit("deit_tiny")
    reference = in_format(reference_model(model, schedule_for(model, 8), fused_of(model, 8)), "fp64")
    shutil.copytree(engine.file.parent, tmp_path / "wrong")
    file = tmp_path / "wrong" / engine.file.name
    graph = onnx.load(file, load_external_data=False)
    node = next(each for each in graph.graph.node if each.name == f"blocks.2.{wrong}.Add")
    bias = next(each for each in graph.graph.initializer if each.name == node.input[1])
    values = numpy_helper.to_array(bias) + 0.1
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    file.write_bytes(graph.SerializeToString())
    tampered = engine_at(engine, file)

    report = validate(tampered, reference, default_images((3, 64, 64)))
    assert report.findings.faults[0].block == 2
    found = operators_of_block(tampered, reference, default_images((3, 64, 64)), 2)
    assert next(each for each in found if each.is_wrong).name == f"blocks.2.{wrong}"
    assert not any(each.is_wrong for each in operators_of_block(engine, reference, default_images((3, 64, 64)), 2))


def test_recovery_keeps_the_first_block_at_fault_each_time() -> None:
    def report(wrong: tuple[int, ...]) -> Report:
        allowed = GATES["fp32"].part * GATES["fp32"].unit_roundoff
        parts = [{"mlp": 2 * allowed if block in wrong else allowed / 5} for block in range(4)]
        tally = Tally(depth=4, blocks={block: BlockFindings(parts=errors) for block, errors in enumerate(parts)})
        return Report(None, not wrong, tally.findings())

    tried = []

    def remake(kept: tuple[int, ...]) -> Report:
        tried.append(kept)
        return report(tuple(block for block in (3, 1) if block not in kept))

    recovery = recover(remake, 4)
    assert (recovery.blocks, bool(recovery.report), tried) == ((1, 3), True, [(), (1,), (1, 3)])
    assert recover(lambda _: report((2,)), 4).blocks == (2, 0, 1, 3)  # nothing helps
    assert recover(lambda _: report((2,)), 0).blocks == ()


def test_words_of_a_side() -> None:
    assert Side.read("openvino") == Side("graph", backend="openvino", precision="fp32")
    with pytest.raises(InputError, match="folder of a family"):
        Side.read("/nowhere")
    assert dataclasses.replace(Side.read("engines")) == Side("engines")
