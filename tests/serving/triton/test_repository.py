"""What `tocom export-triton` writes, read by Triton's own schema, and what it refuses."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

import tocom.serving.triton.prototext
from tocom.export.cli import __main__ as cli
from tocom.export.cli.export_triton import _inlined
from tocom.runtime.errors import InputError
from tocom.runtime.files import sha256_file
from tocom.runtime.manifest import EngineEntry, Family
from tocom.runtime.preprocess import preprocess
from tocom.serving.triton.config import TritonOptions, engine_config
from tocom.serving.triton.prototext import prototext
from tocom.serving.triton.repository import MARKER, RepositoryOptions, write_repository


def read(folder: Path) -> model_config_pb2.ModelConfig:
    """A config.pbtxt by the schema that Triton reads it with."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def export(engines: Path, out: Path, **options: object) -> Path:
    running = {name: options.pop(name) for name in list(options) if name in TritonOptions.__dataclass_fields__}
    write_repository(engines, out, RepositoryOptions(running=TritonOptions(**running), **options), _inlined)
    return out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tocom", "export-triton", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def planned(family: Family, **build: object) -> EngineEntry:
    """An entry as a compile for TensorRT lists it."""
    options = {"batch": [1, 8, 32], "targets": [], "stripped": False, "own_kernels": False, **build}
    entry = family.entry(8)
    plan = {"library": "11.4.0", "options": options, "seconds": 1.0, "bytes": 4, "layers": {}}
    hashes = dict(entry.sha256) | {"r08.plan": "0" * 64}
    return replace(entry, backend="tensorrt", engine="r08.plan", sha256=hashes, build=plan)


def test_prototext_says_what_it_does() -> None:
    assert doctest.testmod(tocom.serving.triton.prototext).failed == 0


@pytest.mark.parametrize("text", ['a"b\\c', "line\nbreak", "Größe \U0001f600", "\x00\x7f", "", "'{}'"])
def test_texts_come_back_as_they_were(text: str) -> None:
    parsed = text_format.Parse(prototext({"name": text}), model_config_pb2.ModelConfig())
    assert parsed.name == text


def test_a_model_per_degree(families: dict[str, Path], tmp_path: Path) -> None:
    family = Family.read(families["digits"])
    out = export(families["digits"], tmp_path / "out", queue_delay_us=700, max_queue=9, instances=3, max_batch=8)
    assert {path.name for path in out.iterdir()} == {MARKER, "digits_r00", "digits_r08", "digits_r16"}
    config = read(out / "digits_r08")
    assert (config.name, config.backend, config.max_batch_size) == ("digits_r08", "onnxruntime", 8)
    assert [(each.name, list(each.dims)) for each in config.input] == [("pixel_values", [3, 32, 32])]
    assert [(each.name, list(each.dims)) for each in config.output] == [("logits", [10])]
    assert {config.input[0].data_type, config.output[0].data_type} == {model_config_pb2.TYPE_FP32}
    batching = config.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([8], 700)
    policy = batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (9, 10_000_000)
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (3, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]
    assert [warm.batch_size for warm in config.model_warmup] == [1, 8]
    assert config.parameters["tokens"].string_value == ",".join(map(str, family.entry(8).tokens))
    assert config.parameters["engine_sha256"].string_value == family.entry(8).sha256[family.entry(8).engine]
    assert (out / "digits_r08" / "labels.txt").read_text().split() == list("0123456789")


def test_weights_are_stored_once(families: dict[str, Path], tmp_path: Path) -> None:
    out = export(families["digits"], tmp_path / "out")
    weights = list(out.rglob("*.bin"))
    assert len(weights) > len({path.name for path in weights})  # several degrees read the same
    assert len({path.stat().st_ino for path in weights}) == len({path.name for path in weights})
    # a second name of the family's own files would make onnx_ir refuse to go on with the family
    assert {path.stat().st_nlink for path in families["digits"].iterdir()} == {1}
    for entry in Family.read(families["digits"]).engines:
        version = out / f"digits_r{entry.degree:02d}/1"
        assert sha256_file(version / "model.onnx") == entry.sha256[entry.engine]
        assert {path.name for path in version.iterdir()} == {"model.onnx", *entry.sha256} - {entry.engine}


