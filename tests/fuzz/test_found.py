"""What damaged files brought to light once, each by the smallest input that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tocom.runtime.errors
from tocom.calib.quantize.calibrate import Calibration, Method
from tocom.calib.quantize.calibration_file import read_calibration, write_calibration
from tocom.calib.quantize.migrations import Migration
from tocom.calib.quantize.network import products_of
from tocom.calib.scales_file import ScaleChoices
from tocom.export.cli.console import complain, open_console
from tocom.export.cli.family_table import family_table
from tocom.runtime.checked_json import LARGEST_FILE
from tocom.runtime.engines.base import open_engine
from tocom.runtime.infer import main as infer
from tocom.runtime.manifest import EngineEntry, Family, InputSpec
from tocom.runtime.preprocess import load_image, preprocess
from tocom.tensorfile import read_tensors

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
MADE_FOR = {"model": "x"}


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**4, 10**5), (32, 32)])
def test_a_tensor_of_more_numbers_than_its_file_holds(tmp_path: Path, shape: tuple[int, int]) -> None:
    """A file of a kilobyte took 4 GB, or ended in a traceback for 4 TB."""
    torch.save({"weight": torch.ones(1).expand(shape)}, tmp_path / "c.pth")
    with pytest.raises(tocom.runtime.errors.InputError, match="number by number"):
        read_tensors(tmp_path / "c.pth")


def test_tensors_that_share_their_numbers_are_read(tmp_path: Path) -> None:
    both = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": both, "b": both.T, "c": both[1]}, tmp_path / "c.pth")
    found, _ = read_tensors(tmp_path / "c.pth")
    assert torch.equal(found["b"], both.T) and torch.equal(found["c"], both[1])


@pytest.fixture
def network() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **ARGS)


@pytest.fixture
def calibration(tmp_path: Path, network: nn.Module) -> Path:
    scales = dict.fromkeys(products_of(network), 0.125)
    migrations = {"blocks.0.attn.qkv": Migration(torch.rand(32) + 0.5, torch.rand(32))}
    write_calibration(tmp_path / "c.safetensors", Calibration(Method(), scales, migrations), MADE_FOR)
    read_calibration(tmp_path / "c.safetensors", MADE_FOR, network)
    return tmp_path / "c.safetensors"


def _lose(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, value: object) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.as_tensor(value)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put("scale/blocks.0.mlp.fc1", 0.0), "scale of blocks.0.mlp.fc1"),
        (_put("scale/blocks.0.mlp.fc1", -0.5), "scale of blocks.0.mlp.fc1"),
        (_put("scale/blocks.0.mlp.fc1", [0.5, 0.5]), "shape"),
        (_put("scale/blocks.7.mlp.fc1", 0.5), "no product"),
        (_put("scale/a\nb", 0.5), "no product"),
        (_put("scale", 0.5), "not a calibration"),
        (_put("factor/blocks.0.attn.qkv", [1e-45] * 32), "factor of blocks.0.attn.qkv"),
        (_put("factor/blocks.0.attn.qkv", [3e38] * 32), "factor of blocks.0.attn.qkv"),
        (_put("factor/blocks.0.attn.qkv", [1.0] * 31), "shape"),
        (_put("factor/blocks.0.mlp.fc2", [1.0] * 128), "nothing takes the change"),
        (_lose("scale/blocks.0.mlp.fc1"), "missing"),
        (_lose("factor/blocks.0.attn.qkv"), "no factor"),
    ],
)
def test_a_calibration_that_cannot_be_used(
    calibration: Path, network: nn.Module, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    """It was taken, and made networks whose logits are not numbers."""
    from safetensors import safe_open

    with safe_open(calibration, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(calibration)
    change(tensors)
    save_file(tensors, calibration, metadata)
    with pytest.raises(tocom.runtime.errors.InputError, match=words) as refused:
        read_calibration(calibration, MADE_FOR, network)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"made_for": "[]"},
        {"made_for": "3"},
        {"method": "[" * 100_000},
        {"method": '{"rounding": "gptq"}'},
        {"method": '{"reconstruct": true}'},
    ],
)
def test_a_calibration_with_other_metadata(calibration: Path, network: nn.Module, changes: dict[str, str]) -> None:
    from safetensors import safe_open

    with safe_open(calibration, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(calibration), calibration, metadata | changes)
    with pytest.raises(tocom.runtime.errors.InputError, match="not a calibration"):
        read_calibration(calibration, MADE_FOR, network)


def test_a_message_is_one_line_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Names out of damaged files cleared the terminal, and filled it."""
    complain("tensor \x1b[2J\n" + "x" * 100_000 + " is missing")
    told = capsys.readouterr().err
    assert told.startswith("tocom: tensor \\x1b[2J x") and told.endswith(" is missing\n")
    assert told.count("\n") == 1 and len(told) < 1600
    infer(["--engines", "x" * 100_000, "image.png"])
    assert len(capsys.readouterr().err) < 1700


