"""Every graph transform refuses what it is not made for, and notices where it has not done what it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import PassBase, PassResult, PostconditionError, PreconditionError

from tocom.calib.quantize.calibrate import Method, calibrate
from tocom.export.engine.tensorrt.four_bit import PutScalesInBlocks
from tocom.export.graph.emulate_half import EmulateHalf
from tocom.export.graph.graph_pass import ProtoPass, apply, copy_of, reductions_of
from tocom.export.graph.half_precision import HalfPrecision, typed
from tocom.export.graph.inline import Inline
from tocom.export.graph.insert_qdq import InsertQDQ
from tocom.export.graph.slice_bound import SliceBound
from tocom.export.graph.strip import StripCompensation, StripReductions
from tocom.export.graph.template import Retarget
from tocom.vit import ReducedViT

FAMILY, DEGREE = "deit_tiny", 8


@pytest.fixture
def graph(exported) -> onnx.ModelProto:
    return onnx.load(exported(FAMILY, DEGREE).file, load_external_data=False)


def idle(graph_pass: PassBase) -> PassBase:
    """The same pass, which does nothing at all."""
    copy_first = isinstance(graph_pass, ProtoPass)
    kind = type(graph_pass)
    name = f"Idle{kind.__name__}"
    lazy = type(name, (kind,), {"call": lambda _, model: PassResult(copy_of(model) if copy_first else model, False)})
    made = object.__new__(lazy)
    vars(made).update(vars(graph_pass))
    return made


def check(graph_pass: PassBase, graph: onnx.ModelProto, spoil: Callable[[onnx.ModelProto], object], words: str) -> None:
    """The pass runs and leaves its input alone; it refuses a spoilt graph; and it notices that it does nothing."""
    before = graph.SerializeToString()
    assert apply(graph_pass, graph).SerializeToString() != before
    assert graph.SerializeToString() == before
    with pytest.raises(PostconditionError, match="must|needs"):
        apply(idle(graph_pass), graph)
    spoilt = copy_of(graph)
    spoil(spoilt)
    with pytest.raises(PreconditionError, match=words):
        apply(graph_pass, spoilt)


def output_of(graph: onnx.ModelProto, name: str) -> None:
    graph.graph.output.append(helper.make_empty_tensor_value_info(name))


def test_inlining(graph) -> None:
    check(Inline(), graph, lambda spoilt: spoilt.ClearField("functions"), "TokenMerge.* have none")


def test_the_slice_bound(graph) -> None:
    decision = reductions_of(graph)[0].output[2]
    check(SliceBound(), graph, lambda spoilt: output_of(spoilt, decision), f"read by nobody.*{decision}")


def test_taking_reductions_out(graph) -> None:
    sizes = reductions_of(graph)[-1].output[1]

    def pool(spoilt: onnx.ModelProto) -> None:
        spoilt.graph.node.append(helper.make_node("ReduceSum", [sizes], ["pooled"]))

    check(StripReductions(), graph, pool, "read by attention alone")


def test_reductions_whose_result_is_still_read(graph, monkeypatch) -> None:
    """What is left out must not leave a hole."""
    monkeypatch.setattr("tocom.export.graph.strip._leave_out", lambda graph, _: graph.node.remove(graph.node[40]))
    for node in reductions_of(graph):
        node.domain, node.op_type = "", "Identity"
    graph.ClearField("functions")
    with pytest.raises(PostconditionError, match="is gone"):
        apply(StripReductions(), graph)


def test_taking_a_compensation_out(graph) -> None:
    gate = numpy_helper.from_array(np.ones(4, np.float32), "blocks.0.attn.q.gate")
    graph.graph.initializer.append(gate)
    check(StripCompensation(), graph, lambda spoilt: spoilt.graph.initializer.remove(gate), "there is none")


def test_another_degree(graph, make_vit) -> None:
    reference, other = ReducedViT(make_vit(FAMILY), DEGREE), ReducedViT(make_vit(FAMILY), DEGREE - 1)
    blocks = reference.deciding_blocks
    assert blocks == other.deciding_blocks
    tokens = (reference.schedule.tokens_in, *(reference.schedule.tokens[block + 1] for block in blocks))
    retarget = Retarget(tokens, {}, other, {})
    check(retarget, graph, lambda spoilt: spoilt.graph.node.remove(reductions_of(spoilt)[0]), "as often, does so")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(graph, precision) -> None:
    def spoil(spoilt: onnx.ModelProto) -> None:
        spoilt.CopyFrom(typed(spoilt, precision))

    check(HalfPrecision(precision), graph, spoil, "must be float32.*casts to half")


def test_one_product_that_stays_float_is_noticed(graph, monkeypatch) -> None:
    decided = HalfPrecision("fp16").call.__globals__["_Typing"]._type_of
    first = next(
        node.name for node in graph.graph.node if node.op_type == "MatMul" and node.name.endswith("fc1.MatMul")
    )

    def forgetful(self, node: ir.Node) -> ir.DataType:
        return ir.DataType.FLOAT if node.name == first else decided(self, node)

    monkeypatch.setattr("tocom.export.graph.half_precision._Typing._type_of", forgetful)
    with pytest.raises(PostconditionError, match=f"{first} must read fp16 alone"):
        apply(HalfPrecision("fp16"), graph)


def test_emulating_half_precision(graph) -> None:
    def narrow_input(spoilt: onnx.ModelProto) -> None:
        spoilt.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16

    check(EmulateHalf(), typed(graph, "fp16"), narrow_input, "inputs must not be half")


def test_quantizing(graph, exported, make_vit, noise) -> None:
    model = make_vit(FAMILY)
    pixels = torch.from_numpy(noise(4, *model.patch_embed.img_size))
    calibration = calibrate([ReducedViT(model, DEGREE)], pixels, Method())
    insert = InsertQDQ(model, exported(FAMILY, DEGREE).graph.fused.weights, calibration.quantization(model))
    inputs = ir.load(exported(FAMILY, DEGREE).file)  # with its weights, whose folder a proto does not know
    with pytest.raises(PostconditionError, match="must be quantized"):
        idle(insert)(inputs)
    quantized = insert(inputs).model
    with pytest.raises(PreconditionError, match="must not be quantized twice"):
        insert(quantized)
    nameless = ir.load(exported(FAMILY, DEGREE).file)
    for node in nameless.graph:
        node.name = node.name.replace("fc2.MatMul", "MatMul")
    with pytest.raises(PreconditionError, match=r"has no blocks\.0\.mlp\.fc2\.MatMul"):
        insert(nameless)


def test_scales_in_blocks() -> None:
    scale = numpy_helper.from_array(np.ones(3, np.float32), "scale")
    codes = helper.make_tensor("codes", TensorProto.INT4, [64, 3], np.zeros(192, np.int8))
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scale"], ["y"], name="weight", axis=1)]
    ports = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 3])]
    graph = helper.make_model(helper.make_graph(nodes, "small", [], ports, [codes, scale]))

    def one_scale(spoilt: onnx.ModelProto) -> None:
        spoilt.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones((), np.float32), "scale"))

    check(PutScalesInBlocks(), graph, one_scale, "constant scales, one per output")


def test_plugins(graph) -> None:
    plugin = pytest.importorskip("tocom.export.engine.tensorrt.plugin", reason="needs Triton", exc_type=ImportError)
    check(plugin.WithPlugins(), graph, lambda spoilt: spoilt.ClearField("functions"), "must have its function")
    with pytest.raises(PostconditionError, match="must be inlined.*TokenMerge"):
        apply(idle(plugin.LeavePlugins()), graph)
