"""Bugs in the graph itself: attention, residuals, norms, embedding and head of a compiler that gets one thing wrong."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from tests.export.proof.surgery import Nodes, Surgery, attribute


def product(graph: Surgery, name: str):
    return graph.named(f"blocks.{name}.MatMul")


def softmax(graph: Surgery, block: int):
    return graph.attention(block, "Softmax")[0]


def bias_by_size(graph: Surgery, block: int):
    """The node that adds the logarithm of the sizes in front of the softmax."""
    return graph.maker(softmax(graph, block).input[0])


def pass_on(node, index: int = 0):
    """A node hands one of its inputs on instead of computing."""
    value = node.input[index]
    node.op_type = "Identity"
    del node.input[:], node.attribute[:]
    node.input.append(value)


def keys_of(graph: Surgery, block: int) -> str:
    """The keys [B, H, N, D] that the metric is the mean of."""
    return graph.maker(f"block.{block}.signal").input[0]


# the compensator


def delta_dropped(graph: Surgery):
    product(graph, "1.attn.v").input[1] = "blocks.1.attn.v.weight"


def gate_of(graph: Surgery, block: int, which: str):
    """The node that multiplies a pair's first factor by the gate."""
    return next(node for node in graph.readers(f"blocks.{block}.attn.{which}.down") if node.op_type == "Mul")


def gate_flipped(graph: Surgery):
    graph.change(gate_of(graph, 2, "q"), 1, lambda gate: -gate)


