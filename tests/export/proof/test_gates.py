"""The gates: what the documentation says of them, and that a network's conditioning is measured, not guessed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tocom.export.proof.gates import GATES
from tocom.export.proof.parts import logit_distance
from tocom.export.proof.reference import in_format, replay
from tocom.export.source.images import default_images
from tocom.vit import ReducedViT

DOCUMENTED = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8, rest fp32",
    "int8+half": "int8, rest half",
    "fp8": "fp8",
    "int8-weights": "int8-weights, int4-weights",
    "int4-weights": "int8-weights, int4-weights",
}


@pytest.mark.parametrize("precision", DOCUMENTED)
def test_the_documented_gates_are_those_in_use(precision: str) -> None:
    gates = GATES[precision]
    unit = f"2^{int(math.log2(gates.unit_roundoff))}"
    numbers = [gates.part, gates.middle, gates.merge, gates.prune, gates.typical, gates.largest]
    row = " | ".join(["", DOCUMENTED[precision], unit, *(f"{number:g}" for number in numbers), ""]).strip()
    document = Path(__file__).resolve().parents[3] / "docs" / "proof.md"
    assert row in document.read_text()


def test_unit_roundoffs_are_those_of_the_formats() -> None:
    for precision, dtype in {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
                             "fp16": torch.float16}.items():  # fmt: skip
        assert GATES[precision].unit_roundoff == torch.finfo(dtype).eps / 2


def test_shaking_does_what_roundings_of_that_size_do(make_vit) -> None:
    """Beside the network in float32, which rounds inside its parts as well, and with float64 nothing moves."""
    exact = in_format(ReducedViT(make_vit("deit_tiny"), 8), "fp64")
    plain = in_format(exact, "fp32")
    for pixel_values in default_images((3, 64, 64)):
        images = torch.from_numpy(pixel_values)
        still = replay(exact, images, {})
        shaken = replay(exact, images, still.natural, 2**-24)
        moved = logit_distance(shaken.logits, still.logits).median()
        rounded = logit_distance(replay(plain, images, still.natural).logits.double(), still.logits).median()
        assert 0.1 < rounded / moved < 30
        assert torch.equal(replay(exact, images, still.natural, 2**-24).logits, shaken.logits)
        assert logit_distance(replay(exact, images, still.natural).logits, still.logits).max() == 0


def test_saturated_attention_amplifies_roundings_and_shaking_says_so(make_vit) -> None:
    def moved(gain: float) -> float:
        model = make_vit("deit_tiny")
        for block in model.blocks:
            block.attn.qkv.weight.data *= gain
        exact = in_format(ReducedViT(model, 4), "fp64")
        images = torch.from_numpy(list(default_images((3, 64, 64)))[1])
        still = replay(exact, images, {})
        return float(logit_distance(replay(exact, images, still.natural, 2**-24).logits, still.logits).median())

    assert moved(4.0) > 3 * moved(1.0)
