"""What the command says before anything heavy is loaded: its help, its versions, and what cannot be meant."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tocom.export.cli.__main__ import COMMANDS, make_app
from tocom.export.cli.old_names import in_todays_words
from tocom.export.cli.reference import reference

ROOT = Path(__file__).resolve().parents[3]
NAMES = [name for commands in COMMANDS.values() for name in commands]
HEAVY = ("torch", "timm", "onnx", "onnxruntime", "openvino", "PIL")


FAMILY = "FAMILY"  # stands for a folder with a family.json


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    (folder / "family.json").write_text("{}")
    return folder


def placed(arguments: tuple[str, ...], family: Path) -> list[str]:
    return [str(family) if word == FAMILY else word for word in arguments]


def run(*arguments: object, blocked: tuple[str, ...] = (), cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which some modules cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = {['tocom', *map(str, arguments)]!r}\nfrom tocom.__main__ import main\nmain()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2 and done.stdout == "", done
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("tocom: "), done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


MODEL = ("--model", "examples/digits")
COMPILE = ("compile", *MODEL, "--degrees", "8", "--out", "/nowhere/out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "int3"), ["int3", "--precision", "fp32"]),
        (("--precision", "fp16", "--backend", "openvino"), ["fp16", "openvino", "onnxruntime"]),
        (("--schedule", "sudden"), ["sudden", "--schedule", "constant", "strided"]),
        (("--reduction", "drop"), ["drop", "merge", "prune"]),
        (("--backend", "warp"), ["warp", "auto", "tensorrt-rtx"]),
        (("--degrees", "eight"), ["'eight'", "degrees must be whole numbers"]),
        (("--checkpoint", "/nowhere/a.pth"), ["there is no /nowhere/a.pth", "--checkpoint"]),
        (("--images", "/nowhere/images"), ["there is no /nowhere/images", "--images"]),
        (("--calibration", "/nowhere/images"), ["there is no /nowhere/images", "--calibration"]),
        (("--model", "examples/digit"), ["examples/digit", "--model"]),
        (("--model-arg", "depth"), ["NAME=VALUE", "depth"]),
        (("--limit", "2.5"), ["--limit", "whole number", "2.5"]),
        (("--limit", "0"), ["--limit", "1 or more", "0"]),
        (("--plan-batch", "8:4:2"), ["MIN <= OPT <= MAX", "8:4:2"]),
        (("--plan-target", "gtx"), ["sm89", "gtx"]),
        (("--plan-option", "fast"), ["fast", "stripped"]),
        (("--rounding", "up"), ["up", "gptq"]),
        (("--max-drop", "101"), ["--max-drop", "0 to 100"]),
        (("--config", "/nowhere/compile.toml"), ["/nowhere/compile.toml"]),
        (("--degre", "8"), ["--degre", "--degrees"]),
        (("more",), ["no place for more"]),
    ],
)
def test_a_wrong_value_is_refused_before_torch_loads(options: tuple[str, ...], words: list[str]) -> None:
    refused(run(*COMPILE, *options, blocked=HEAVY), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("comple",), ["comple", "compile"]),
        (("compile", "--model", "examples/digits"), ["needs --out", "tocom compile --help"]),
        (("quantize", *COMPILE[1:], "--precision", "fp32"), ["fp32", "int8"]),
        (("validate",), ["needs FAMILY"]),
        (("validate", "/nowhere"), ["no family.json in /nowhere"]),
        (("validate", FAMILY, *MODEL, "--candidate", "abacus"), ["--candidate", "abacus", "BACKEND:PRECISION"]),
        (("validate", FAMILY, *MODEL, "--against", "torch:int8"), ["--against", "int8", "fp64"]),
        (("validate", FAMILY, *MODEL, "--candidate", "openvino:fp16"), ["--candidate", "fp16", "bf16"]),
        (("frontier", "/nowhere"), ["no family.json in /nowhere"]),
        (("frontier", FAMILY, "--batch", "1,x"), ["--batch", "1,x"]),
        (("cascade", FAMILY, "--images", "/nowhere"), ["there is no /nowhere"]),
        (("distill", "--model", "examples/digits", "--images", ".", "--out", "c", "--augment", "much"), ["light"]),
        (("serve", FAMILY, "--port", "0"), ["--port", "1 to 65535"]),
        (("inspect", "/nowhere"), ["there is no /nowhere"]),
    ],
)
def test_other_commands_likewise(arguments: tuple[str, ...], words: list[str], family: Path) -> None:
    refused(run(*placed(arguments, family), blocked=("torch", "timm", "onnx", "PIL")), *words)


def test_help_names_every_command_and_loads_none() -> None:
    done = run("--help", blocked=(*HEAVY, "numpy"))
    assert done.returncode == 0 and not done.stderr
    for title, commands in COMMANDS.items():
        assert f" {title} " in done.stdout
        assert all(re.search(rf"│ {name} ", done.stdout) for name in commands)
    assert run(blocked=HEAVY).stdout == done.stdout


def test_version_is_one_line() -> None:
    done = run("--version", blocked=HEAVY)
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and re.match(r"tocom \d+\.\d+\.\d+ \(Python 3\.\d+", said)
    assert "torch " in said and "timm " in said and "onnx " in said


@pytest.mark.parametrize("name", NAMES)
def test_every_help_explains_itself(name: str) -> None:
    done = run(name, "--help", blocked=("torch", "timm", "onnx"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = done.stdout.lower()
    assert "examples" in text and f"tocom {name}" in text and "exit status" in text
    if name != "infer":
        assert "see also" in text and "writes" in text


def options_of(name: str) -> dict[str, str]:
    """Option -> the placeholder of its value, as --help shows them."""
    app = make_app(*NAMES)[name]
    return {option: str(argument.parameter.metavar) for argument in app.assemble_argument_collection()
            for option in argument.names if option.startswith("--")}  # fmt: skip


def test_examples_name_options_that_there_are() -> None:
    for name in NAMES:
        if name == "infer":
            continue
        known = {*options_of(name), "--help"}
        for line in make_app(*NAMES)[name].default_command.__doc__.splitlines():
            for call in re.findall(rf"tocom {name} ([^&`]*)", line):
                assert {word for word in call.split() if word.startswith("--")} <= known, line


def test_an_option_means_one_thing_in_all_commands() -> None:
    """What is given with an option has one placeholder everywhere; --out and --images are files or folders."""
    values: dict[str, set[str]] = {}
    for name in NAMES:
        if name != "infer":
            for option, metavar in options_of(name).items():
                values.setdefault(option, set()).add(metavar)
    several = {option: metavars for option, metavars in values.items() if len(metavars) > 1}
    assert several == {
        "--out": {"FOLDER", "FILE"},
        "--images": {"FOLDER", "FOLDER|NAME"},
        "--batch": {"N", "N,..."},  # images per call; a frontier is drawn for several
        "--backend": {"None", "NAME"},
    }


def test_a_family_is_an_argument_and_never_an_option() -> None:
    assert not any("--engines" in options_of(name) or "--family" in options_of(name) for name in NAMES)


def test_quantize_takes_what_compile_takes() -> None:
    assert options_of("quantize") == options_of("compile")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("validate --engines e --degrees 8", "validate e --degrees 8"),
        ("frontier --batch 1 --engines=e", "frontier e --batch 1"),
        ("quantize --format fp8 --batch 1:2:3", "quantize --precision fp8 --plan-batch 1:2:3"),
        ("compile --target sm89", "compile --plan-target sm89"),
        ("distill --batch 64", "distill --batch-size 64"),
        ("cascade --engines e --json f", "cascade e --json-file f"),
        ("inspect g.onnx --bisect openvino", "inspect g.onnx --fails-on openvino"),
        ("infer --engines e a.png", "infer --engines e a.png"),
        ("serve e --target 3", "serve e --target 3"),
    ],
)
def test_what_was_said_before_is_understood(before: str, now: str) -> None:
    assert in_todays_words(before.split()) == now.split()


def test_completion_knows_values(tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = run("--show-completion", shell).stdout
        for word in (*NAMES, "--precision", "int4-weights", "tensorrt-rtx", "prune", "percentile"):
            assert word in script, (shell, word)
    code = "import sys; sys.argv[0] = 'tocom'\nfrom tocom.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "--install-completion", "fish"], capture_output=True, text=True,
                          check=True, env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    assert "installed" in done.stdout and list(tmp_path.rglob("tocom.fish"))


def test_the_page_of_all_options_is_as_the_commands_are() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), "python -m tocom.export.cli.reference > docs/cli.md"


# --- what is not installed


@pytest.mark.parametrize(
    ("arguments", "missing", "words"),
    [
        (COMPILE, "torch", ["compiling needs torch", "pip install 'tocom[compile]'"]),
        (("quantize", *COMPILE[1:]), "onnxscript", ["compiling needs onnxscript", "tocom[compile]"]),
        (("choose-scale", "--model", "examples/digits", "--compensator", "examples/digits/compensator.safetensors",
          "--source-degree", "0", "--degrees", "8", "--images", ".", "--out", "/nowhere"), "timm", ["tocom[compile]"]),
        (("distill", "--model", "examples/digits", "--images", ".", "--out", "c"), "lightning_fabric",
         ["tocom[distill]"]),
        (("validate", FAMILY, "--model", "examples/digits"), "torch", ["tocom[compile]"]),
        (("validate", FAMILY, "--model", "examples/digits", "--report", "r"), "matplotlib", ["tocom[report]"]),
        (("validate", FAMILY, "--model", "examples/digits", "--compare"), "polygraphy", ["tocom[polygraphy]"]),
        (("frontier", FAMILY, "--out", "f.png"), "matplotlib", ["tocom[report]"]),
        (("inspect", "examples/digits/compensator.safetensors"), "torch", ["tocom[compile]"]),
        (("serve", FAMILY), "mlserver", ["tocom[serve]"]),
        (("serve-ray", FAMILY), "ray", ["tocom[ray]"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_its_extra(
    arguments: tuple[str, ...], missing: str, words: list[str], family: Path
) -> None:
    refused(run(*placed(arguments, family), blocked=(missing,)), missing, *words)


def test_without_an_engine_library_both_extras_are_named(family: Path) -> None:
    engines = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    for arguments in (("infer", ".", "a.png"), ("frontier", FAMILY), ("cascade", FAMILY, "--images", ".")):
        refused(run(*placed(arguments, family), blocked=engines), "tocom[cpu]", "tocom[gpu]")


LIGHT = ("torch", "timm", "onnx", "onnx_ir", "onnxscript", "safetensors", "tomli_w", "matplotlib", "jinja2", "mlserver")


def test_doctor_needs_no_more_than_the_base() -> None:
    done = run("doctor", blocked=LIGHT)
    assert done.returncode == 0 and "tocom[compile]" in " ".join(done.stdout.split()), done
    assert "onnxruntime" in done.stdout


def test_a_family_is_shown_and_run_without_the_compiler(tmp_path: Path) -> None:
    from tests.export.cli.test_budgets import make_family

    family = make_family(tmp_path / "family", r0=(16, 1), r8=(3, 0))
    done = run("inspect", family, blocked=LIGHT)
    assert done.returncode == 0 and "all files as listed" in done.stdout, done
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 0, 0)).save(tmp_path / "red.png")
    for order in (("infer", family, "--json", tmp_path / "red.png"),
                  ("infer", "--json", "--engines", family, tmp_path / "red.png")):  # fmt: skip
        done = run(*order, blocked=LIGHT)
        assert done.returncode == 0 and json.loads(done.stdout)["predictions"][0]["name"] == "red", done
