"""A quantized family as a whole: what is listed, what returns to float, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tocom.export.family.quantized_steps
from tocom.calib.quantize.calibrate import Method
from tocom.export.family.compile import compile_family
from tocom.export.family.quantizer import Drop
from tocom.export.proof.validate_family import ValidateOptions, validate_family
from tocom.export.source.load import load_source
from tocom.export.source.options import CompileOptions, QuantizeOptions
from tocom.runtime.engines.base import open_engine
from tocom.runtime.errors import InputError
from tocom.runtime.manifest import Family

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A checkpoint, labelled images, and images to calibrate on, of other sizes than the network's."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=4, **ARGS).state_dict(), folder / "model.safetensors")
    draw = np.random.default_rng(0)
    for label in range(4):
        (folder / "images" / str(label)).mkdir(parents=True)
        for index in range(3):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{index}.png")
    (folder / "calibration").mkdir()
    for index, size in enumerate([(32, 32), (50, 40), (20, 90), (64, 64)]):
        pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "calibration" / f"{index}.png")
    (folder / "black").mkdir()
    for index in range(2):
        Image.new("RGB", (32, 32)).save(folder / "black" / f"{index}.png")
    return folder


@pytest.fixture
def options(given, tmp_path):
    return CompileOptions(
        model=NAME,
        out=tmp_path / "out",
        degrees=(2,),
        checkpoint=given / "model.safetensors",
        precision="int8",
        images=given / "images",
        model_args=ARGS,
        quantize=QuantizeOptions(calibration=given / "calibration", max_drop=100),
    )


def compiled(options):
    said = []
    result = compile_family(options, lambda _degree, stage: said.append(stage))
    return result, said


def test_a_quantized_family_is_listed_proven_and_kept(options):
    result, said = compiled(options)
    assert not result.failed and not [stage for stage in said if stage.startswith("note")]
    for entry in Family.read(options.out).engines:
        found = entry.validation["quantization"]
        assert entry.precision == "int8" and entry.validation["passed"]
        assert found["products"] == 8 and found["float_products"] == []
        assert found["drop"] == pytest.approx(100 * (found["float_top1"] - found["top1"]), abs=1e-3)
        assert entry.accuracy["top1"] == found["top1"]
        assert entry.latency_ms["1"]["unquantized"] > 0
        with open_engine(options.out / entry.engine, entry.backend, precision="int8") as runner:
            assert np.isfinite(runner.infer(np.zeros((2, 3, 32, 32), np.float32))).all()
    again, said = compiled(options)
    assert again.reused == (0, 2) and "calibrating" not in said
    (calibration,) = options.out.glob("calibration-*.safetensors")
    reports = validate_family(
        ValidateOptions(replace(options, degrees=(), precision="fp32", quantize=QuantizeOptions()))
    ).reports
    assert set(reports) == {0, 2} and all(reports.values())
    assert all(report.findings.precision == "int8" for report in reports.values())

    # the calibration as a file makes the same engines
    copy = options.out.parent / "copy.safetensors"
    copy.write_bytes(calibration.read_bytes())
    other = replace(options, degrees=(), out=options.out.parent / "other", quantize=QuantizeOptions(copy, max_drop=100))
    compile_family(other)
    entry, same = Family.read(options.out).entry(0), Family.read(other.out).entry(0)
    assert entry.onnx != same.onnx  # named after what they were made from
    assert entry.sha256[entry.onnx] == same.sha256[same.onnx]


@pytest.mark.full
def test_products_return_to_float_until_the_drop_is_small(options, given, monkeypatch):
    """The drop is what the test says; that it is measured right is seen by the family's own accuracy."""
    counts = []

    def drop(quantizer, degree, infer):
        pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
        assert np.isfinite(infer(pixels)).all()
        counts.append(degree)
        return Drop(3.0 - counts.count(degree), 0.5, 0.5, 12)

    monkeypatch.setattr(tocom.export.family.quantized_steps.Quantizer, "drop", drop)
    options = replace(options, degrees=(), quantize=replace(options.quantize, max_drop=0.5))
    result, said = compiled(options)
    assert not result.failed
    for entry in result.family.engines:
        found = entry.validation["quantization"]
        worst = sorted(found["sensitivity"], key=found["sensitivity"].get, reverse=True)
        assert found["products"] == 6 and set(found["float_products"]) == set(worst[:2]) and found["drop"] == 0
    assert any("may lose 0.5" in stage for stage in said)

    # and where it never is, no engine is listed
    monkeypatch.setattr(tocom.export.family.quantized_steps.Quantizer, "drop", lambda *_: Drop(5.0, 0.5, 0.45, 12))
    lost, _ = compiled(replace(options, out=options.out.parent / "lost"))
    assert set(lost.failed) == {0} and not lost.family.engines
    assert len(lost.failed[0].findings.quantization.float_products) == 8


