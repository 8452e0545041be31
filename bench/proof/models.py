"""Random models: an architecture of a timm family in miniature, random weights, and what becomes of its tokens.

Everything follows from the seed and the model's number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import nn

from tocom.compensator import GROUPS, Compensator, CompensatorInfo
from tocom.schedule import MergeSchedule, ScheduleFamily
from tocom.vit import schedule_for

ENGINES = (
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("onnxruntime", "fp16"),
    ("openvino", "bf16"),
    ("onnxruntime", "int8"),
    ("openvino", "int8"),
)
CLASSES = (2, 10, 37, 100)
_GATED_RATIO = 2.66667 * 2  # hidden channels of timm's SwiGLU networks to their width


@dataclass(frozen=True)
class Kind:
    """One kind of architecture."""

    name: str  # timm's name of a network that is built so
    class_token: bool = True  # whether it has one, which pruning needs
    arguments: Mapping[str, Any] = field(default_factory=dict)  # more of timm's arguments, always
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # arguments of which each is drawn from some


_PLAIN = {
    "init_values": (None, 0.1),
    "qk_norm": (False, True),
    "scale_attn_norm": (False, False, True),
    "scale_mlp_norm": (False, False, True),
    "qkv_bias": (True, True, False),
    "global_pool": ("token", "token", "avg", "avgmax"),
    "pool_include_prefix": (False, True),
    "reg_tokens": (0, 0, 1, 4),
}
KINDS: Mapping[str, Kind] = {
    "deit": Kind("deit_tiny_patch16_224"),
    "distilled": Kind("deit_tiny_distilled_patch16_224"),
    "deit3": Kind("deit3_small_patch16_224"),
    "augreg": Kind("vit_base_patch16_224", choices={"dynamic_img_size": (False, True)}),
    "plain": Kind("vit_tiny_patch16_224", choices=_PLAIN),
    "gated": Kind("vit_tiny_patch16_224"),
    "clip": Kind("vit_base_patch16_clip_224"),
    "dinov2": Kind("vit_small_patch14_reg4_dinov2", choices={"reg_tokens": (0, 1, 4)}),
    "swiglu": Kind("vit_giant_patch14_reg4_dinov2"),
    "gap": Kind("vit_base_patch16_siglip_gap_224", class_token=False),
    "map": Kind("vit_base_patch16_siglip_224", class_token=False),
    "reg1_gap": Kind("vit_little_patch16_reg1_gap_256", class_token=False),
    "reg4_gap": Kind("vit_so150m_patch16_reg4_gap_256", class_token=False),
    "max": Kind("vit_tiny_patch16_224", class_token=False, arguments={"global_pool": "max", "class_token": False}),
}


@dataclass(frozen=True)
class Drawn:
    """One random model and what is made of it; JSON-ready."""

    number: int  # which of the campaign
    seed: int  # of weights and images
    kind: str  # Of `KINDS`
    arguments: Mapping[str, Any]  # for timm
    gain: float  # factor on every matrix
    degree: int  # target degree
    schedule: str  # name of the schedule family
    reduction: str  # name of the reduction
    delta_scale: float | None  # weight of a random compensator; None for none
    backend: str  # engine library
    precision: str  # number format

    @property
    def engine(self) -> str:
        """Library and number format, for people."""
        return f"{self.backend} {self.precision}"

    def schedule_of(self, model: nn.Module) -> MergeSchedule:
        """How many tokens every block removes."""
        return schedule_for(model, self.degree, ScheduleFamily(self.schedule))


def draw(number: int, seed: int) -> Drawn:
    """The model of a number; engines take turns, so that there are equally many of each."""
    chance = random.Random(f"{seed}-{number}")
    name = chance.choice(tuple(KINDS))
    kind = KINDS[name]
    patch = chance.choice((4, 7, 8, 14, 16))
    heads, head_width = chance.randint(1, 6), chance.choice((8, 16, 24, 32))
    depth = chance.randint(1, 6)
    if name == "swiglu" and int(heads * head_width * _GATED_RATIO) % 2:
        head_width = 24  # timm takes an even number of hidden channels only
    arguments = {
        "img_size": tuple(patch * chance.randint(3, 11) for _ in range(2)),
        "patch_size": patch,
        "embed_dim": heads * head_width,
        "num_heads": heads,
        "depth": depth,
        "num_classes": chance.choice(CLASSES),
        **kind.arguments,
        **{argument: chance.choice(options) for argument, options in kind.choices.items()},
    }
    backend, precision = ENGINES[number % len(ENGINES)]
    return Drawn(
        number=number, seed=chance.randrange(1 << 31), kind=name, arguments=arguments,
        gain=2.0 ** chance.uniform(-1, 1), degree=chance.randint(0, GROUPS), schedule=_schedule(chance, depth),
        reduction="prune" if kind.class_token and chance.random() < 0.3 else "merge",
        delta_scale=chance.choice((0.05, 0.1, 0.2)) if chance.random() < 0.4 else None,
        backend=backend, precision=precision,
    )  # fmt: skip


def _schedule(chance: random.Random, depth: int) -> str:
    choices: list[Callable[[], str]] = [lambda: "constant", lambda: "constant", lambda: "decreasing"]
    if depth > 1:
        choices.append(lambda: f"strided:{chance.randint(2, depth)}")
    choices.append(lambda: ",".join(["1", *(f"{chance.choice((0, 0.5, 1, 2))}" for _ in range(depth - 1))]))
    return chance.choice(choices)()


def model_of(drawn: Drawn) -> nn.Module:
    """The timm model, frozen, with random weights in every part: one left at its start would hide that it is lost."""
    arguments = {**drawn.arguments, "img_size": tuple(drawn.arguments["img_size"])}
    model = timm.create_model(KINDS[drawn.kind].name, **arguments)
    if drawn.kind == "gated":
        for block in model.blocks:
            block.attn = Attention(model.embed_dim, num_heads=arguments["num_heads"], qkv_bias=True, gated=True)
    generator = torch.Generator().manual_seed(drawn.seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        last = name.rsplit(".", maxsplit=1)[-1]
        if last == "weight" and parameter.ndim > 1:
            noise = drawn.gain * noise / math.sqrt(parameter[0].numel())
        elif last == "weight":  # of a norm
            noise = 1 + 0.3 * noise
        elif last == "gamma":
            noise = 0.6 + 0.2 * noise
        else:  # biases, tokens, positions
            noise = 0.4 * noise
        parameter.data.copy_(noise)
    return model.eval().requires_grad_(False)


def compensator_of(drawn: Drawn, model: nn.Module) -> Compensator:
    """A compensator with random weights, both sides of every pair."""
    info = CompensatorInfo(width=model.embed_dim, depth=len(model.blocks))
    compensator = Compensator(info)
    generator = torch.Generator().manual_seed(drawn.seed + 1)
    for weight in compensator.parameters():
        weight.data.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return compensator.eval().requires_grad_(False)