def _family(**validation: object) -> Family:
    entry = EngineEntry(
        degree=0, scale=None, schedule=(0,), tokens=(17, 17), gmacs=0.1, backend="onnxruntime", precision="fp32",
        onnx="a.onnx", engine="a.onnx", sha256={"a.onnx": "0" * 64}, recipe="", validation=validation,
        latency_ms={"1": {"p50": 1.0, "p99": 1.0, "slice_bound": 1.0}}, accuracy={},
    )  # fmt: skip
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    return Family("name", 5, spec, None, None, None, None, (entry,))


@pytest.mark.parametrize(
    "change",
    [
        {"validation": {"max_logit_error": "text"}},
        {"validation": {"decisions": 3}},
        {"validation": {"quantization": {}}},
        {"validation": {"quantization": 3}},
        {"latency_ms": {"1": {"p50": 0, "p99": 1.0, "slice_bound": 0}}},
        {"latency_ms": {"1": {"p50": 10**400}}},
        {"accuracy": {"images": None, "top1": 10**400}},
        {"pays": {"one": False}},
        {"build": {"bytes": 3}},
        {"gmacs": 10**400},
    ],
)
def test_notes_that_no_compile_makes(tmp_path: Path, change: dict[str, object]) -> None:
    """`tocom inspect` ended in a traceback."""
    family = _family(max_logit_error=1e-6)
    assert family_table(family, tmp_path).row_count == 1
    odd = replace(family, engines=(replace(family.engines[0], **change),))
    try:
        table = family_table(odd, tmp_path)
    except tocom.runtime.errors.InputError as refusal:
        assert "compile the family again" in str(refusal) and "\n" not in str(refusal)
    else:
        open_console().print(table)


def test_a_name_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_console().print(family_table(replace(_family(), model="[/b]\x1b[2J", reduction="[bold"), tmp_path))
    shown = capsys.readouterr().out
    assert "[/b]" in shown and "[bold" in shown and "\x1b[2J" not in shown


@pytest.mark.parametrize("read", [Family.read, ScaleChoices.read])
def test_a_table_that_is_far_too_large(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """It was read and checked for minutes."""
    name = "family.json" if read == Family.read else "scales.json"
    (tmp_path / name).write_text("[" + "0," * (LARGEST_FILE // 2) + "0]")
    with pytest.raises(tocom.runtime.errors.InputError, match="MiB"):
        read(tmp_path)


def test_a_graph_that_openvino_cannot_be_prepared_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came out of the preparation was OpenVINO's own exception."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Check 'rank().is_static()' failed\nat core/partial_shape.hpp:315")

    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "means", [taken], [given])
    file = tmp_path / "means.onnx"
    opset = [helper.make_opsetid("", 20)]
    file.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    with open_engine(file, "openvino", batch=2) as runner:
        assert runner.classes == 3
    monkeypatch.setattr("tocom.runtime.engines.openvino_engine.fuse", fails)
    with pytest.raises(tocom.runtime.errors.InputError, match="cannot be compiled by OpenVINO"):
        open_engine(file, "openvino")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n%%EOF\n")
    with pytest.raises(tocom.runtime.errors.InputError, match="PostScript"):
        load_image(tmp_path / "a.png")


def test_preparing_leaves_the_image_as_it_is() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    before = image.tobytes()
    preprocess(image, InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center"))
    assert image.tobytes() == before and json.dumps(image.size) == "[50, 40]"