def gate_of_another_degree(graph: Surgery):
    def at_degree_4(gate):  # of 16 groups, the last 4 instead of the last 8
        gate.ravel()[: gate.size * 12 // 16] = 0
        return gate

    graph.change(gate_of(graph, 1, "v"), 1, at_degree_4)


def delta_twice(graph: Surgery):
    used = product(graph, "0.attn.v")
    _weight, delta = graph.maker(used.input[1]).input
    graph.before(used, helper.make_node("Add", [used.input[1], delta], ["twice"]))
    used.input[1] = "twice"


def delta_scale_wrong(graph: Surgery):
    graph.change(gate_of(graph, 1, "q"), 1, lambda gate: gate * 1.1)


# attention


def size_forgotten(graph: Surgery):
    node = bias_by_size(graph, 2)
    pass_on(node)


def size_subtracted(graph: Surgery):
    bias_by_size(graph, 1).op_type = "Sub"


def size_not_in_logarithm(graph: Surgery):
    pass_on(graph.attention(2, "Log")[0])


def size_of_an_earlier_block(graph: Surgery):
    log = graph.attention(2, "Log")[0]
    ends = [graph.constant(np.array([at]), f"planted.{at}") for at in (0, 49, 1)]
    graph.before(log, helper.make_node("Slice", ["block.0.token_size", *ends[:2], ends[2]], ["stale"]))
    log.input[0] = "stale"


def log_in_half(graph: Surgery):
    size = graph.attention(2, "Log")[0].output[0]
    narrow(graph, size, TensorProto.FLOAT16)


def narrow(nodes: Nodes, value: str, dtype: int):
    readers = nodes.readers(value)
    nodes.before(
        readers[0],
        helper.make_node("Cast", [value], [f"{value}.narrow"], to=dtype),
        helper.make_node("Cast", [f"{value}.narrow"], [f"{value}.wide"], to=TensorProto.FLOAT),
    )
    nodes.read(value, f"{value}.wide", readers)


def queries_and_keys_swapped(graph: Surgery):
    for kind in ("MatMul", "Add"):
        q, k = (graph.named(f"blocks.1.attn.{each}.{kind}") for each in "qk")
        q.input[1], k.input[1] = k.input[1], q.input[1]


def scaled_by(factor: float):
    def plant(graph: Surgery):
        scores = softmax(graph, 1).input[0]
        scores = graph.maker(scores).input[0]  # before the sizes
        graph.constant(np.float32(factor), "planted.scale")
        graph.behind(scores, "Mul", "planted.scale")

    return plant


def no_bias(which: str):
    def plant(graph: Surgery):
        pass_on(graph.named(f"blocks.1.attn.{which}.Add"))

    return plant


def softmax_over_queries(graph: Surgery):
    attribute(softmax(graph, 1), "axis").i = 2


def heads_interleaved(graph: Surgery):
    """Width is read as [D, H] where it is [H, D]."""
    node = product(graph, "1.attn.v")
    graph.change(node, 1, lambda w: w.reshape(len(w), 3, 16).transpose(0, 2, 1).reshape(w.shape))


def no_residual(graph: Surgery):
    pass_on(graph.maker("block.1.attended"), 1)


def images_share_attention(graph: Surgery):
    """Every image is attended as the first one is."""
    value = softmax(graph, 1).output[0]
    reader = graph.readers(value)[0]
    shape, first = "planted.shape", graph.constant(np.array([0]), "planted.first")
    graph.before(
        reader,
        helper.make_node("Shape", [value], [shape]),
        helper.make_node("Gather", [value, first], ["planted.one"], axis=0),
        helper.make_node("Expand", ["planted.one", shape], ["planted.all"]),
    )
    graph.read(value, "planted.all", [reader])


# what is decided on


def metric_of_values(graph: Surgery):
    weighted = graph.readers(softmax(graph, 1).output[0])[0]
    graph.maker("block.1.signal").input[0] = weighted.input[1]


def metric_of_one_head(graph: Surgery):
    node = graph.maker("block.1.signal")
    axes = node.input[1]
    first = graph.constant(np.array([0]), "planted.head")
    graph.before(node, helper.make_node("Gather", [node.input[0], first], ["planted.keys"], axis=1))
    node.input[:] = ["planted.keys", axes]


def attention_of_one_head(graph: Surgery):
    squeeze = graph.maker("block.1.signal")
    mean = graph.maker(squeeze.input[0])
    metric_like = mean.input[0]
    first = graph.constant(np.array([0]), "planted.head")
    graph.before(mean, helper.make_node("Gather", [metric_like, first], ["planted.attention"], axis=1))
    mean.input[0] = "planted.attention"


def attention_without_sizes(graph: Surgery):
    mean = graph.maker(graph.maker("block.1.signal").input[0])
    pass_on(graph.maker(graph.maker(mean.input[0]).input[0]))


# norms, residuals, MLP


def gelu_by_tanh(graph: Surgery):
    attribute(graph.mlp(2, "Gelu")[0], "approximate").s = b"tanh"


def epsilon(norm: str):
    def plant(graph: Surgery):
        attribute(graph.named(f"blocks.{norm}.LayerNormalization"), "epsilon").f = 1e-5

    return plant


def norm_of_the_block_before(graph: Surgery):
    graph.named("blocks.2.norm1.LayerNormalization").input[1] = "blocks.1.norm1.weight"


def scale_lost(graph: Surgery):
    pass_on(graph.readers("blocks.1.ls1.gamma")[0])


def scale_twice(graph: Surgery):
    node = graph.readers("blocks.1.ls2.gamma")[0]
    graph.behind(node.output[0], "Mul", "blocks.1.ls2.gamma")


def residual_before_merging(graph: Surgery):
    add = graph.maker("block.2.tokens")
    ends = [graph.constant(np.array([at]), f"planted.{at}") for at in (0, 49, 1)]
    graph.before(add, helper.make_node("Slice", ["block.1.attended", *ends], ["planted.residual"]))
    add.input[0] = "planted.residual"


def mlp_before_the_residual(graph: Surgery):
    """The MLP reads the tokens that it is added to without the norm."""
    norm = graph.named("blocks.2.norm2.LayerNormalization")
    graph.read(norm.output[0], "block.2.remaining", graph.readers(norm.output[0]))


# ends


def positions_shifted(graph: Surgery):
    graph.change(graph.maker("block.0.tokens"), 1, lambda positions: np.roll(positions, 1, axis=1))


def class_token_without_position(graph: Surgery):
    def without(positions):
        positions[:, 0] = 0
        return positions

    graph.change(graph.maker("block.0.tokens"), 1, without)


def colours_backwards(graph: Surgery):
    graph.change(next(n for n in graph.owner.node if n.op_type == "Conv"), 1, lambda weight: weight[:, ::-1])


def normalized_twice(graph: Surgery):
    conv = next(n for n in graph.owner.node if n.op_type == "Conv")
    mean = graph.constant(np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1), "planted.mean")
    std = graph.constant(np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1), "planted.std")
    graph.before(
        conv,
        helper.make_node("Sub", ["pixel_values", mean], ["planted.less"]),
        helper.make_node("Div", ["planted.less", std], ["planted.pixels"]),
    )
    conv.input[0] = "planted.pixels"


def head_reads_the_other_token(graph: Surgery):
    one, other = (graph.maker(graph.maker(value).input[0]) for value in graph.maker(two_heads(graph)).input)
    one.input[1], other.input[1] = other.input[1], one.input[1]


def two_heads(graph: Surgery) -> str:
    return graph.maker("logits").input[0]


def no_final_norm(graph: Surgery):
    pass_on(graph.readers("norm.weight")[0])


def classes_shifted(graph: Surgery):
    graph.change(graph.maker("logits"), 1, lambda weight: np.roll(weight, 1, axis=0))


def average_without_sizes(graph: Surgery):
    division = next(node for node in graph.owner.node if node.op_type == "Div" and node.name == "node_div")
    total = graph.maker(division.input[0])
    tokens = graph.maker(total.input[0]).input[0]
    axes = total.input[1]
    graph.instead(division.output[0], "ReduceMean", tokens, axes, keepdims=0)


def pooling_without_sizes(graph: Surgery):
    names = [node.name for node in graph.owner.node]
    after = list(graph.owner.node)[names.index("blocks.2.mlp.fc2.Add") :]
    pass_on(graph.maker(next(node for node in after if node.op_type == "Softmax").input[0]))