def test_copies_where_there_are_no_links(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = export(families["digits"], tmp_path / "out")
    weights = list(out.rglob("*.bin"))
    assert weights and all(path.stat().st_nlink == 1 for path in weights)
    assert all(sha256_file(path) == sha256_file(families["digits"] / path.name) for path in weights)


def test_openvino_gets_no_functions_and_no_batcher(families: dict[str, Path], tmp_path: Path) -> None:
    out = export(families["vino"], tmp_path / "out", preprocess="ensemble")
    graph = onnx.load(out / "vino_r08/1/model.onnx", load_external_data=False)
    assert not graph.functions and {node.domain for node in graph.graph.node} == {""}
    config = read(out / "vino_r08")
    assert (config.backend, config.max_batch_size, list(config.input[0].dims)) == ("openvino", 0, [-1, 3, 32, 32])
    assert config.default_model_filename == "model.onnx"  # the backend's own default is model.xml
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 128
    assert list(config.output[0].dims) == [-1, 10]
    other = export(families["vino"], tmp_path / "other", backend="onnxruntime")
    assert onnx.load(other / "vino_r08/1/model.onnx", load_external_data=False).functions
    assert read(other / "vino_r08").max_batch_size == 32


def test_an_ensemble_beside_each_degree(families: dict[str, Path], tmp_path: Path) -> None:
    out = export(families["digits"], tmp_path / "out", degrees=(0, 8), preprocess="ensemble", name="d")
    assert {path.name for path in out.iterdir()} == {
        MARKER, "d_preprocess", "d_r00", "d_r00_image", "d_r08", "d_r08_image",
    }  # fmt: skip
    steps = read(out / "d_r08_image").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["d_preprocess", "d_r08"]
    assert dict(steps[0].output_map) == dict(steps[1].input_map) == {"pixel_values": "pixel_values"}
    given = read(out / "d_preprocess").input[0]
    assert (given.name, given.data_type) == ("image", model_config_pb2.TYPE_STRING)


def test_the_preprocessing_model_needs_nothing_of_this_checkout(families: dict[str, Path], tmp_path: Path) -> None:
    """In an interpreter that has numpy and Pillow alone, with a stand-in for what Triton hands it."""
    out = export(families["digits"], tmp_path / "out", degrees=(0,), preprocess="ensemble")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 41, 3), np.uint8))
    image.save(tmp_path / "image.png")
    parameters = {
        name: {"string_value": each.string_value} for name, each in read(out / "digits_preprocess").parameters.items()
    }
    (tmp_path / "config.json").write_text(json.dumps({"parameters": parameters}))
    script = f"""
import importlib.util, pathlib, sys, types
import numpy as np
for module in ("torch", "onnx", "onnxruntime", "tocom.serving", "tocom.export"):
    sys.modules[module] = None
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
spec = importlib.util.spec_from_file_location("model", {str(out / "digits_preprocess/1/model.py")!r})
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
python_model = model.TritonPythonModel()
python_model.initialize({{"model_config": pathlib.Path("config.json").read_text()}})
np.save("found.npy", python_model._prepared(pathlib.Path("image.png").read_bytes()))
assert pathlib.Path(sys.modules["tocom.runtime"].__file__).is_relative_to({str(out)!r})
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path, timeout=60)
    expected = preprocess(image, Family.read(families["digits"]).input)
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)


def test_plans_keep_to_their_profile(family: tuple[Path, Family]) -> None:
    _, listed = family
    config = engine_config("p", listed, planned(listed), "tensorrt", TritonOptions())
    parsed = text_format.Parse(prototext(config), model_config_pb2.ModelConfig())
    assert (parsed.default_model_filename, parsed.max_batch_size) == ("model.plan", 32)
    assert list(parsed.dynamic_batching.preferred_batch_size) == [8]
    assert parsed.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    with pytest.raises(InputError, match="max-batch must be at most 32"):
        engine_config("p", listed, planned(listed), "tensorrt", TritonOptions(max_batch=33))
    with pytest.raises(InputError, match="must take single images, got batches of 4 to 32"):
        engine_config("p", listed, planned(listed, batch=[4, 8, 32]), "tensorrt", TritonOptions())


def test_a_plan_is_served_alone(family: tuple[Path, Family], tmp_path: Path) -> None:
    folder, listed = family
    engines = tmp_path / "plans"
    shutil.copytree(folder, engines)
    (engines / "r08.plan").write_bytes(b"ftrt")
    entry = planned(listed)
    hashes = entry.sha256 | {"r08.plan": sha256_file(engines / "r08.plan")}
    replace(listed, engines=(replace(entry, sha256=hashes),)).write(engines)
    out = export(engines, tmp_path / "out")
    assert [path.name for path in (out / "plans_r08/1").iterdir()] == ["model.plan"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"degrees": (0, 3)}, "degree must be one the family was compiled for"),
        ({"name": "a/b"}, "name must be letters"),
        ({"preprocess": "server"}, "preprocess must be client or ensemble, got server"),
        ({"backend": "tensorrt"}, "backend must be onnxruntime"),
        ({"max_batch": 0}, "max-batch must be 1 or more, got 0"),
        ({"max_queue": 0}, "max-queue must be 1 or more"),
        ({"instances": -1}, "instances must be 1 or more"),
        ({"queue_delay_us": 10_000_000}, "queue-timeout-ms must be longer than queue-delay-us"),
    ],
)
def test_bad_options(families: dict[str, Path], tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        export(families["digits"], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"backend": "tensorrt-rtx"}, {}, "Triton has backends for onnxruntime, openvino, tensorrt, got degree 8"),
        ({"backend": "openvino"}, {"max_batch": 8}, "max-batch must be left out for Triton's openvino backend"),
        ({"backend": "openvino", "precision": "bf16"}, {"backend": "onnxruntime"}, "got degree 8 in bf16"),
        ({"backend": "tensorrt", "build": {}}, {}, "the key build.options is missing"),
        ({"backend": "tensorrt", "build": {"options": {"batch": [1, 2]}}}, {}, "build.options.batch must be three"),
    ],
)
def test_engines_that_triton_cannot_run(
    family: tuple[Path, Family], tmp_path: Path, changes: dict, options: dict, words: str
) -> None:
    folder, listed = family
    shutil.copytree(folder, tmp_path / "engines")
    replace(listed, engines=(replace(listed.entry(8), **changes),)).write(tmp_path / "engines")
    with pytest.raises(InputError, match=words):
        export(tmp_path / "engines", tmp_path / "out", **options)


@pytest.mark.parametrize("option", ["stripped", "own_kernels"])
def test_plans_that_lack_something(family: tuple[Path, Family], tmp_path: Path, option: str) -> None:
    folder, listed = family
    shutil.copytree(folder, tmp_path / "engines")
    replace(listed, engines=(planned(listed, **{option: True}),)).write(tmp_path / "engines")
    with pytest.raises(InputError, match="Triton loads plans that hold all they need"):
        export(tmp_path / "engines", tmp_path / "out")


def test_a_changed_file_is_not_served(family: tuple[Path, Family], tmp_path: Path) -> None:
    folder, listed = family
    shutil.copytree(folder, tmp_path / "engines")
    with (tmp_path / "engines" / listed.entry(16).engine).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="it has changed"):
        export(tmp_path / "engines", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_only_its_own_folder_is_replaced(families: dict[str, Path], tmp_path: Path) -> None:
    engines, out = families["digits"], tmp_path / "out"
    export(engines, out)
    export(engines, out, degrees=(8,))  # its own: replaced
    assert {path.name for path in out.iterdir()} == {MARKER, "digits_r08"}
    (out / "mine").mkdir()
    for options, words in (({}, "got mine: give another --out, or --replace"), ({"replace": True}, "got mine: give")):
        with pytest.raises(InputError, match=words):
            export(engines, out, **options)
    (out / "mine" / "config.pbtxt").write_text("")
    with pytest.raises(InputError, match="or --replace if it is a model repository"):
        export(engines, out)
    export(engines, out, replace=True)
    assert not (out / "mine").exists()
    for inside in (engines, engines / "triton", engines.parent):
        with pytest.raises(InputError, match="must lie outside its family's folder"):
            export(engines, inside, replace=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="must be a folder"):
        export(engines, file, replace=True)


def test_half_a_repository_is_never_seen(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(families["digits"], tmp_path / "out", degrees=(8,))
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    real, seen = Path.write_text, []

    def fail_at_the_second(self: Path, *given: object, **named: object) -> int:
        seen.append(self)
        if len(seen) == 2:
            raise OSError(28, "No space left on device", str(self))
        return real(self, *given, **named)

    monkeypatch.setattr(Path, "write_text", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        export(families["digits"], out)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, families["digits"], "--out", out, "--degrees", "0,8", "--preprocess", "ensemble") == 0
    told = capsys.readouterr().out
    assert "digits_r08_image" in told and "tritonserver --model-repository=" in told
    assert run(monkeypatch, families["vino"], "--out", tmp_path / "vino") == 0
    assert "--backend onnxruntime serves the same graphs" in capsys.readouterr().out
    for arguments in (
        [tmp_path / "none", "--out", tmp_path / "new"],
        [families["digits"], "--out", tmp_path / "new", "--degrees", "x"],
        [families["digits"], "--out", tmp_path / "new", "--max-queue", "0"],
        [families["digits"], "--out", tmp_path],
    ):
        assert run(monkeypatch, *arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out", "vino"}
