"""Q/DQ graphs: what is quantized in them and what is not, against PyTorch and against another quantizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import quantized_model
from tocom.export.engine.build import build
from tocom.export.graph.fuse import fuse
from tocom.export.graph.insert_qdq import quantized_format_of, quantized_graph
from tocom.export.graph.lower import Lowering
from tocom.export.graph.operators import DOMAIN
from tocom.export.graph.read_qdq import read_quantization
from tocom.export.graph.weight_store import WeightStore
from tocom.export.proof.validate import validate
from tocom.reduction import MERGE, PRUNE
from tocom.runtime.backends import BACKENDS, QdqForm
from tocom.runtime.engines.base import open_engine
from tocom.vit import ReducedViT, schedule_for


@pytest.fixture
def lowered(make_vit, exported, noise, tmp_path):
    """Calibrates a family at a degree and lowers it in a form: (graph, reference, its quantization, the model)."""

    def lower(family, degree, reduction=MERGE, form=None, method=None, without=()):
        model = make_vit(family)
        schedule = schedule_for(model, degree)
        height, width = model.patch_embed.img_size
        float_reference = ReducedViT(model, schedule, reduction=reduction)
        calibration = calibrate([float_reference], torch.from_numpy(noise(8, height, width)), method or Method())
        quantization = calibration.quantization(model).without(without)
        plain = exported(family, degree, reduction).source
        form = form or BACKENDS["onnxruntime"].qdq
        graph = quantized_graph(plain, model, quantization, WeightStore(tmp_path), f"{form.unsigned}.onnx", form)
        reference = ReducedViT(quantized_model(model, quantization), schedule, reduction=reduction)
        return graph, reference, quantization, model

    return lower


def run(file, pixels, *, optimized=True):
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options)
    return session.run(["logits"], {"pixel_values": pixels})[0]


def images_of(model, noise, photographs):
    height, width = model.patch_embed.img_size
    return [noise(5, height, width, seed=1), photographs(height, width)]


@pytest.mark.parametrize(
    "kind",
    [("deit_tiny", 16, MERGE), ("deit_tiny", 8, PRUNE), ("deit_distilled", 8, MERGE), ("gap", 4, MERGE)],
    ids=lambda kind: f"{kind[0]}-r{kind[1]}-{kind[2].name}",
)
def test_engines_compute_the_quantized_network(kind, lowered, noise, photographs):
    graph, reference, _, model = lowered(*kind)
    assert graph.precision == "int8"
    engine = build(graph, backend="onnxruntime", precision="int8")
    report = validate(engine, reference, iter(images_of(model, noise, photographs)))
    assert report, report.findings
    assert report.findings.typical_logit_error < 1e-3  # float32 but where a number lay between two codes
    assert report.engine.precision == "int8"


@pytest.mark.full
def test_the_whole_grid_of_graphs_is_exact(case, lowered, noise, photographs):
    test_engines_compute_the_quantized_network(case, lowered, noise, photographs)


@pytest.mark.parametrize("family", ["deit_tiny", pytest.param("reg4_dinov2_swiglu", marks=pytest.mark.full)])
def test_only_products_of_blocks_read_quantized_numbers(family, lowered):
    graph, _, quantization, _ = lowered(family, 8)
    nodes = onnx.load(graph.file, load_external_data=False).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    readers = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in nodes:
        if node.op_type == "QuantizeLinear":
            assert {reader.op_type for reader in readers[node.output[0]]} == {"DequantizeLinear"}
        if node.op_type == "DequantizeLinear":
            for reader in readers[node.output[0]]:
                assert reader.op_type == "MatMul" and reader.name.startswith("blocks.")
    products = [node for node in nodes if node.op_type == "MatMul" and node.name.startswith("blocks.")]
    assert len(products) == len(quantization.weights) + 2 * sum(".qkv" in name for name in quantization.weights)
    for product in products:
        assert all(made_by[name].op_type == "DequantizeLinear" for name in product.input), product.name
    # what tokens are matched on comes from the keys as the product puts them out
    for node in nodes:
        if node.domain == DOMAIN:
            behind = made_by[node.input[2]]
            while behind.op_type != "MatMul":
                assert behind.op_type in ("ReduceMean", "Transpose", "Reshape", "Add", "LayerNormalization")
                behind = made_by[behind.input[0]]
            assert behind.name.endswith(".attn.k.MatMul")


def test_codes_are_unsigned_only_in_name(lowered, noise):
    signed, _, _, model = lowered("deit_tiny", 8, form=QdqForm())
    pixels = noise(4, *model.patch_embed.img_size, seed=2)
    expected = run(signed.file, pixels, optimized=False)
    unsigned, *_ = lowered("deit_tiny", 8, form=QdqForm(unsigned=True))
    np.testing.assert_array_equal(run(unsigned.file, pixels, optimized=False), expected)


def test_another_quantizer_makes_the_same_numbers(lowered, exported, noise):
    """ONNX Runtime's own, told the same scales: it rounds the weights and puts the pairs in by itself."""
    graph, _, quantization, model = lowered("deit_tiny", 0)
    plain = onnx.load(exported("deit_tiny", 0).file)
    for node in plain.graph.node:
        node.name = node.name or node.output[0]
    products = [node for node in plain.graph.node if node.op_type == "MatMul" and node.name.startswith("blocks.")]
    overrides = {}
    for node in products:
        name = node.name.removesuffix(".MatMul")
        part = name.rsplit(".", maxsplit=1)[1]
        module = name.rpartition(".")[0] + ".qkv" if part in ("q", "k", "v") else name
        zero = np.array(0, np.int8)
        scale = np.array(quantization.activations[module], np.float32)
        overrides[node.input[0]] = [{"scale": scale, "zero_point": zero, "quant_type": QuantType.QInt8}]
        weight = numpy_helper.to_array(next(each for each in plain.graph.initializer if each.name == node.input[1]))
        scales = quantization.weights[module].scale.chunk(3)["qkv".index(part)] if module != name else None
        scales = quantization.weights[module].scale if scales is None else scales
        factor = model.blocks[0].attn.scale if part == "q" else 1.0
        overrides[node.input[1]] = [
            {"axis": 1, "scale": np.array(scale * factor, np.float32), "zero_point": zero,
             "quant_type": QuantType.QInt8} for scale in scales.numpy()
        ]  # fmt: skip
        assert weight.shape[1] == len(scales)
    ends = (np.float32(-1), np.float32(1))  # asked for, though the scales are told
    ranges = TensorsData(CalibrationMethod.MinMax, {node.input[0]: ends for node in products})
    quantizer = QDQQuantizer(
        plain, True, False, QuantType.QInt8, QuantType.QInt8, ranges, [node.name for node in products], [], ["MatMul"],
        {"TensorQuantOverrides": overrides, "OpTypesToExcludeOutputQuantization": ["MatMul"], "WeightSymmetric": True,
         "ActivationSymmetric": True},
    )  # fmt: skip
    quantizer.quantize_model()
    theirs = graph.file.with_name("theirs.onnx")
    onnx.save(quantizer.model.model, theirs)
    pixels = noise(4, *model.patch_embed.img_size, seed=2)
    np.testing.assert_allclose(
        run(theirs, pixels, optimized=False), run(graph.file, pixels, optimized=False), atol=1e-5
    )


