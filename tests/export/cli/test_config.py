"""compile.toml: every compile writes it, --config repeats it, and validate takes from it what it needs."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tocom.compensator import Compensator, CompensatorInfo
from tocom.export.cli import __main__ as cli
from tocom.export.cli.__main__ import make_app
from tocom.export.cli.options import CompileArgs
from tocom.export.source.record import OPTIONS, CompileRecord, to_table
from tocom.runtime.manifest import Family

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

Run = Callable[..., tuple[int, str, str]]


def save_model(file: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    save_file(timm.create_model(NAME, num_classes=4, **ARGS).state_dict(), file)


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


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    lines = [line for line in err.splitlines() if line != "loading"]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("tocom: "), err
    for word in words:
        assert word in lines[0], (word, err)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a compensator, and the family made from them by relative paths, in out/."""
    folder = tmp_path_factory.mktemp("work")
    save_model(folder / "model.safetensors")
    info = CompensatorInfo(width=32, depth=2, backbone=NAME)
    (folder / "compensator.safetensors").write_bytes(Compensator(info).to_safetensors())
    model = [part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["tocom", "compile", "--model", NAME, *model, "--checkpoint", "model.safetensors",
                                    "--compensator", "compensator.safetensors", "--source-degree", "0", "--degrees",
                                    "4", "--backend", "onnxruntime", "--out", "out"])  # fmt: skip
        cli.main()
    assert left.value.code == 0
    return folder


@pytest.fixture
def work(compiled: Path, tmp_path: Path) -> Path:
    """A copy, as if it had been compiled there."""
    folder = Path(shutil.copytree(compiled, tmp_path / "work"))
    record = folder / "out" / "compile.toml"
    record.write_text(record.read_text().replace(str(compiled), str(folder)))
    return folder


def test_every_compile_writes_what_it_was_asked_for(compiled: Path) -> None:
    table = tomllib.loads((compiled / "out" / "compile.toml").read_text())
    assert (table["checkpoint"], table["compensator"], table["out"]) == (
        "model.safetensors", "compensator.safetensors", "out")  # as given  # fmt: skip
    assert (table["degrees"], table["source-degree"], table["backend"]) == ([0, 4], 0, "onnxruntime")
    assert sorted(table["model-arg"]) == sorted(f"{name}={value}" for name, value in ARGS.items())
    assert table["folder"] == str(compiled) and table["written-by"].startswith("tocom ")
    assert {key: len(digest) for key, digest in table["sha256"].items()} == {"checkpoint": 64, "compensator": 64}


