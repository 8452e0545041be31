"""Quantized graphs of which the rest is half: their types, what they compute, and the plans they become.

What a product computes is validated against PyTorch at the precision of float16. What a whole network of 8-bit inputs
computes cannot be: a difference of 1e-6 moves some inputs to the next code, and after a few blocks two ways of rounding
are as far apart as a fraction of what quantization itself changes.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.calib.quantize.grids import FORMATS
from tocom.calib.quantize.network import quantized_model
from tocom.export.engine.tensorrt.plan import PlanOptions, build_plan, folded
from tocom.export.graph.emulate_half import emulate_half
from tocom.export.graph.half_precision import precision_of, typed
from tocom.export.graph.inline import inline
from tocom.export.graph.insert_qdq import InsertQDQ, quantized_format_of
from tocom.export.graph.lower import lower
from tocom.export.graph.weight_store import WeightStore
from tocom.runtime.backends import PRECISIONS
from tocom.runtime.errors import InputError
from tocom.vit import ReducedViT, schedule_for

RTX = "tensorrt-rtx"
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
CODES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN,
         "int8-weights": TensorProto.INT8, "int4-weights": TensorProto.INT4}  # fmt: skip
WEIGHTS_ONLY = ("int8-weights", "int4-weights")
SPACING = 2.0**-10  # of float16


def quantized_file(engine_file, model, degree, form, rest, folder, pixels):
    """A float32 graph as a quantized one, in a folder of its own, and what it was made from."""
    calibration = calibrate([ReducedViT(model, degree)], torch.from_numpy(pixels), Method(format=form))
    quantization = calibration.quantization(model)
    graph = InsertQDQ(model, model.state_dict(), quantization)(ir.load(engine_file)).model
    WeightStore(folder).place(graph)
    file = folder / "graph.onnx"
    file.write_bytes(typed(ir.to_proto(graph), rest).SerializeToString())
    onnx.checker.check_model(file)
    return SimpleNamespace(file=file, model=model, quantization=quantization, degree=degree)


@pytest.fixture(scope="module")
def make(exported, make_vit, noise, tmp_path_factory):
    """A family's quantized graph at a degree, the rest of it in a format."""

    @cache
    def graph(form, degree=8, rest="fp16", family="deit_tiny"):
        model, folder = make_vit(family), tmp_path_factory.mktemp("quantized")
        pixels = noise(8, *model.patch_embed.img_size, seed=1)
        return quantized_file(exported(family, degree).file, model, degree, form, rest, folder, pixels)

    return graph


