"""Exported graphs in OpenVINO against the PyTorch reference: native operator and function body, both precisions."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

import tocom.runtime.engines.openvino_engine
from tocom.export.engine.build import build, needs_inlining, runs_natively
from tocom.export.graph.lower import reference_model
from tocom.export.proof.validate import validate
from tocom.export.source.images import default_images
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.errors import InputError
from tocom.runtime.native import library
from tocom.vit import schedule_for

has_native = pytest.mark.skipif(library() is None, reason="the native operator is not built (make native)")


@pytest.fixture(params=["fp32", "bf16"])
def precision(request):
    if request.param == "bf16" and "no bf16" in tocom.runtime.engines.openvino_engine.describe():
        pytest.skip("this processor has no bf16 instructions")
    return request.param


def images(model, noise, photographs):
    height, width = model.patch_embed.img_size
    yield noise(1, height, width)
    yield noise(5, height, width, seed=1)
    yield photographs(height, width)


@pytest.fixture
def validated(exported, make_vit, fused_of, noise, photographs):
    """Builds the OpenVINO engine of a family at a degree, and validates it."""

    def report(family, degree, reduction=MERGE, precision="fp32"):
        model = make_vit(family)
        engine = build(exported(family, degree, reduction).graph, backend="openvino", precision=precision)
        reference = reference_model(model, schedule_for(model, degree), fused_of(model, degree), reduction)
        return validate(engine, reference, images(model, noise, photographs))

    return report


@pytest.mark.parametrize("family", ["deit_tiny"])
def test_the_native_operator_decides_and_computes_as_the_reference(validated, precision, family):
    report = validated(family, 8, precision=precision)
    assert report, report.findings
    assert report.engine.native and report.engine.file == report.engine.graph.file
    assert report.findings.precision == precision
    assert report.findings.images == 11 and report.findings.debug_copy_error == 0
    if precision == "fp32":
        assert report.findings.max_logit_error <= 1e-4 and report.findings.agreement > 0.99


def test_without_the_native_operator_the_function_body_runs(validated, monkeypatch, precision):
    monkeypatch.setattr(tocom.runtime.engines.openvino_engine, "library", lambda: None)
    report = validated("deit_tiny", 8, precision=precision)
    assert report, report.findings
    assert not report.engine.native and report.engine.file.name.endswith(".inlined.onnx")
    assert not onnx.load(report.engine.file, load_external_data=False).functions
    assert set(report.engine.files) == {*report.engine.graph.files, report.engine.file.name}


def test_what_has_no_native_operator_runs_its_body(validated):
    report = validated("deit_tiny", 8, PRUNE)
    assert report, report.findings
    assert not report.engine.native


@has_native
def test_who_runs_what(exported):
    merging, plain, pruning = (
        onnx.load(exported("deit_tiny", *which).file, load_external_data=False) for which in ((8,), (0,), (8, PRUNE))
    )
    assert [runs_natively(each, "openvino") for each in (merging, plain, pruning)] == [True, False, False]
    assert [needs_inlining(each, "openvino") for each in (merging, plain, pruning)] == [False, False, True]
    assert not any(runs_natively(each, "onnxruntime") for each in (merging, plain, pruning))
    assert not any(needs_inlining(each, "onnxruntime") for each in (merging, plain, pruning))


@has_native
def test_a_wrong_native_decision_fails_the_gate(validated, monkeypatch):
    honest = tocom.runtime.engines.openvino_engine.record

    def lying(run):
        calls = honest(run)
        calls[0][[0, 8]] = calls[0][[8, 0]]  # another token is said to be merged away
        return calls

    monkeypatch.setattr(tocom.runtime.engines.openvino_engine, "record", lying)
    report = validated("deit_tiny", 8)
    assert not report and report.findings.unexplained


def test_onnx_runtime_has_no_bfloat16(exported):
    with pytest.raises(InputError, match="precision must be one of fp32, fp16, int8 for onnxruntime, got 'bf16'"):
        build(exported("deit_tiny", 8).graph, backend="onnxruntime", precision="bf16")


def test_default_images_reach_every_engine_alike(exported, make_vit, fused_of):
    engine = build(exported("deit_tiny", 8).graph, backend="openvino")
    model = make_vit("deit_tiny")
    reference = reference_model(model, schedule_for(model, 8), fused_of(model, 8))
    one = validate(engine, reference, default_images((3, 64, 64)))
    other = validate(replace(exported("deit_tiny", 8)), reference, default_images((3, 64, 64)))
    assert one and other and one.findings.decisions == other.findings.decisions