def test_the_same_compile_again_changes_nothing(work: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work / "out"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.chdir(Path.home())
    status, _, err = run("compile", "--config", out)  # the folder stands for its compile.toml
    assert status == 0 and "r=4: reused" in err, err
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    record = CompileRecord.read(out)
    assert record.value("checkpoint") == str(work / "model.safetensors")
    assert {name for name in after if after[name] != before.get(name)} <= {"compile.toml"}


def test_what_the_command_line_names_wins(work: Path, run: Run) -> None:
    other = work / "other"
    assert run("compile", "--config", work / "out/compile.toml", "--degrees", 2, "--out", other)[0] == 0
    assert [entry.degree for entry in Family.read(other).engines] == [0, 2]
    assert tomllib.loads((other / "compile.toml").read_text())["degrees"] == [0, 2]
    assert [entry.degree for entry in Family.read(work / "out").engines] == [0, 4]


def test_degrees_of_earlier_compiles_stay_in_the_record(work: Path, run: Run) -> None:
    assert run("compile", "--config", work / "out", "--degrees", 2)[0] == 0
    assert tomllib.loads((work / "out/compile.toml").read_text())["degrees"] == [0, 2, 4]


def test_quantize_takes_a_family_that_is_not_quantized(work: Path, run: Run) -> None:
    out = work / "int8"
    assert run("quantize", "--config", work / "out", "--out", out, "--degrees", 0, "--calibration-images", 8)[0] == 0
    table = tomllib.loads((out / "compile.toml").read_text())
    assert (table["precision"], table["calibration-images"]) == ("int8", 8)
    assert Family.read(out).engines[0].precision == "int8"
    assert run("validate", out)[0] == 0


def test_validate_finds_what_the_family_was_made_from(
    work: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # the recorded paths are relative ones
    for family in (work / "out", os.path.relpath(work / "out")):
        status, out, err = run("validate", family)
        assert status == 0 and out.count("pass") == 2, err


def test_a_moved_checkpoint_is_told_and_can_be_named(work: Path, run: Run) -> None:
    (work / "model.safetensors").rename(work / "moved.safetensors")
    refused(run("validate", work / "out"), "model.safetensors, which is not there any more", "--checkpoint")
    assert run("validate", work / "out", "--checkpoint", work / "moved.safetensors")[0] == 0
    (work / "compensator.safetensors").rename(work / "elsewhere.safetensors")
    moved = ("--checkpoint", work / "moved.safetensors")
    refused(run("validate", work / "out", *moved), "the compensator", "--compensator")
    assert run("validate", work / "out", *moved, "--compensator", work / "elsewhere.safetensors")[0] == 0


def test_a_changed_checkpoint_is_told(work: Path, run: Run) -> None:
    save_model(work / "model.safetensors", seed=1)
    refused(run("validate", work / "out"), "the checkpoint", "model.safetensors has changed since", "--checkpoint")
    # who names it is told what is wrong with it
    refused(run("validate", work / "out", "--checkpoint", work / "model.safetensors"), "another checkpoint")


def test_a_family_of_before_says_what_to_give(work: Path, run: Run) -> None:
    (work / "out/compile.toml").unlink()
    refused(run("validate", work / "out"), "no compile.toml", "--model", "--checkpoint", "--compensator")
    model = [part for name, value in ARGS.items() for part in ("--model-arg", f"{name}={value}")]
    files = ("--checkpoint", work / "model.safetensors", "--compensator", work / "compensator.safetensors")
    assert run("validate", "--engines", work / "out", "--model", NAME, *model, *files)[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('precison = "fp16"\n', ["'precison'", "no option of `tocom compile`", "Did you mean precision?"]),
        ('something = 1\n', ["'something'", "no option of `tocom compile`"]),
        ("precision = [\n", ["must be a TOML file"]),
        ("model = 5\n", ["model must be a path"]),
        ('precision = "int3"\n', ["int3", "fp32"]),
        ("precision = {}\n", ["precision must be a text"]),
        ('degrees = ["eight"]\n', ["'eight'"]),
        ('limit = 2.5\n', ["2.5"]),
        ('replace = "perhaps"\n', ["perhaps"]),
        ('checkpoint = "nowhere.pth"\n', ["nowhere.pth"]),
        ("folder = 5\n", ["folder must be a path"]),
        ('sha256 = "0"\n', ["sha256 a table"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(run: Run, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "family.toml"
    file.write_text(text)
    required = ("--model", NAME, "--degrees", 4, "--out", tmp_path / "out")
    if text.startswith(("model", "degrees")):
        required = tuple(part for part in required if str(part) not in ("--model", NAME, "--degrees", "4"))
    refused(run("compile", "--config", file, *required), *words)
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "family.toml").write_bytes(b"\xff\xfe\x00")
    refused(run("compile", "--config", tmp_path / "family.toml"), "must be a TOML file")


def parsed(*arguments: object) -> CompileArgs:
    _, bound, _ = make_app("compile").parse_args(
        ["compile", *map(str, arguments)], exit_on_error=False, print_error=False
    )
    return bound.kwargs["args"]


def test_all_options_survive_the_file(tmp_path: Path) -> None:
    """What is written is read as the same options, whichever they are."""
    for name in ("model.pth", "compensator.pth", "images"):
        (tmp_path / name).touch()
    given = parsed(
        "--model", NAME, "--checkpoint", tmp_path / "model.pth", "--compensator", tmp_path / "compensator.pth",
        "--source-degree", 3, "--degrees", "16,8", "--scale", -0.25, "--precision", "int8", "--backend", "tensorrt-rtx",
        "--images", tmp_path / "images", "--limit", 7, "--num-classes", 5, "--model-arg", "img_size=384",
        "--model-arg", "global_pool=avg", "--schedule", "strided:3", "--reduction", "prune", "--plan-batch", "1:2:3",
        "--plan-target", "sm80,sm89", "--plan-option", "stripped", "--plan-option", "plugin", "--float-blocks", "3,1",
        "--calibration", tmp_path / "images", "--calibration-images", 9, "--choose", "diverse", "--range", "mse",
        "--smooth", "--widen", "--reparameterize", "--rounding", "gptq", "--reconstruct", "--per-degree",
        "--keep-float", "blocks.0.attn.qkv", "--keep-float", "blocks.1.mlp.fc2", "--max-drop", 1.5,
        "--out", tmp_path / "out",
    ).options()  # fmt: skip
    import tomli_w

    table = to_table(given)
    (tmp_path / "compile.toml").write_text(tomli_w.dumps(table))
    assert parsed("--config", tmp_path / "compile.toml").options() == given
    assert {*table} == {*OPTIONS} - {"replace"}
    plain = parsed("--model", NAME, "--degrees", 8, "--out", tmp_path / "out").options()
    (tmp_path / "plain.toml").write_text(tomli_w.dumps(to_table(plain)))
    assert parsed("--config", tmp_path / "plain.toml").options() == plain


def test_every_option_of_a_file_is_one_of_the_command() -> None:
    app = make_app("compile")["compile"]
    known = {argument.name.lstrip("-") for argument in app.assemble_argument_collection() if argument.parse}
    assert known - {"config", "*"} == {*OPTIONS}


def test_a_file_that_is_named_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text(f'model = "{NAME}"\nout = "o"\ndegrees = [8]\nbackend = "openvino"\n')
    monkeypatch.setenv("TOCOM_BACKEND", "tensorrt-rtx")
    assert parsed("--config", tmp_path / "a.toml").backend == "openvino"
    assert parsed("--config", tmp_path / "a.toml", "--backend", "auto").backend == "auto"
    assert parsed("--model", NAME, "--out", "o", "--degrees", 8).backend == "tensorrt-rtx"


def test_choose_scale_takes_the_network_and_not_the_images(work: Path, run: Run) -> None:
    refused(run("choose-scale", "--config", work / "out"), "needs --images")
    (work / "images").mkdir()
    refused(run("choose-scale", "--config", work / "out", "--images", work / "images"), "images")
