"""Moving range from a product's input into its weight, without changing what the network computes.

A product's input x becomes (x - shift) / factor, channel by channel. Where x comes out of a layer norm, that goes into
its affine; where it is attention's mixture of values, into the values' rows of `attn.qkv`, since the mixture's shares
sum to one. The product's weight and bias take it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Migration:
    """The change of one product's input.

    Attributes:
        factor: What every channel is divided by, [in], positive.
        shift: What is taken from every channel before, [in]; None for nothing.
    """

    factor: Tensor
    shift: Tensor | None = None


def source_of(model: nn.Module, product: str) -> str | None:
    """What takes the change of a product's input: the name of a layer norm or of `attn.qkv`; None for nothing.

    Behind an activation function nothing can be taken, but by a norm that stands there.
    """
    block_name, _, inner = product.rpartition(".attn.") if ".attn." in product else product.rpartition(".mlp.")
    block = model.get_submodule(block_name)
    attn, mlp = block.attn, block.mlp
    candidates: dict[str, tuple[str, nn.Module]] = {
        "qkv": ("norm1", block.norm1),
        "gate": ("norm1", block.norm1),
        "fc1": ("norm2", block.norm2),
        "fc1_g": ("norm2", block.norm2),
        "fc1_x": ("norm2", block.norm2),
        "proj": ("attn.norm", attn.norm),
        "fc2": ("mlp.norm", mlp.norm),
    }
    name, norm = candidates.get(inner, ("", None))
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return f"{block_name}.{name}"
    plain_values = inner == "proj" and isinstance(attn.norm, nn.Identity) and attn.gate is None
    return f"{block_name}.attn.qkv" if plain_values else None


@torch.no_grad()
def migrate(model: nn.Module, migrations: Mapping[str, Migration]) -> None:
    """Changes a float model in place; its outputs stay the same but for rounding.

    Args:
        model: A timm VisionTransformer.
        migrations: Product -> its change. Products that read the same layer norm must be changed alike, all of them.

    Raises:
        ValueError: If nothing takes the change of a product's input, or one of the two has no bias to shift.
    """
    moved: set[str] = set()
    for name, migration in migrations.items():
        source_name = source_of(model, name)
        if source_name is None:
            raise ValueError(f"nothing takes the change of {name}'s input")
        biases = (model.get_submodule(name).bias, model.get_submodule(source_name).bias)
        if migration.shift is not None and None in biases:
            raise ValueError(f"{name} or {source_name} has no bias to shift")
        _take_back(model.get_submodule(name), migration)
        if source_name not in moved:
            _change(model, source_name, migration)
        if not source_name.endswith("qkv"):
            moved.add(source_name)


def _take_back(product: nn.Linear, migration: Migration) -> None:
    if migration.shift is not None:
        product.bias.add_(product.weight @ migration.shift)
    product.weight.mul_(migration.factor)


def _change(model: nn.Module, name: str, migration: Migration) -> None:
    source = model.get_submodule(name)
    values = slice(2 * source.out_features // 3, None) if isinstance(source, nn.Linear) else slice(None)
    if migration.shift is not None:
        source.bias[values] -= migration.shift
    if source.bias is not None:
        source.bias[values] /= migration.factor
    factor = migration.factor[:, None] if isinstance(source, nn.Linear) else migration.factor
    source.weight[values] /= factor
