"""The commands, one after the other, as a user would run them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import SMALL as NAME
from tests.conftest import SMALL_ARGS as ARGS
from tocom.compensator import Compensator
from tocom.export.cli import __main__ as cli
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import Family

MODEL = ["--model", NAME, *(part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}"))]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and twelve images of two classes."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=2, **ARGS).state_dict(), folder / "model.safetensors")
    draw = np.random.default_rng(0)
    for label in "01":
        (folder / "images" / label).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(draw.integers(0, 256, (40, 32, 3), np.uint8)).save(folder / f"images/{label}/{index}.png")
    return folder


def test_from_distilling_to_inferring(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*MODEL, "--checkpoint", folder / "model.safetensors"]
    compensator, out = tmp_path / "compensator.safetensors", tmp_path / "out"

    distilling = ["--images", folder / "images", "--steps", 3, "--batch", 4, "--out", compensator]
    assert run(monkeypatch, "distill", *given, *distilling) == 0
    info = Compensator.load(compensator).info
    assert (info.backbone, info.width, info.depth) == (NAME, 32, 2) and len(info.backbone_sha256) == 64
    assert run(monkeypatch, "inspect", compensator) == 0
    assert NAME in capsys.readouterr().out

    compensated = ["--compensator", compensator, "--images", folder / "images"]
    assert run(monkeypatch, "compile", *given, *compensated, "--source-degree", 0, "--degrees", "4", "--out", out) == 0
    table = capsys.readouterr().out
    for column in (
        "degree",
        "tokens",
        "GMACs",
        "p50",
        "p99",
        "speed-up",
        "logit error",
        "agreement",
        "with compensator",
    ):
        assert column in table
    assert "17 -> 9" in table

    assert run(monkeypatch, "validate", "--engines", out, *given, *compensated) == 0
    assert capsys.readouterr().out.count("pass") == 2

    assert run(monkeypatch, "inspect", out) == 0
    assert "all files as listed" in capsys.readouterr().out

    assert run(monkeypatch, "infer", "--engines", out, "--degree", 4, "--json", folder / "images") == 0
    printed = capsys.readouterr()
    assert {json.loads(line)["degree"] for line in printed.out.splitlines()} == {4}
    assert "correct" in printed.err


def test_a_failing_engine_is_status_1(
    small_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine whose file and hash agree but whose answer is wrong by 1%: validate says so."""
    given = [*MODEL, "--checkpoint", small_family / "model.safetensors"]
    out = Path(shutil.copytree(small_family / "family", tmp_path / "family"))
    entry = Family.read(out).entry(4)
    graph = onnx.load(out / entry.onnx, load_external_data=False)
    last = next(node for node in graph.graph.node if "logits" in node.output)
    last.output[0] = "logits_before"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.01, np.float32), "one_percent"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["logits_before", "one_percent"], ["logits"]))
    onnx.save(graph, out / entry.onnx)
    manifest = json.loads((out / "family.json").read_text())
    manifest["engines"][1]["sha256"][entry.onnx] = sha256_file(out / entry.onnx)
    (out / "family.json").write_text(json.dumps(manifest))

    assert run(monkeypatch, "validate", "--engines", out, *given) == 1
    printed = capsys.readouterr().out
    assert "r=4 FAILS: block 1, head" in printed and "r=0 FAILS" not in printed


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    assert "onnxruntime" in printed and "tensorrt-rtx" in printed and "CUDA" in printed


def test_no_command_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.parametrize("command", ["compile", "validate", "distill", "choose-scale", "infer", "inspect", "doctor"])
def test_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "usage" in capsys.readouterr().out.lower()
