"""Pruning and strided schedules through the commands, as a user would run them, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import save_file

from tocom.compensator import Compensator, CompensatorInfo
from tocom.export.cli import __main__ as cli
from tocom.reduction import PRUNE
from tocom.runtime.engines.base import open_engine
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import Family
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
MODEL = ["--model", NAME, *(part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}"))]
HOW = ["--schedule", "strided:2", "--reduction", "prune"]
SCHEDULE = MergeSchedule((4, 0, 4), 17)  # degree 2 of strided:2, for three blocks

Run = Callable[..., tuple[int, str, str]]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=4, **ARGS).eval().requires_grad_(False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; returns its status, stdout and stderr."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capfd.readouterr()
        return left.value.code, printed.out, printed.err

    return go


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and compensators for three ways of removing tokens."""
    folder = tmp_path_factory.mktemp("given")
    save_file(model().state_dict(), folder / "model.safetensors")
    for schedule, reduction in (("strided:2", "prune"), ("strided:2", "merge"), ("constant", "prune")):
        torch.manual_seed(1)
        info = CompensatorInfo(width=32, depth=3, backbone=NAME, schedule=schedule, reduction=reduction)
        compensator = Compensator(info)
        for weight in compensator.parameters():
            weight.data.normal_(0, 0.3)
        (folder / f"{schedule}-{reduction}.safetensors").write_bytes(compensator.to_safetensors())
    return folder


@pytest.fixture(scope="module")
def compiled(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned, strided and compensated family."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["tocom", *map(str, compile_with(given, out, *HOW, *compensated(given)))])
        cli.main()
    assert left.value.code == 0
    return out


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "copy"))


def compile_with(given: Path, out: Path, *extra: object) -> list[object]:
    return ["compile", *MODEL, "--checkpoint", given / "model.safetensors", "--degrees", 2, "--out", out, *extra]


def compensated(given: Path, made_for: str = "strided:2-prune") -> list[object]:
    return ["--compensator", given / f"{made_for}.safetensors", "--source-degree", 0]


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Status 2 and one line that holds the words."""
    status, _, err = result
    errors = [line for line in err.splitlines() if line.startswith("tocom: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in errors[0], (word, err)


@torch.no_grad()
def test_a_pruned_strided_family_is_what_it_says(compiled: Path, given: Path) -> None:
    """Against the unfused compensator beside the untouched timm model: nothing of fuse, lower or build is shared."""
    family = Family.read(compiled)
    assert (family.schedule, family.reduction) == ("strided:2", "prune")
    entry = family.entry(2)
    assert (entry.schedule, entry.tokens) == ((4, 0, 4), (17, 13, 13, 9))
    assert entry.validation["passed"] and entry.validation["decisions"] == 12 * 5
    graph = onnx.load(compiled / entry.onnx, load_external_data=False)
    nodes = [(node.op_type, node.name) for node in graph.graph.node if node.domain == "ai.tocom"]
    assert nodes == [("TokenPrune", "block.0.prune")]  # behind the last block only the class token is read
    compensator = Compensator.load(given / "strided:2-prune.safetensors")
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = ReducedViT(model(), SCHEDULE, compensator.between(0, 2, 0.1), PRUNE)(images).numpy()
    with open_engine(compiled / entry.engine, entry.backend) as runner:
        np.testing.assert_allclose(runner.infer(images.numpy()), expected, rtol=0, atol=1e-5)
    for other in (ReducedViT(model(), SCHEDULE, reduction=PRUNE), ReducedViT(model(), SCHEDULE)):
        assert np.abs(other(images).numpy() - expected).max() > 1e-3  # the compensator does something, and so does how


def test_it_is_validated_and_shown_as_what_it_is(run: Run, compiled: Path, given: Path) -> None:
    status, out, _ = run("inspect", compiled)
    assert status == 0 and "schedule strided:2" in out and "reduction prune" in out
    files = [*MODEL, "--checkpoint", given / "model.safetensors", *compensated(given)[:2]]
    status, out, _ = run("validate", "--engines", compiled, *files)
    assert status == 0 and out.count("pass") == 2


def test_an_engine_that_drops_other_tokens_is_status_1(run: Run, copy: Path, given: Path) -> None:
    """File and hash agree, and the logits follow from what it drops: only the decisions are wrong."""
    family = Family.read(copy)
    entry = family.entry(2)
    graph = onnx.load(copy / entry.onnx, load_external_data=False)
    ranking = next(node for node in graph.functions[0].node if node.op_type == "TopK")
    next(attribute for attribute in ranking.attribute if attribute.name == "largest").i = 0
    (copy / entry.onnx).write_bytes(graph.SerializeToString())
    manifest = json.loads((copy / "family.json").read_text())
    manifest["engines"][1]["sha256"][entry.onnx] = sha256_file(copy / entry.onnx)
    (copy / "family.json").write_text(json.dumps(manifest))
    files = [*MODEL, "--checkpoint", given / "model.safetensors", *compensated(given)[:2]]
    status, out, _ = run("validate", "--engines", copy, *files, "--degrees", 2)
    assert status == 1 and "FAIL" in out


@pytest.mark.parametrize(
    "how",
    [["--reduction", "prune"], ["--schedule", "strided:2"], ["--schedule", "strided:3", "--reduction", "prune"]],
    ids=["another schedule", "another reduction", "another stride"],
)
def test_a_folder_of_another_schedule_or_reduction_is_kept(run: Run, compiled: Path, given: Path, how: list) -> None:
    before = {file.name: file.read_bytes() for file in compiled.iterdir()}
    refused(run(*compile_with(given, compiled, *how)), "schedule or reduction", "--replace")
    assert {file.name: file.read_bytes() for file in compiled.iterdir()} == before


def test_a_compensator_trained_for_another_way_is_refused(run: Run, given: Path, tmp_path: Path) -> None:
    for made_for, words in (
        ("strided:2-merge", ["trained for reduction merge", "--reduction merge"]),
        ("constant-prune", ["trained for schedule constant", "--schedule constant"]),
    ):
        refused(run(*compile_with(given, tmp_path / "out", *HOW, *compensated(given, made_for))), *words)
    refused(
        run(*compile_with(given, tmp_path / "out", *compensated(given))), "trained for schedule strided:2, but schedule"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_pruned_or_scheduled_is_refused(run: Run, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*compile_with(given, out, "--reduction", "drop")), '"merge", "prune"', "drop")
    refused(run(*compile_with(given, out, "--schedule", "strided:1")), "strided:K", "'strided:1'")
    refused(run(*compile_with(given, out, "--schedule", "strided:4")), "3 blocks", "strided:4")
    refused(run(*compile_with(given, out, "--schedule", "0,1")), "3 blocks", "got 2")
    without = timm.create_model(NAME, num_classes=4, class_token=False, global_pool="avg", **ARGS)
    save_file(without.state_dict(), tmp_path / "without.safetensors")
    pooled = ["--model-arg", "class_token=False", "--model-arg", "global_pool='avg'"]
    arguments = ["compile", *MODEL, *pooled, "--checkpoint", tmp_path / "without.safetensors", "--degrees", 2]
    refused(run(*arguments, "--out", out, "--reduction", "prune"), "no class token", "--reduction merge")
    assert not out.exists()


def test_a_manifest_without_the_keys_is_of_constant_merging(copy: Path) -> None:
    manifest = json.loads((copy / "family.json").read_text())
    del manifest["schedule"], manifest["reduction"]
    (copy / "family.json").write_text(json.dumps(manifest))
    family = Family.read(copy)
    assert (family.schedule, family.reduction) == ("constant", "merge")
