"""The pipeline as a whole: what a family holds, what is reused, and what survives being killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tocom.export.family.choose_backend
from tests.processes import PROCESSES
from tests.waiting import SAFETY_S
from tocom.compensator import Compensator, CompensatorInfo
from tocom.export.family.compile import CompileResult, compile_family
from tocom.export.graph.fuse import fuse
from tocom.export.proof.gates import GATES
from tocom.export.proof.validate_family import ValidateOptions, validate_family
from tocom.export.source.options import CompileOptions
from tocom.runtime.degrees.latency import Latency
from tocom.runtime.engines.base import open_engine
from tocom.runtime.manifest import Family
from tocom.vit import ReducedViT

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a compensator that changes something, and images in class folders."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=4, **ARGS).state_dict(), folder / "model.safetensors")
    compensator = Compensator(CompensatorInfo(width=32, depth=2, backbone=NAME))
    for weight in compensator.parameters():
        weight.data.normal_(0, 0.3)
    (folder / "compensator.safetensors").write_bytes(compensator.to_safetensors())
    draw = np.random.default_rng(0)
    for label in range(4):
        (folder / "images" / str(label)).mkdir(parents=True)
        for index in range(3):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{index}.png")
    return folder


def options_for(given: Path, out: Path) -> CompileOptions:
    return CompileOptions(
        model=NAME,
        out=out,
        degrees=(2, 4),
        checkpoint=given / "model.safetensors",
        compensator=given / "compensator.safetensors",
        source_degree=0,
        images=given / "images",
        model_args=ARGS,
    )


@pytest.fixture
def options(given: Path, tmp_path: Path) -> CompileOptions:
    return options_for(given, tmp_path / "out")


@pytest.fixture(scope="module")
def compiled(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompileResult]:
    """Where a family of degrees 0, 2 and 4 lies, and what was told of it."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    return out, compile_family(options_for(given, out))


@pytest.fixture
def copied(options: CompileOptions, compiled: tuple[Path, CompileResult]) -> CompileOptions:
    """Options for a folder in which that family lies already."""
    shutil.copytree(compiled[0], options.out)
    return options


def require_sound(folder: Path) -> tuple[int, ...]:
    """Everything that is listed is whole and runs; returns the listed degrees."""
    if not (folder / "family.json").exists():
        return ()
    family = Family.read(folder)
    for entry in family.engines:
        family.check_files(folder, entry)
        with open_engine(folder / entry.engine, entry.backend) as runner:
            assert np.isfinite(runner.infer(np.zeros((2, *family.input.size), np.float32))).all()
    return tuple(entry.degree for entry in family.engines)


def test_family_is_complete_and_compiled_once(copied: CompileOptions, compiled: tuple[Path, CompileResult]) -> None:
    options, (_, result) = copied, compiled
    assert not result.failed and not result.reused
    assert require_sound(options.out) == (0, 2, 4)  # the baseline is always there
    for entry in result.family.engines:
        assert entry.validation["passed"] and entry.validation["unexplained"] == 0
        assert entry.latency_ms["1"]["p50"] > 0
        assert entry.accuracy["images"] == 12 and 0 <= entry.accuracy["top1"] <= 1
    files = {file.name for file in options.out.iterdir()}
    listed = {name for entry in result.family.engines for name in entry.sha256}
    assert files == listed | {"family.json", "compile.toml", ".lock"}
    shared = set.intersection(*(set(entry.sha256) for entry in result.family.engines))
    assert len(shared) == 1  # weights that do not change lie in one file

    before = {file: file.stat().st_mtime_ns for file in options.out.glob("*.onnx")}
    again = compile_family(options)
    assert again.reused == (0, 2, 4) and again.family == result.family
    assert {file: file.stat().st_mtime_ns for file in options.out.glob("*.onnx")} == before

    more = compile_family(replace(options, degrees=(3,)))
    assert more.reused == (0,) and require_sound(options.out) == (0, 2, 3, 4)

    other_scale = compile_family(replace(options, delta_scale=0.05))
    assert other_scale.reused == ()
    assert {entry.scale for entry in other_scale.family.engines if entry.degree != 3} == {0.05}
    assert require_sound(options.out) == (0, 2, 3, 4)

    reports = validate_family(ValidateOptions(replace(options, degrees=()))).reports
    assert set(reports) == {0, 2, 3, 4} and all(reports.values())  # degree 3 at the scale it was compiled with