def outline(proto):
    """Initializers and types by name, and who made what, of a graph without functions; its types are inferred."""
    graph = shape_inference.infer_shapes(inline(proto), strict_mode=True, check_type=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    initializers = {each.name: each for each in graph.initializer}
    types |= {name: each.data_type for name, each in initializers.items()}
    makers = {name: node for node in graph.node for name in node.output}
    return SimpleNamespace(nodes=graph.node, types=types, initializers=initializers, makers=makers)


@pytest.mark.parametrize("form", FORMATS)
def test_the_rest_is_half_and_nothing_stands_between(make, form):
    """Products read DequantizeLinear itself, which puts out half, and QuantizeLinear reads what made its input."""
    proto = onnx.load(make(form).file)
    assert precision_of(proto) == "fp16" and quantized_format_of(proto) == form
    found = outline(proto)
    products = [node for node in found.nodes if node.name.startswith("blocks.") and node.op_type == "MatMul"]
    assert len(products) == 4 * 6  # q, k and v by themselves
    for product in products:
        for value in product.input if form not in WEIGHTS_ONLY else product.input[1:]:
            assert found.makers[value].op_type == "DequantizeLinear"
        assert {found.types[value] for value in (*product.input, *product.output)} == {TensorProto.FLOAT16}
    pairs = [node for node in found.nodes if node.op_type == "QuantizeLinear"]
    assert bool(pairs) == (form not in WEIGHTS_ONLY)
    assert all(found.makers[node.input[0]].op_type != "Cast" for node in pairs)
    for node in found.nodes:
        if node.op_type in QUANTIZERS:
            assert found.types[node.input[1]] == TensorProto.FLOAT16
        if node.op_type in ("TopK", "LpNormalization", "Log"):
            assert found.types[node.input[0]] in (TensorProto.FLOAT, TensorProto.INT64)


@pytest.mark.parametrize("form", FORMATS)
def test_scales_lose_nothing_in_half(make, form):
    found = outline(onnx.load(make(form).file))
    scales = [found.makers[node.input[1]] for node in found.nodes if node.op_type in QUANTIZERS]
    assert scales and all(node.op_type == "Cast" for node in scales)
    for node in scales:
        scale = numpy_helper.to_array(found.initializers[node.input[0]])
        assert (scale.astype(np.float16) == scale).all()


def test_bfloat16_cannot_hold_scales_so_they_stay_wide(make):
    found = outline(onnx.load(make("int8", rest="bf16").file))
    for node in found.nodes:
        if node.op_type in QUANTIZERS:
            assert found.types[node.input[1]] == TensorProto.FLOAT
    product = next(node for node in found.nodes if node.name == "blocks.0.attn.k.MatMul")
    assert {found.types[value] for value in product.input} == {TensorProto.BFLOAT16}


def test_eight_bit_floats_are_torchs_and_saturate():
    """ONNX Runtime's QuantizeLinear, over every finite float16."""
    scale = np.float32(np.float16(0.0033))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    graph = helper.make_graph(nodes, "pair", [x], [y], [numpy_helper.from_array(scale, "scale"), zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)].astype(np.float32)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": values})
    codes = (torch.from_numpy(values) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(found, (codes.float() * scale).numpy())
    assert found.max() == 448 * scale


def carried_out(made, pixels, outputs=()):
    """The graph's logits, and other values in it, with every rounding."""
    proto = emulate_half(onnx.load(made.file, load_external_data=False))
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    file = made.file.with_name("rounded.onnx")
    file.write_bytes(proto.SerializeToString())
    names = ["logits", *outputs]
    found = onnxruntime.InferenceSession(file).run(names, {"pixel_values": pixels})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def maker(found, value, kind):
    """The nearest node of a kind behind a value, along first inputs."""
    while found.makers[value].op_type != kind:
        value = found.makers[value].input[0]
    return found.makers[value]


@pytest.mark.parametrize("form", FORMATS)
def test_every_product_computes_what_it_does_in_torch(make, form, noise):
    """On what it is given in the graph, with its bias, at the precision of float16."""
    made = make(form)
    found = outline(emulate_half(onnx.load(made.file, load_external_data=False)))
    read, written = {}, {}
    for add in found.nodes:
        name = add.name.removesuffix(".Add")
        if name == add.name or not name.startswith("blocks."):
            continue
        product = maker(found, add.input[0], "MatMul")
        first = product if form in WEIGHTS_ONLY else maker(found, product.input[0], "QuantizeLinear")
        read[name], written[name] = first.input[0], f"{add.output[0]}.wide"
    assert len(read) == 4 * 6
    values = carried_out(made, noise(2, 64, 64), {*read.values(), *written.values()})
    oracle = quantized_model(made.model, made.quantization)
    for name in read:
        block, _, part = name.rpartition(".")
        if part in ("q", "k", "v"):
            attn = oracle.get_submodule(block)
            expected = attn.qkv(values[read[name]]).unflatten(-1, (3, -1))[..., "qkv".index(part), :]
            expected = expected * attn.scale if part == "q" else expected
        else:
            expected = oracle.get_submodule(name)(values[read[name]])
        result, tolerance = values[written[name]], 2 * SPACING * expected.abs().max()
        assert (result - expected).abs().max() < tolerance, name
        assert (1.01 * result - expected).abs().max() > tolerance


@pytest.mark.parametrize("form", FORMATS)
def test_networks_compute_what_they_do_in_torch(make, form, noise):
    """Weights alone: as precisely as float16. Inputs too: nearer to PyTorch's than that is to the float network."""
    made, pixels = make(form), noise(32, 64, 64, seed=2)
    logits = carried_out(made, pixels)["logits"]
    plain, oracle = (
        ReducedViT(model, made.degree)(torch.from_numpy(pixels))
        for model in (made.model, quantized_model(made.model, made.quantization))
    )
    error, change = ((one - oracle).square().mean(dim=1).sqrt() for one in (logits, plain))  # of each image
    assert error.median() < (SPACING * oracle.abs().max() if form in WEIGHTS_ONLY else change.median())


def dequantized_weights(graph):
    """The nodes that make weights of codes, and the initializers."""
    initializers = {each.name: each for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in initializers]
    return nodes, initializers


@pytest.mark.parametrize(
    "form",
    [form if form in ("int8", "int4-weights") else pytest.param(form, marks=pytest.mark.full) for form in FORMATS],
)
def test_weights_stay_codes_where_nothing_else_that_stands_still_is_left(make, form, tmp_path):
    graph = onnx.load(folded(make(form).file, tmp_path)).graph
    weights, initializers = dequantized_weights(graph)
    assert len(weights) == 4 * 6
    for node in weights:
        assert [initializers[name].data_type for name in node.input[:2]] == [CODES[form], TensorProto.FLOAT16]
    moving = {"pixel_values", *(node.output[0] for node in weights)}
    for node in graph.node:
        assert node in weights or moving & set(node.input), node
        moving.update(node.output)


def test_four_bit_weights_get_their_scales_in_blocks(make, tmp_path):
    """Where their inputs, 192 of fc2 and 48 of the others, can be cut into blocks; the numbers stay the same."""
    made = make("int4-weights")
    weights, initializers = dequantized_weights(onnx.load(folded(made.file, tmp_path)).graph)
    for node in weights:
        codes, scale = (numpy_helper.to_array(initializers[name]) for name in node.input[:2])
        attributes = {each.name: each.i for each in node.attribute}
        name = node.input[0].removesuffix(".weight.codes")
        if not name.endswith("fc2"):
            assert attributes == {"axis": 1} and scale.shape == (codes.shape[1],)
            continue
        assert attributes == {"axis": 0, "block_size": 64} and scale.shape == (3, 48) and len(node.input) == 2
        expected = made.quantization.weights[name].values.T
        assert np.array_equal(codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 64, axis=0), expected)


@pytest.fixture
def plan_of():
    """Builds plans, where the library is there."""
    pytest.importorskip(
        "tensorrt_rtx",
        reason="TensorRT for RTX is not installed: pip install tocom[tensorrt-rtx]",
        exc_type=ImportError,
    )
    return lambda made, **options: build_plan(made.file, RTX, PlanOptions(batch=(1, 5, 8), **options))


def require_codes(made, plan):
    """Rows of every weight stand in the plan as codes, and not as half."""
    weights, initializers = dequantized_weights(onnx.load(made.file).graph)
    for node in weights:
        codes = numpy_helper.to_array(initializers[node.input[0]])
        name = node.input[0].removesuffix(".weight.codes")
        if codes.dtype == ml_dtypes.int4:
            assert packed(codes) in plan.content or packed(codes.T) in plan.content, name
            continue
        scale = numpy_helper.to_array(initializers[f"{name}.weight.scale"])
        halves = (codes.astype(np.float32) * scale).astype(np.float16)
        assert all(row.tobytes() in plan.content for row in codes[[0, -1]]), name  # q, k and v are one product there
        assert not any(row.tobytes() in plan.content for row in (halves[0], halves.T[0])), name


def packed(codes):
    """Two 4-bit numbers per byte."""
    low, high = codes.astype(np.int8).reshape(-1, 2).T & 15
    return (low | high << 4).astype(np.uint8).tobytes()


KINDS = [("deit_tiny", 0), ("deit_tiny", 8), ("deit_tiny", 16), ("deit_distilled", 8), ("reg4_dinov2", 13), ("map", 16)]


@pytest.mark.full
@pytest.mark.parametrize(("family", "degree"), KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_builds_and_its_plan_holds_codes(make, plan_of, form, family, degree, options=None):
    """With the library's default targets, which are fewer for 8-bit floats."""
    made = make(form, degree, family=family)
    plan = plan_of(made, **(options or {}))
    assert not plan.log
    products = len(dequantized_weights(onnx.load(made.file).graph)[0])
    assert plan.layers["dequantize"] == products + plan.layers.get("quantize", 0)
    assert ("quantize" in plan.layers) == (form not in WEIGHTS_ONLY)
    require_codes(made, plan)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_merging_builds_and_its_plan_holds_codes(make, plan_of, form):
    options = {"targets": ("sm89",)}
    test_every_format_builds_and_its_plan_holds_codes(make, plan_of, form, "deit_tiny", 8, options)


@pytest.mark.full
def test_eight_bit_floats_for_a_gpu_without_them_are_refused(make, plan_of):
    with pytest.raises(InputError, match=r"cannot build graph.onnx: .*sm80.*fp8"):
        plan_of(make("fp8"), targets=("sm80",))


@pytest.mark.full
def test_plans_shrink_by_what_weights_do(make_tiny, fused_of, plan_of, noise, tmp_path):
    model = make_tiny("deit_tiny_patch16_224", embed_dim=384, num_heads=6)
    (tmp_path / "float").mkdir()
    plain = lower(model, schedule_for(model, 8), fused_of(model, 8), WeightStore(tmp_path / "float"), "fp32.onnx").file
    half = plain.with_name("fp16.onnx")
    half.write_bytes(typed(onnx.load(plain, load_external_data=False), "fp16").SerializeToString())
    before = len(plan_of(SimpleNamespace(file=half), targets=("sm89",)).content)
    for form in FORMATS:
        (tmp_path / form).mkdir()
        made = quantized_file(plain, model, 8, form, "fp16", tmp_path / form, noise(8, 64, 64))
        weights = sum(weight.codes.numel() for weight in made.quantization.weights.values())
        saved = weights * (1.5 if form == "int4-weights" else 1)
        assert 0.8 * saved < before - len(plan_of(made, targets=("sm89",)).content) < 1.1 * saved


def test_the_engine_names_the_formats():
    assert set(FORMATS) < set(PRECISIONS)