@pytest.mark.parametrize("method", [Method(), Method(smooth=True, reparameterize=True)], ids=["plain", "migrated"])
def test_a_graph_says_how_it_is_quantized(method, lowered, fused_of):
    graph, _, quantization, model = lowered(
        "deit_distilled", 8, method=method, without=("blocks.1.attn.qkv", "blocks.2.mlp.fc2")
    )
    found = read_quantization(graph.file, model, fused_of(model, 8).weights, "int8")
    assert found.weights.keys() == quantization.weights.keys() and len(found.weights) == 4 * 3 - 2
    assert found.activations == dict(quantization.activations)
    for name, weight in quantization.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes)
        torch.testing.assert_close(found.weights[name].scale, weight.scale, rtol=1e-6, atol=0)
    for name, tensor in quantization.state.items():
        if name.removesuffix(".weight") not in quantization.weights:
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-6, atol=1e-7)


def test_codes_that_degrees_have_in_common_are_stored_once(make_vit, make_compensator, fused_of, noise, tmp_path):
    model = make_vit("deit_tiny")
    compensator = make_compensator(48, 4)
    (tmp_path / "float").mkdir()
    lowering = Lowering(model, WeightStore(tmp_path / "float"))
    store = WeightStore(tmp_path)
    graphs = {}
    calibration = calibrate([ReducedViT(model, 8)], torch.from_numpy(noise(4, 64, 64)), Method())
    for degree in (4, 8):
        own = make_vit("deit_tiny")
        compensation = compensator.between(0, degree, 0.1)
        weights = fuse(model.state_dict(), compensation)
        own.load_state_dict(weights)
        fused = replace(fused_of(own, degree), weights=weights, compensation=compensation)
        plain = lowering.lower(schedule_for(model, degree), fused, f"{degree}.onnx")
        quantization = calibration.quantization(own)
        graphs[degree] = quantized_graph(plain, model, quantization, store, f"{degree}.onnx", QdqForm())
    places = {
        degree: {
            each.name: tuple((entry.key, entry.value) for entry in each.external_data)
            for each in onnx.load(graph.file, load_external_data=False).graph.initializer
            if each.name.endswith(".codes")
        }
        for degree, graph in graphs.items()
    }
    assert places[4].keys() == places[8].keys()
    own = {name for name, place in places[4].items() if place != places[8][name]}
    assert own == {f"blocks.{block}.attn.{part}.weight.codes" for block in range(4) for part in "qv"}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_what_stands_in_the_graph(name, lowered):
    graph, _, quantization, _ = lowered("deit_tiny", 8, form=QdqForm(), method=Method(format=name))
    proto = onnx.load(graph.file, load_external_data=False)
    assert graph.precision == quantized_format_of(proto) == name
    inputs = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert bool(inputs) == (quantization.format.activation is not None)


def test_openvino_computes_the_quantized_network(lowered, noise):
    pytest.importorskip("openvino")
    graph, reference, _, model = lowered("deit_tiny", 0, form=BACKENDS["openvino"].qdq)
    pixels = noise(8, *model.patch_embed.img_size, seed=3)
    engine = build(graph, backend="openvino", precision="int8")
    with open_engine(engine.file, "openvino", precision="int8") as runner:
        found = runner.infer(pixels)
    expected = reference(torch.from_numpy(pixels)).numpy()
    assert np.median(np.abs(found - expected).max(axis=1)) < 0.02 * np.abs(expected).max()
