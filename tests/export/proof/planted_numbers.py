"""Bugs in the numbers: weights that are not the checkpoint's, and codes and scales that are not the calibration's."""

from __future__ import annotations

import numpy as np

from tests.export.proof.planted_network import product
from tests.export.proof.surgery import Surgery


def largest_weight(change):
    """Changes one number, the largest of a weight."""

    def plant(graph: Surgery):
        def altered(weight):
            at = np.abs(weight).argmax()
            weight.ravel()[at] = change(weight.ravel()[at])
            return weight

        graph.change(product(graph, "2.mlp.fc1"), 1, altered)

    return plant


def bit_flipped(bit: int):
    """Flips one bit of one weight."""
    return largest_weight(lambda number: (np.float32(number).view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32))


def one_percent_more(graph: Surgery):
    largest_weight(lambda number: number * np.float32(1.01))(graph)


def of_another_checkpoint(graph: Surgery):
    draw = np.random.default_rng(1)
    graph.change(product(graph, "1.mlp.fc1"), 1, lambda w: draw.standard_normal(w.shape, np.float32) / 7)


def of_an_earlier_epoch(graph: Surgery):
    """Everything behind block 0 is a thousandth off."""
    draw = np.random.default_rng(1)
    for block in (1, 2, 3):
        for part in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"):
            graph.change(
                product(graph, f"{block}.{part}"), 1,
                lambda w: w * (1 + 1e-3 * draw.standard_normal(w.shape, np.float32)),
            )  # fmt: skip


def transposed(graph: Surgery):
    graph.change(product(graph, "1.attn.proj"), 1, lambda weight: weight.T)


def rounded_to_bfloat16(graph: Surgery):
    """Weights of one product were stored in bfloat16."""

    def bfloat16(weight):
        bits = weight.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)

    graph.change(product(graph, "2.mlp.fc2"), 1, bfloat16)


# quantized


def weight_pair(graph: Surgery, name: str):
    """DequantizeLinear of a weight: codes, scales, zeros."""
    return graph.maker(product(graph, name).input[1])


def input_pair(graph: Surgery, name: str):
    """The two nodes before a product's input."""
    dequantize = graph.maker(product(graph, name).input[0])
    return graph.maker(dequantize.input[0]), dequantize


def scales_permuted(graph: Surgery):
    graph.change(weight_pair(graph, "1.mlp.fc1"), 1, lambda scales: np.roll(scales, 1))


def zero_off_by_one(graph: Surgery):
    graph.change(input_pair(graph, "1.mlp.fc1")[1], 2, lambda zero: zero + np.uint8(1))


def zero_of_signed(graph: Surgery):
    """Unsigned codes are read as if 0 stood for zero."""
    graph.change(input_pair(graph, "2.mlp.fc2")[1], 2, np.zeros_like)


def scale_of_another_product(graph: Surgery):
    other = input_pair(graph, "1.mlp.fc1")[0].input[1]
    for node in input_pair(graph, "1.mlp.fc2"):
        node.input[1] = other


def scale_of_another_input(graph: Surgery):
    """What was quantized with one scale is read with another."""
    input_pair(graph, "2.attn.proj")[1].input[1] = input_pair(graph, "1.attn.proj")[1].input[1]


def seven_bits(graph: Surgery):
    graph.change(weight_pair(graph, "1.mlp.fc1"), 0, lambda codes: codes.clip(-64, 63))


def one_code_off(graph: Surgery):
    def off(codes):
        codes.ravel()[np.abs(codes).argmin()] += 1
        return codes

    graph.change(weight_pair(graph, "2.mlp.fc1"), 0, off)


def codes_one_low(graph: Surgery):
    """Codes were rounded down instead of to the nearest: every other one is one too low."""
    draw = np.random.default_rng(0)
    graph.change(
        weight_pair(graph, "2.mlp.fc1"), 0,
        lambda codes: np.where(draw.random(codes.shape) < 0.5, np.maximum(codes, -126) - 1, codes).astype(np.int8),
    )  # fmt: skip


def attention_scale_forgotten(graph: Surgery):
    graph.change(weight_pair(graph, "1.attn.q"), 1, lambda scales: scales * 4)


def quantized_bias_scaled(graph: Surgery):
    """A bias is kept in units of a scale and multiplied by it once more."""
    node = graph.named("blocks.1.mlp.fc1.Add")
    graph.change(node, 1, lambda bias: bias * 0.01)
