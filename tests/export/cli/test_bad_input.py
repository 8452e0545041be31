"""Bad input at every entry point: one line on stderr, status 2, nothing written and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import SMALL as NAME
from tests.conftest import SMALL_ARGS as ARGS
from tests.processes import PROCESSES
from tests.waiting import SAFETY_S
from tocom.compensator import Compensator, CompensatorInfo
from tocom.export.cli import __main__ as cli
from tocom.runtime.infer import main as infer

MODEL = ["--model", NAME, *(part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}"))]
INFO = CompensatorInfo(width=32, depth=2, backbone=NAME)

Run = Callable[..., tuple[int, str]]


def build(**changes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**ARGS, "num_classes": 10, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, small_family: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copyfile(small_family / "model.safetensors", folder / "good.safetensors")
    (folder / "compensator.safetensors").write_bytes(Compensator(INFO).to_safetensors())
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; returns its status and stderr."""

    def go(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tocom", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capfd.readouterr().err

    return go


def refused(result: tuple[int, str], *words: str, stages: bool = False) -> None:
    """Status 2 and one line holding the words; `stages` allows progress before it."""
    status, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("tocom: ", "infer: "))]
    assert status == 2, err
    assert len(errors) == 1 and lines[-1] == errors[0], err
    assert stages or len(lines) <= 2, err  # "loading" may stand before it
    assert "Traceback" not in err
    for word in words:
        assert word in errors[0], (word, err)


def compile_with(
    inputs: Path, out: Path, *extra: object, checkpoint: object = None, degrees: str = "4"
) -> list[object]:
    weights = checkpoint or inputs / "good.safetensors"
    return ["compile", *MODEL, "--checkpoint", weights, "--degrees", degrees, "--out", out, *extra]


