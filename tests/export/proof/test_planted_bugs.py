"""Bugs that people really make, planted one at a time: the gates catch each, and name the block and the part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from tests.export.proof.planted import BUGS, HIDDEN, MISSED, NO_BUGS
from tests.export.proof.surgery import Surgery
from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.calib.quantize.network import quantized_model
from tocom.export.artifacts import Engine
from tocom.export.engine.build import build
from tocom.export.graph.fuse import fuse
from tocom.export.graph.half_precision import typed
from tocom.export.graph.insert_qdq import quantized_graph
from tocom.export.graph.lower import lower, reference_model
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.debug_copy import debug_copy
from tocom.export.proof.gates import GATES
from tocom.export.proof.observe import RunnerObserver
from tocom.export.proof.validate import validate, validate_observer
from tocom.export.source.images import default_images
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.backends import BACKENDS
from tocom.vit import ReducedViT, schedule_for

SUBJECTS = {
    "merge": ("deit_tiny", 8, MERGE),
    "prune": ("deit_tiny", 8, PRUNE),
    "distilled": ("deit_distilled", 8, MERGE),
    "registers": ("reg4_dinov2", 13, MERGE),
    "gap": ("gap", 4, MERGE),
    "map": ("map", 16, MERGE),
    "compensated": ("deit_tiny", 8, MERGE),
}
INSIDE = {"attention", "signal", "decision"}  # native operators do not tell these apart from what follows


@pytest.fixture(scope="module")
def subjects(exported, make_vit, fused_of, make_compensator, tmp_path_factory):
    """(subject, format) -> its graph, and the reference; made once."""
    made = {}

    def compensated():
        model = make_vit("deit_tiny")
        compensation = make_compensator(48, 4).between(0, 8, 0.1)
        weights = fuse(model.state_dict(), compensation)
        fused = replace(fused_of(model, 8), weights=weights, compensation=compensation)
        schedule, store = schedule_for(model, 8), WeightStore(tmp_path_factory.mktemp("compensated"))
        return lower(model, schedule, fused, store, "model.onnx"), reference_model(model, schedule, fused)

    def plain(subject):
        family, degree, reduction = SUBJECTS[subject]
        model = make_vit(family)
        reference = reference_model(model, schedule_for(model, degree), fused_of(model, degree), reduction)
        return exported(family, degree, reduction).source, reference

    def quantized(subject):
        graph, reference = of(subject, "fp32")
        pixels = torch.from_numpy(np.concatenate(images(reference)))
        quantization = calibrate([reference], pixels, Method()).quantization(reference.model)
        store = WeightStore(tmp_path_factory.mktemp(f"{subject}-int8"))
        graph = quantized_graph(graph, reference.model, quantization, store, "model.onnx", BACKENDS["onnxruntime"].qdq)
        model = quantized_model(reference.model, quantization)
        return graph, ReducedViT(model, reference.schedule, reduction=reference.reduction)

    def of(subject, form):
        form = form if form == "int8" else "fp32"  # the others are made of this one
        if (subject, form) not in made:
            make = compensated if subject == "compensated" and form == "fp32" else None
            made[subject, form] = make() if make else (quantized if form == "int8" else plain)(subject)
        return made[subject, form]

    return of


def images(reference, count=3):
    """A batch of noise, and one of patterns; one less in each."""
    return list(default_images((3, *reference.model.patch_embed.img_size), count))[1::2]


@pytest.fixture
def findings_of(subjects, tmp_path):
    """Plants a bug and proves what comes of it: (what was found, whether native operators ran)."""

    def find(bug, form):
        graph, reference = subjects(bug.subject, form)
        surgery = Surgery.on(graph.file)
        bug.plant(surgery)
        model = surgery.model
        if form == "fp16":
            model = typed(onnx.shape_inference.infer_shapes(model), "fp16")
        file = tmp_path / "planted.onnx"
        onnx.save(model, file)
        if form == "bf16":
            edited = replace(graph, file=file)
            engine = replace(build(edited, backend="openvino", precision="bf16"), precision="bf16")
            return validate(engine, reference, iter(images(reference, bug.images))).findings.to_json(), engine.native
        edited = replace(graph, file=file, precision=form)
        plain = subjects(bug.subject, "fp32")[1] if form == "int8" else None
        with debug_copy(Engine(file, "onnxruntime", form, {}, edited)) as runner:
            observer = RunnerObserver(runner, runner, reference, form)
            return validate_observer(observer, reference, iter(images(reference, bug.images)), plain).to_json(), False

    return find


def cases(*, hidden):
    return [
        pytest.param(bug, form, id=f"{bug.name}-{form}", marks=marks_of(bug, form))
        for bug in BUGS
        for form in bug.formats
        if (form in HIDDEN.get(bug.name, (0, ()))[1]) == hidden
    ]


def marks_of(bug, form):
    """One format of each bug is tried by default."""
    marks = [] if form == bug.formats[0] else [pytest.mark.full]
    if (bug.name, form) in MISSED:
        marks.append(pytest.mark.xfail(reason="further off than healthy engines, and within the gate"))
    return marks


@pytest.mark.parametrize(("bug", "form"), cases(hidden=False))
def test_a_planted_bug_is_caught_where_it_is(bug, form, findings_of):
    if form == "bf16":
        pytest.importorskip("openvino")
    found, native = findings_of(bug, form)
    assert not found["passed"]
    first = found["first_fault"]
    parts = {*bug.parts, "decision", "reduction"} if native and INSIDE & set(bug.parts) else bug.parts
    assert first["block"] == bug.block and first["part"] in parts, found["faults"]
    if bug.name in HIDDEN and form == "fp32":
        assert first["found"] == pytest.approx(HIDDEN[bug.name][0], rel=0.3)


@pytest.mark.parametrize(("bug", "form"), cases(hidden=True))
def test_what_hides_below_the_rounding_of_a_format(bug, form, findings_of):
    """No gate could catch it there and let healthy engines pass: it changes less than the format may round."""
    if form == "bf16":
        pytest.importorskip("openvino")
    found, _ = findings_of(bug, form)
    assert found["passed"], found["faults"]
    gates = GATES[form]
    allowed = gates.merge if bug.parts == ("decision",) else gates.part
    assert HIDDEN[bug.name][0] < allowed * gates.unit_roundoff


@pytest.mark.parametrize("form", ["fp32", *(pytest.param(form, marks=pytest.mark.full) for form in ("fp16", "bf16"))])
@pytest.mark.parametrize("harmless", NO_BUGS, ids=lambda bug: bug.name)
def test_what_is_no_bug_passes(harmless, form, findings_of):
    found, _ = findings_of(harmless, form)
    assert found["passed"], found["faults"]
    assert found["decisions"] > 0


def test_the_catalogue_is_as_long_as_promised():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 60