def test_engine_is_the_compensated_model(copied: CompileOptions) -> None:
    """Against the unfused compensator beside the untouched timm model: no code of fuse, lower or build is shared."""
    from tocom.checkpoint import load_model

    options = copied
    model = load_model(NAME, checkpoint=options.checkpoint, **ARGS).model
    compensator = Compensator.load(options.compensator)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for entry in Family.read(options.out).engines:
        unfused = ReducedViT(model, entry.degree, compensator.between(0, entry.degree, 0.1))
        with torch.no_grad():
            expected = unfused(images).numpy()
        with open_engine(options.out / entry.engine, entry.backend) as runner:
            np.testing.assert_allclose(runner.infer(images.numpy()), expected, rtol=0, atol=1e-5)
            plain = ReducedViT(model, entry.degree)(images).detach().numpy()
            assert (np.abs(plain - expected).max() > 1e-3) == (entry.degree != 0)  # the compensator does something


def test_source_above_target(options: CompileOptions) -> None:
    """A checkpoint that was fine-tuned merging runs without merging, and the baseline is compensated too."""
    result = compile_family(replace(options, source_degree=4, degrees=(2,), images=None))
    assert not result.failed
    assert [entry.scale for entry in result.family.engines] == [0.1, 0.1]
    model = timm.create_model(NAME, num_classes=4, **ARGS)
    from tocom.tensorfile import read_tensors

    tensors = read_tensors(options.checkpoint)[0]
    model.load_state_dict(fuse(tensors, Compensator.load(options.compensator).between(4, 0)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with open_engine(options.out / result.family.entry(0).engine, "onnxruntime") as runner, torch.no_grad():
        np.testing.assert_allclose(runner.infer(images.numpy()), model.eval()(images).numpy(), rtol=0, atol=1e-5)


def _killed_at_rename(options: CompileOptions, survive: int, before: bool) -> None:
    """Compiles, and kills this process right before or after the rename that follows `survive` others."""
    rename, left = os.replace, [survive]

    def counting(source: str, target: str) -> None:
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    os.replace = counting
    compile_family(options)


def _killed_at_stage(options: CompileOptions, stage: str, degree: int | None) -> None:
    def notify(current: int | None, text: str) -> None:
        if (current, text) == (degree, stage):
            os.kill(os.getpid(), signal.SIGKILL)

    compile_family(options, notify)


def _run(target: Callable[..., object], *arguments: object) -> int:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(SAFETY_S)
    assert process.exitcode is not None, "the compile hangs"
    return process.exitcode


@pytest.mark.full
@pytest.mark.parametrize("more", [False, True])
def test_killed_around_every_rename(options: CompileOptions, more: bool) -> None:
    """Killed at the next rename again and again: every run leaves a sound folder, and the last one finishes."""
    options = replace(options, degrees=(2,), images=None)
    each_file = [(0, True), (1, True), (2, True), (2, False)]  # weights, graph, manifest of a degree
    kills = [*each_file, *(each_file if more else ()), *([(0, True)] if more else ())]
    expected = [()] * 3 + [(0,)] * 4 + [(0, 2)] * 2
    for (survive, before), listed in zip(kills, expected[: len(kills)], strict=True):
        assert _run(_killed_at_rename, options, survive, before) == KILLED
        assert require_sound(options.out) == listed
    compile_family(options)
    assert require_sound(options.out) == (0, 2)
    leftovers = [file.name for file in options.out.iterdir() if file.name.startswith(".") and file.name != ".lock"]
    assert not leftovers


@pytest.mark.parametrize(
    ("stage", "degree"),
    [
        ("lowering to ONNX", 2),
        pytest.param("validating", 0, marks=pytest.mark.full),
        pytest.param("measuring latency", None, marks=pytest.mark.full),
    ],
)
def test_killed_in_a_stage(options: CompileOptions, stage: str, degree: int | None) -> None:
    options = replace(options, degrees=(2,), images=None)
    assert _run(_killed_at_stage, options, stage, degree) == KILLED
    require_sound(options.out)
    compile_family(options)
    assert require_sound(options.out) == (0, 2)
    manifest = json.loads((options.out / "family.json").read_text())
    assert all("1" in engine["latency_ms"] for engine in manifest["engines"])


@pytest.mark.full
def test_killed_while_a_listed_degree_is_made_anew(options: CompileOptions) -> None:
    """At another scale, and from another checkpoint: what family.json lists loads until it lists the new."""
    options = replace(options, degrees=(2,), images=None)
    old = compile_family(options).family
    foreign = [options.out / name for name in (".notes.tmp", ".mine.debug.onnx", "r08.onnx")]
    for file in foreign:
        file.write_text("somebody else's")
    changed = replace(options, delta_scale=0.05)
    assert _run(_killed_at_stage, changed, "lowering to ONNX", 0) == KILLED
    assert require_sound(options.out) == (0, 2) and Family.read(options.out) == old
    assert _run(_killed_at_stage, changed, "lowering to ONNX", 2) == KILLED
    assert require_sound(options.out) == (0, 2)
    assert [entry.scale for entry in Family.read(options.out).engines] == [0.05, 0.1]
    plain = replace(options, compensator=None, replace=True)
    assert _run(_killed_at_stage, plain, "lowering to ONNX", 0) == KILLED
    assert require_sound(options.out) == (0, 2)
    compile_family(plain)
    assert require_sound(options.out) == (0, 2)
    assert [entry.scale for entry in Family.read(options.out).engines] == [None, None]
    assert all(file.read_text() == "somebody else's" for file in foreign)


def test_a_new_engine_that_fails_leaves_the_old_one(
    copied: CompileOptions, compiled: tuple[Path, CompileResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, old = replace(copied, degrees=(), images=None), compiled[1].family
    monkeypatch.setitem(GATES, "fp32", replace(GATES["fp32"], part=-1.0))  # no engine is that good
    result = compile_family(replace(options, delta_scale=0.05))
    assert set(result.failed) == {0}
    assert require_sound(options.out) == (0, 2, 4) and Family.read(options.out) == old


@pytest.mark.full
def test_a_family_changes_its_engines_in_place(options: CompileOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(options, degrees=(4,), images=None)
    compile_family(options)
    result = compile_family(replace(options, backend="openvino"))
    assert not result.reused and not result.failed
    assert [entry.backend for entry in result.family.engines] == ["openvino"] * 2
    assert require_sound(options.out) == (0, 4)
    needed = {name for entry in result.family.engines for name in entry.sha256}
    assert {file.name for file in options.out.iterdir() if file.suffix in (".onnx", ".bin")} == needed
    monkeypatch.setattr(
        "tocom.runtime.engines.openvino_engine.library", lambda: None
    )  # the operator is gone: another engine is needed
    result = compile_family(replace(options, backend="openvino"))
    assert {name for name in result.family.entry(4).sha256 if ".inlined." in name} == {result.family.entry(4).engine}
    assert compile_family(replace(options, backend="openvino")).reused == (0, 4)
    assert all(validate_family(ValidateOptions(replace(options, degrees=(), backend="openvino"))).reports.values())


def test_auto_takes_the_fastest_backend_that_passes_and_stays_with_it(
    options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, degrees=(4,), images=None, backend="auto")
    fast = "openvino"

    def invented(runners, **_):
        return {name: Latency(1.0 if name == fast else 2.0, 3.0, 20) for name in runners}

    monkeypatch.setattr("tocom.export.family.choose_backend.measure", invented)
    assert [entry.backend for entry in compile_family(options).family.engines] == ["openvino"] * 2
    fast = "onnxruntime"  # what is finished is not built again because a measurement came out otherwise
    assert compile_family(options).reused == (0, 4)
    validate = tocom.export.family.choose_backend.validate

    def only_openvino(engine, *given):
        report = validate(engine, *given)
        return replace(report, passed=engine.backend == "openvino")

    monkeypatch.setattr("tocom.export.family.choose_backend.validate", only_openvino)  # the fastest one does not pass
    another = replace(options, degrees=(), out=options.out.with_name("another"))
    assert [entry.backend for entry in compile_family(another).family.engines] == ["openvino"]
