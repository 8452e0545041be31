"""Moving range from a product's input into its weight, without changing what the network computes.

A product's input x becomes (x - shift) / factor, channel by channel, and the product's weight and bias take it back.
The change of x goes into what makes it, its origin: the affine of a layer norm; the values' rows of `attn.qkv`, since
the shares in which attention mixes values sum to one; the half of a gated MLP's first product that is not the gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from tocom.calib.quantize.network import products_of


@dataclass(frozen=True)
class Migration:
    """The change of one product's input.

    Attributes:
        factor: What every channel is divided by, [in], positive.
        shift: What is taken from every channel before, [in]; None for nothing.
    """

    factor: Tensor
    shift: Tensor | None = None

    def equals(self, other: Migration | None) -> bool:
        """Whether both change an input alike."""
        if other is None or not torch.equal(self.factor, other.factor):
            return False
        if self.shift is None or other.shift is None:
            return self.shift is other.shift
        return torch.equal(self.shift, other.shift)


def origin_of(model: nn.Module, product: str) -> str | None:
    """What takes the change of a product's input: the name of a layer norm or of a product; None for nothing.

    Behind an activation function nothing can be taken, but by a norm that stands there, or by the factor that the
    activated gate is multiplied with.
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
    if not isinstance(norm, nn.Identity):
        return None
    if inner == "proj":
        return f"{block_name}.attn.qkv"
    if inner == "fc2" and isinstance(mlp, GluMlp | SwiGLU):
        return f"{block_name}.mlp.{'fc1' if isinstance(mlp, GluMlp) else 'fc1_x'}"
    return None


def readers_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Source -> the products that read what it makes, which are to be changed alike; sources that there are."""
    readers: dict[str, tuple[str, ...]] = {}
    for product in products_of(model):
        origin = origin_of(model, product)
        if origin is not None:
            readers[origin] = (*readers.get(origin, ()), product)
    return readers


def takes_shift(model: nn.Module, product: str) -> bool:
    """Whether a product's input can be shifted: it and its origin have a bias, and no gate stands between them."""
    origin = origin_of(model, product)
    if origin is None or None in (model.get_submodule(product).bias, model.get_submodule(origin).bias):
        return False
    if product.endswith(".fc2"):
        return isinstance(model.get_submodule(origin), nn.LayerNorm)
    return not product.endswith(".proj") or model.get_submodule(product.rpartition(".")[0]).gate is None


@torch.no_grad()
def migrate(model: nn.Module, migrations: Mapping[str, Migration]) -> None:
    """Changes a float model in place; its outputs stay the same but for rounding.

    Args:
        model: A timm VisionTransformer.
        migrations: Product -> its change. Products that read the same origin must be changed alike, all of them.

    Raises:
        ValueError: If `require_possible` raises it; the model is then unchanged.
    """
    for origin, products in require_possible(model, migrations).items():
        for name in products:
            _take_back(model.get_submodule(name), migrations[name])
        _change(model, origin, migrations[products[0]])


def require_possible(model: nn.Module, migrations: Mapping[str, Migration]) -> dict[str, tuple[str, ...]]:
    """Checks that a model can be changed so.

    Returns:
        Source that is changed -> the products that read it.

    Raises:
        ValueError: If nothing takes the change of a product's input, products of one origin are changed differently,
            or a shift has no bias to go into.
    """
    readers = {origin: names for origin, names in readers_of(model).items() if not migrations.keys().isdisjoint(names)}
    for name in migrations.keys() - {name for names in readers.values() for name in names}:
        raise ValueError(f"nothing takes the change of {name}'s input")
    for origin, products in readers.items():
        first = next(migrations[name] for name in products if name in migrations)
        if not all(first.equals(migrations.get(name)) for name in products):
            raise ValueError(f"{', '.join(products)} read {origin} and must be changed alike, all of them")
        for name in products:
            if migrations[name].shift is not None and not takes_shift(model, name):
                raise ValueError(f"between {origin} and {name} nothing can be shifted: no bias, or a gate")
    return readers


def _take_back(product: nn.Linear, migration: Migration) -> None:
    if migration.shift is not None:
        product.bias.add_(product.weight @ migration.shift.to(product.weight))
    product.weight.mul_(migration.factor)


def _change(model: nn.Module, name: str, migration: Migration) -> None:
    origin, rows = model.get_submodule(name), _rows_of(model, name)
    if origin.bias is not None:
        if migration.shift is not None:
            origin.bias[rows] -= migration.shift
        origin.bias[rows] /= migration.factor
    origin.weight[rows] /= migration.factor[:, None] if isinstance(origin, nn.Linear) else migration.factor


def _rows_of(model: nn.Module, name: str) -> slice:
    """The rows of an origin that take the change."""
    origin, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if name.endswith(".attn.qkv"):
        return slice(2 * origin.out_features // 3, None)
    if isinstance(owner, GluMlp) and isinstance(origin, nn.Linear):
        half = origin.out_features // 2
        return slice(half) if owner.gate_last else slice(half, None)
    return slice(None)
