"""Bugs in an operator's body, in one block: who merges into whom, who is dropped, and what becomes of them."""

from __future__ import annotations

from onnx import TensorProto, helper

from tests.export.proof.surgery import Nodes, Surgery, attribute, constant


def set_number(value: str, name: str, number: int, block: int = 1):
    """An attribute of the node that makes a value."""

    def plant(graph: Surgery):
        attribute(graph.body(block).maker(value), name).i = number

    return plant


def protecting(count: int, block: int = 0):
    """Another number of protected tokens, in the node that calls the operator."""

    def plant(graph: Surgery):
        graph.body(block)
        attribute(graph.operator(block), "protected").i = count
        for value in list(graph.owner.value_info):  # decisions are others, and more or fewer of them
            if value.name.startswith(f"block.{block}.") and value.name.endswith((".src", ".dst", ".unm")):
                graph.owner.value_info.remove(value)

    return plant


def not_normalized(graph: Surgery):
    graph.body(1).instead("unit", "Identity", "matched")


def rolled(nodes: Nodes, value: str, axis: int = 1):
    """The first number of a value goes to the end."""
    for name, ends in (("planted.first", (0, 1)), ("planted.rest", (1, 1 << 40))):
        constant(nodes, f"{name}.0", value_ints=[ends[0]])
        constant(nodes, f"{name}.1", value_ints=[ends[1]])
    constant(nodes, "planted.axis", value_ints=[axis])
    reader, readers = nodes.readers(value)[0], nodes.readers(value)
    parts = [
        helper.make_node("Slice", [value, f"{name}.0", f"{name}.1", "planted.axis"], [name])
        for name in ("planted.first", "planted.rest")
    ]
    nodes.before(
        reader, *parts, helper.make_node("Concat", ["planted.rest", "planted.first"], ["planted.rolled"], axis=axis)
    )
    nodes.read(value, "planted.rolled", readers)


def best_match_left_unmerged(graph: Surgery):
    rolled(graph.body(1), "ranked")


def unmerged_shifted(graph: Surgery):
    rolled(graph.body(1), "unm_rank_13")


def unmerged_by_score(graph: Surgery):
    graph.body(1).instead("unm_rank_13", "Identity", "unm_rank")


def unmerged_by_position(graph: Surgery):
    body = graph.body(1)
    body.calculate("unm_rank_13", "Sub", ["a_count", "count"], "planted.count")
    node = helper.make_node("TopK", ["unm_rank", "planted.count"], ["planted.order", "_planted"], axis=1, largest=0)
    body.before(body.maker("unm_rank_13"), node)
    body.instead("unm_rank_13", "Identity", "planted.order")


def next_destination(graph: Surgery):
    body = graph.body(1)
    index = body.maker("pick").input[1]
    body.calculate("pick", "Shape", ["b_positions"], "planted.shape")
    body.calculate("pick", "Squeeze", ["planted.shape", "zero"], "planted.count")
    body.calculate("pick", "Squeeze", ["one", "zero"], "planted.one")
    body.calculate("pick", "Add", [index, "planted.one"], "planted.next")
    body.calculate("pick", "Mod", ["planted.next", "planted.count"], "planted.index")
    body.instead("pick", "Gather", "b_positions", "planted.index")


def a_and_b_swapped(graph: Surgery):
    body = graph.body(1)
    readers = {name: body.readers(name) for name in ("first_a", "first_b")}
    body.read("first_a", "planted.first", readers["first_a"])
    body.read("first_b", "first_a", readers["first_b"])
    body.read("planted.first", "first_b", readers["first_a"])


def decided_for_the_first_image(graph: Surgery):
    body = graph.body(1)
    readers = body.readers("scores")
    body.before(
        readers[0],
        helper.make_node("Shape", ["scores"], ["planted.shape"]),
        helper.make_node("Gather", ["scores", "zero"], ["planted.one"], axis=0),
        helper.make_node("Expand", ["planted.one", "planted.shape"], ["planted.all"]),
    )
    body.read("scores", "planted.all", readers)


def scores_in(dtype: int):
    """What tokens are matched on is rounded to a narrow format before the scores."""

    def plant(graph: Surgery):
        body = graph.body(1)
        body.calculate("a", "Cast", ["unit"], "unit.narrow", to=dtype)
        body.calculate("a", "Cast", ["unit.narrow"], "unit.wide", to=TensorProto.FLOAT)
        body.read("unit", "unit.wide", [body.maker(each) for each in "ab"])

    return plant


def mean_without_sizes(graph: Surgery):
    body = graph.body(1)
    first = body.maker("size").output[0]
    body.calculate(first, "Div", ["b_size", "b_size"], "planted.ones")
    body.calculate(first, "Div", ["src_size", "src_size"], "planted.each")
    body.calculate(first, "MatMul", ["into", "planted.each"], "planted.moved")
    body.calculate(first, "Add", ["planted.ones", "planted.moved"], "planted.count")
    body.calculate("own", "Div", ["planted.ones", "planted.count"], "planted.own")
    body.instead("own", "CastLike", "planted.own", "x")
    body.calculate("weights", "Div", ["into", "planted.count"], "planted.weights")
    body.instead("weights", "CastLike", "planted.weights", "x")


def sum_instead_of_mean(graph: Surgery):
    body = graph.body(1)
    body.instead("own", "CastLike", "b_size", "x")
    body.instead("weights", "CastLike", body.maker(body.maker("weights").input[0]).input[0], "x")


def sizes_not_added(graph: Surgery):
    concat = graph.body(1).maker("merged_size")
    concat.input[2] = "b_size"


def merged_token_dropped(graph: Surgery):
    """The destinations stay as they are: a token that should be merged is thrown away."""
    body = graph.body(1)
    body.maker("merged").input[2] = body.maker(body.maker("mean").input[0]).input[0]


def sizes_in_half(graph: Surgery):
    body = graph.body(1)
    body.calculate("merged_size", "Cast", ["size"], "size.half", to=TensorProto.FLOAT16)
    body.calculate("merged_size", "Cast", ["size.half"], "size.wide", to=TensorProto.FLOAT)
    body.maker("merged_size").input[2] = "size.wide"


# pruning


def fused_without_weights(graph: Surgery):
    attribute(graph.body(1).maker(graph.body(1).maker("floor").input[0]), "value_float").f = 1e3


def kept_shifted(graph: Surgery):
    rolled(graph.body(1), "kept")


def largest_size_only(graph: Surgery):
    graph.body(1).maker("size").op_type = "ReduceMax"


def fused_token_first(graph: Surgery):
    concat = graph.body(1).maker("pruned")
    concat.input[1], concat.input[2] = concat.input[2], concat.input[1]


def prefix_dropped_from_ranking(graph: Surgery):
    """Positions are counted from behind the prefix, and nobody adds it again."""
    graph.body(1).instead("position", "Identity", graph.body(1).maker("position").input[0])