class RunsCode:
    """A pickle that would run code when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_unknown_model_suggests_the_nearest(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        run("compile", "--model", "deit_smal_patch16_224", "--degrees", "8", "--out", out), "deit_small_patch16_224"
    )
    assert not out.exists()


def test_unknown_options_and_commands(run: Run) -> None:
    refused(run("comple"), "compile")
    refused(run("compile", "--model", NAME), "--out")
    refused(run("compile", "--degree", "8"), "--degree")


def test_broken_checkpoints(run: Run, inputs: Path, tmp_path: Path) -> None:
    good = (inputs / "good.safetensors").read_bytes()
    marker = tmp_path / "ran"
    torch.save(build().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    with_nan = build().state_dict()
    with_nan["blocks.1.mlp.fc1.weight"][3, 5] = float("nan")
    files = {
        "empty.safetensors": b"",
        "truncated.safetensors": good[: len(good) // 2],
        "text.safetensors": b"this is no checkpoint, it is a sentence",
        "text.pth": b"this is no checkpoint, it is a sentence",
        "truncated.pth": whole[: len(whole) // 2],
        "code.pth": pickle.dumps(RunsCode(marker)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save(RunsCode(marker), tmp_path / "code2.pth")
    torch.save(with_nan, tmp_path / "nan.pth")
    out = tmp_path / "out"
    for name in (*files, "code2.pth", "nan.pth", "missing.pth"):
        refused(run(*compile_with(inputs, out, checkpoint=tmp_path / name)), name)
        assert not out.exists(), name
    assert not marker.exists()


def test_checkpoint_that_does_not_fit(run: Run, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_file(build(embed_dim=48, num_heads=3).state_dict(), tmp_path / "wide.safetensors")
    refused(run(*compile_with(inputs, out, checkpoint=tmp_path / "wide.safetensors")), "must have shape", "wide")
    refused(run(*compile_with(inputs, out, "--num-classes", 7)), "head", "[7", "[10")
    save_file(build(depth=3).state_dict(), tmp_path / "deep.safetensors")
    refused(run(*compile_with(inputs, out, checkpoint=tmp_path / "deep.safetensors")), "blocks.2")
    assert not out.exists()


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (CompensatorInfo(width=32, depth=2, backbone="deit_tiny_patch16_224"), ["deit_tiny_patch16_224", NAME]),
        (CompensatorInfo(width=48, depth=2, backbone=NAME), ["width 48", "width 32"]),
        (CompensatorInfo(width=32, depth=3, backbone=NAME), ["3 blocks", "2 blocks"]),
    ],
)
def test_compensator_of_another_network(
    run: Run, inputs: Path, tmp_path: Path, info: CompensatorInfo, words: list
) -> None:
    (tmp_path / "other.safetensors").write_bytes(Compensator(info).to_safetensors())
    extra = ("--compensator", tmp_path / "other.safetensors", "--source-degree", 0)
    refused(run(*compile_with(inputs, tmp_path / "out", *extra)), *words)
    assert not (tmp_path / "out").exists()


def test_degrees(run: Run, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compensated = ("--compensator", inputs / "compensator.safetensors")
    refused(run(*compile_with(inputs, out, degrees="-1")), "0 or more", "-1")
    refused(run(*compile_with(inputs, out, degrees="4,eight")), "eight")
    refused(run(*compile_with(inputs, out, degrees="4,")), "whole numbers")
    refused(run(*compile_with(inputs, out, degrees="8.5")), "8.5")
    refused(run(*compile_with(inputs, out, *compensated, "--source-degree", 0, degrees="17")), "0..16", "17")
    refused(run(*compile_with(inputs, out, *compensated, "--source-degree", 17)), "0..16", "17")
    refused(run(*compile_with(inputs, out, *compensated)), "--source-degree")
    # 17 tokens, at most 8 of which merge per block: after 40 + 40 none could be left
    refused(run("compile", *MODEL, "--model-arg", "depth=8", "--checkpoint", deep(tmp_path), "--degrees", "40",
                "--out", out), "leave tokens", "40")  # fmt: skip
    assert not out.exists()


def deep(folder: Path) -> Path:
    save_file(build(depth=8).state_dict(), folder / "deep8.safetensors")
    return folder / "deep8.safetensors"


def test_other_options(run: Run, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*compile_with(inputs, out, "--precision", "int3")), "int3", "fp32")
    refused(run(*compile_with(inputs, out, "--backend", "warp")), "warp", "onnxruntime")
    refused(run(*compile_with(inputs, out, "--scale", "nan")), "nan")
    refused(run(*compile_with(inputs, out, "--model-arg", "depth")), "NAME=VALUE")
    refused(run(*compile_with(inputs, out, "--model-arg", "no_such_thing=1")), "no_such_thing")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run(*compile_with(inputs, out, "--images", empty)), "images", "empty")
    refused(run(*compile_with(inputs, out, "--images", tmp_path / "nowhere")), "nowhere")
    assert not out.exists()


def test_folder_that_cannot_be_written(run: Run, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    refused(run(*compile_with(inputs, tmp_path / "file" / "out")), "file")
    refused(run(*compile_with(inputs, tmp_path / "file")), "file")
    assert (tmp_path / "file").read_text() == "here first"


@pytest.fixture
def copy(small_family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_family / "family", tmp_path / "family"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 40), (200, 30, 90)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def _without_large_files(options: list[str], said: Path) -> None:
    """The command as its own process runs it, where the kernel refuses larger files."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    sys.argv = ["tocom", *options]
    cli.main()