@pytest.mark.full
def test_a_useless_calibration_is_made_up_for(options, given):
    """Ranges of black images clip everything else: what returns to float is what clips."""
    poor = QuantizeOptions(calibration=given / "black", max_drop=0)
    result, said = compiled(replace(options, quantize=poor))
    assert any("all equal" in stage for stage in said)
    assert not result.failed
    assert all(entry.validation["quantization"]["drop"] <= 0 for entry in result.family.engines)


def test_without_labels_answers_are_compared(options, given):
    unlabelled = replace(options, images=None, degrees=(), quantize=replace(options.quantize, max_drop=100))
    result, said = compiled(unlabelled)
    found = result.family.engines[0].validation["quantization"]
    assert found["drop_of"] == "agreement" and found["drop_images"] == 4 and found["top1"] is None
    assert any(stage.startswith("note: --max-drop without labelled images") for stage in said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration": "empty"}, "image"),
        ({"calibration": "nowhere"}, "nowhere"),
        ({"calibration": "text.safetensors"}, "text.safetensors"),
        ({"calibration": "model.safetensors"}, "not a calibration"),
        ({"calibration": "other.safetensors"}, "another network: its checkpoint"),
        ({"calibration": "fp8.safetensors"}, "calibration for fp8"),
        ({"keep_float": ("blocks.9.mlp.fc1",)}, "keep-float must name products like blocks.0.attn.qkv"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(options, given, tmp_path, change, words):
    from tocom.calib.quantize.calibrate import Calibration
    from tocom.calib.quantize.calibration_file import write_calibration
    from tocom.calib.quantize.network import products_of
    from tocom.export.source.load import made_for

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("this is no calibration, it is a sentence")
    (tmp_path / "model.safetensors").write_bytes((given / "model.safetensors").read_bytes())
    source = load_source(options)
    network, scales = made_for(source), dict.fromkeys(products_of(source.loaded.model), 0.125)
    write_calibration(tmp_path / "other.safetensors", Calibration(Method(), {}, {}), {**network, "checkpoint": "b"})
    write_calibration(tmp_path / "fp8.safetensors", Calibration(Method(format="fp8"), scales, {}), network)
    if "calibration" in change:
        change = {"calibration": tmp_path / change["calibration"]}
    with pytest.raises((InputError, ValueError), match=words):
        compile_family(replace(options, quantize=replace(options.quantize, **change)))
    assert not options.out.exists()


def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="max-drop"):
        QuantizeOptions(max_drop=-1)
    with pytest.raises(InputError, match="range must be one of"):
        Method(range="widest")
    with pytest.raises(InputError, match="the precision is fp32"):
        load_source(replace(options, precision="fp32"))


def test_activations_that_are_not_finite_are_refused(options, tmp_path):
    weights = load_file(options.checkpoint)
    weights["patch_embed.proj.weight"][:] = 3e38
    save_file(weights, tmp_path / "huge.safetensors")
    with pytest.raises(InputError, match="finite"):
        compile_family(replace(options, checkpoint=tmp_path / "huge.safetensors", degrees=()))
    assert not list(options.out.glob("*.onnx")) and not (options.out / "family.json").exists()


def test_a_calibration_file_survives_the_disk(options, tmp_path):
    from tocom.calib.quantize.calibrate import Calibration
    from tocom.calib.quantize.calibration_file import read_calibration, write_calibration
    from tocom.calib.quantize.migrations import Migration
    from tocom.calib.quantize.network import products_of

    model = timm.create_model(NAME, **ARGS)
    scales = dict.fromkeys(products_of(model), 0.125)
    kept = Calibration(
        Method(smooth=True, range="mse"),
        scales,
        {
            "blocks.0.attn.qkv": Migration(torch.rand(32) + 0.5, torch.rand(32)),
            "blocks.0.mlp.fc1": Migration(torch.ones(32)),
        },
    )
    write_calibration(tmp_path / "c.safetensors", kept, {"model": "x"})
    found = read_calibration(tmp_path / "c.safetensors", {"model": "x"}, model)
    assert found.method == kept.method and found.activations == kept.activations
    assert found.migrations.keys() == kept.migrations.keys() and found.migrations["blocks.0.mlp.fc1"].shift is None
    assert torch.equal(found.migrations["blocks.0.attn.qkv"].shift, kept.migrations["blocks.0.attn.qkv"].shift)
    assert json.dumps(found.activations)