def test_no_space_left_keeps_what_is_listed(inputs: Path, copy: Path, tmp_path: Path) -> None:
    """The kernel refuses larger files (as a full disk does): the old family stays whole, no temporary file is left."""
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    options = [str(each) for each in compile_with(inputs, copy, degrees="4,6")]
    process = PROCESSES.Process(target=_without_large_files, args=(options, tmp_path / "said"))
    process.start()
    process.join(SAFETY_S)
    refused((process.exitcode, (tmp_path / "said").read_text()), "too large", stages=True)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_altered_engine(run: Run, copy: Path, image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = next(copy.glob("r04-*.onnx"))
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    refused(run("inspect", copy), graph.name)
    refused((infer(["--engines", str(copy), "--degree", "4", str(image)]), capfd.readouterr().err), graph.name)
    refused(run("infer", "--engines", copy, "--degree", 4, image), graph.name)


def test_altered_engine_is_compiled_again(run: Run, inputs: Path, copy: Path) -> None:
    graph = next(copy.glob("r04-*.onnx"))
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-10])
    assert run(*compile_with(inputs, copy))[0] == 0
    assert graph.stat().st_size == len(whole)
    assert run("inspect", copy)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(format=2), ["format"]),
        (lambda manifest: manifest["engines"][1].update(engine="../outside.onnx"), ["engine"]),
        (lambda manifest: manifest["engines"][1]["sha256"].update({"/etc/passwd": "0" * 64}), ["/etc/passwd"]),
        (lambda manifest: manifest.pop("engines"), ["engines"]),
    ],
)
def test_bad_manifests(run: Run, copy: Path, image: Path, inputs: Path, change: Callable, words: list[str]) -> None:
    manifest = json.loads((copy / "family.json").read_text())
    change(manifest)
    (copy / "family.json").write_text(json.dumps(manifest))
    before = (copy / "family.json").read_bytes()
    refused(run("inspect", copy), *words)
    refused(run("infer", "--engines", copy, image), *words)
    refused(run(*compile_with(inputs, copy)), *words)
    assert (copy / "family.json").read_bytes() == before


def test_bad_images(run: Run, copy: Path, tmp_path: Path, image: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:60])
    (tmp_path / "none").mkdir()
    for name in ("text.png", "empty.png", "half.png", "none", "nowhere"):
        status, err = run("infer", "--engines", copy, tmp_path / name)
        assert status == 2 and name in err and "Traceback" not in err
    refused(run("infer", "--engines", tmp_path / "nowhere", image), "nowhere")
    refused(run("infer", "--engines", copy, "--degree", 9, image), "9", "0, 4")


def test_another_checkpoint_does_not_overwrite(run: Run, inputs: Path, copy: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model(NAME, num_classes=10, **ARGS).state_dict(), tmp_path / "other.safetensors")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    refused(run(*compile_with(inputs, copy, checkpoint=tmp_path / "other.safetensors")), "--replace")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert run(*compile_with(inputs, copy, "--replace", checkpoint=tmp_path / "other.safetensors"))[0] == 0
    assert run("inspect", copy)[0] == 0


def test_two_compiles_into_one_folder(run: Run, inputs: Path, copy: Path) -> None:
    import fcntl

    with (copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run(*compile_with(inputs, copy)), "another compile")


def test_pretrained_weights_without_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    refused(
        run("compile", "--model", "deit_tiny_patch16_224", "--degrees", "8", "--out", tmp_path / "out"), "--checkpoint"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"architecture": 3}',
        '{"architecture": "no_such_net"}',
        '{"architecture": "NAME", "model_args": ARGS, "num_classes": 10, "pretrained_cfg": {"mean": 5}}',
        '{"architecture": "NAME", "model_args": ARGS, "num_classes": 10, "pretrained_cfg": {"label_names": ["a"]}}',
        '{"architecture": "NAME", "model_args": ARGS, "num_classes": 10, "pretrained_cfg": {"interpolation": "magic"}}',
        '{"architecture": "NAME", "model_args": {"depth": "many"}, "num_classes": 10}',
    ],
)
def test_broken_model_folders(run: Run, inputs: Path, tmp_path: Path, config: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config.replace("NAME", NAME).replace("ARGS", json.dumps(ARGS)))
    refused(run("compile", "--model", folder, "--degrees", "4", "--out", tmp_path / "out"), "model")  # no weights
    shutil.copy(inputs / "good.safetensors", folder / "model.safetensors")
    refused(run("compile", "--model", folder, "--degrees", "4", "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
