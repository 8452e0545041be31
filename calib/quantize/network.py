"""A network whose products compute in a narrow format, carried out in PyTorch: the reference of quantized engines.

Quantized are the products of the blocks: `attn.qkv`, `attn.proj` and those of the MLP. What lies between them (layer
norm, attention, what tokens are matched on, token sizes, the residual stream) stays float, as do the patch embedding
and the head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from tocom.calib.quantize.grids import Format, Grid, scale_for

_KEPT = 1 << 22  # numbers that are kept of what goes into a product


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in a narrow format.

    Attributes:
        codes: Numbers of the grid, float32 [out, in].
        scale: Of each output channel, float32 [out].
    """

    codes: Tensor
    scale: Tensor

    @property
    def values(self) -> Tensor:
        """What it stands for, [out, in]."""
        return self.codes * self.scale[:, None]


@dataclass(frozen=True)
class Quantization:
    """How one network computes in a narrow format.

    Attributes:
        format: The format.
        state: The float network, by the plain model's names: the checkpoint, or one that computes the same and is
            easier to quantize.
        activations: Product -> scale of its input; only for formats that have one.
        weights: Product -> its weight. A product that is not here stays float.
    """

    format: Format
    state: Mapping[str, Tensor]
    activations: Mapping[str, float]
    weights: Mapping[str, QuantizedWeight]

    def without(self, products: Sequence[str]) -> Quantization:
        """The same with some products left in float."""
        kept = {name: weight for name, weight in self.weights.items() if name not in products}
        scales = {name: scale for name, scale in self.activations.items() if name not in products}
        return Quantization(self.format, self.state, scales, kept)

    def dequantized(self) -> dict[str, Tensor]:
        """The float network with every quantized weight replaced by what it stands for."""
        return {**self.state, **{f"{name}.weight": weight.values for name, weight in self.weights.items()}}


class QuantizedLinear(nn.Module):
    """A product in a narrow format: both factors rounded to their grids, multiplied in float.

    Args:
        weight: [out, in].
        bias: [out] or None, float.
        activation: Grid of the input; None for float.
        scale: Of the input.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, activation: Grid | None, scale: float) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.activation is not None:
            x = self.activation.nearest(x / self.scale) * self.scale
        return functional.linear(x, self.codes * self.weight_scale[:, None], self.bias)


def products_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> product that may be quantized, in the order in which the blocks come."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def quantized_model(model: nn.Module, quantization: Quantization) -> nn.Module:
    """A copy of a timm model that computes as a quantized engine does."""
    model = copy.deepcopy(model)
    model.load_state_dict(dict(quantization.state))
    for name, weight in quantization.weights.items():
        parent, _, attribute = name.rpartition(".")
        bias = model.get_submodule(name).bias
        scale = quantization.activations.get(name, 1.0)
        product = QuantizedLinear(
            weight, None if bias is None else bias.detach(), quantization.format.activation, scale
        )
        setattr(model.get_submodule(parent), attribute, product)
    return model.eval().requires_grad_(False)


def round_to_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Every number of a weight [out, in] to the nearest of its channel's grid."""
    scale = scale_for(weight.abs().amax(dim=1), grid)
    return QuantizedWeight(grid.nearest(weight / scale[:, None]), scale)


@dataclass
class Observation:
    """What was seen going into one product.

    Attributes:
        rows: Single tokens, chosen at random, float32 [rows, C].
        low: Smallest number of each channel, over all tokens, [C].
        high: Largest, likewise.
    """

    rows: Tensor
    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel, [C]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def changed(self, factor: Tensor, shift: Tensor | None = None) -> Observation:
        """What would have been seen had every input been (x - shift) / factor, [C] each."""
        shift = torch.zeros_like(factor) if shift is None else shift
        ends = torch.stack([(end - shift) / factor for end in (self.low, self.high)])
        return Observation((self.rows - shift) / factor, ends.amin(dim=0), ends.amax(dim=0))


@dataclass
class _Collector:
    rows: list[Tensor] = field(default_factory=list)
    low: Tensor | None = None
    high: Tensor | None = None


@torch.no_grad()
def observe(
    networks: Sequence[nn.Module],
    products: Callable[[nn.Module], Mapping[str, nn.Module]],
    pixels: Tensor,
    rows_per_image: int = 32,
    batch: int = 16,
    seed: int = 0,
) -> dict[str, Observation]:
    """Runs networks and looks at what goes into their products.

    Args:
        networks: References (`tocom.vit.ReducedViT`), of one degree or several, that have the same products.
        products: Network -> its products by name.
        pixels: Normalized images, float32 [B, 3, H, W].
        rows_per_image: Tokens that are kept of every image, for every product; fewer where they would take too much
            memory.
        batch: Images at a time.
        seed: Chooses the tokens.

    Returns:
        Product -> what was seen, over all networks.
    """
    draw = torch.Generator().manual_seed(seed)
    collectors: dict[str, _Collector] = {}

    looks = len(networks) * -(-len(pixels) // batch)

    def look(name: str, x: Tensor) -> None:
        collector = collectors.setdefault(name, _Collector())
        tokens = x.reshape(-1, x.shape[-1])
        low, high = tokens.amin(dim=0), tokens.amax(dim=0)
        collector.low = low if collector.low is None else torch.minimum(collector.low, low)
        collector.high = high if collector.high is None else torch.maximum(collector.high, high)
        kept = min(rows_per_image * len(x), len(tokens), max(1, _KEPT // (looks * x.shape[-1])))
        collector.rows.append(tokens[torch.randperm(len(tokens), generator=draw)[:kept].to(x.device)].clone())

    for network in networks:
        with looking(products(network), look):
            for start in range(0, len(pixels), batch):
                network(pixels[start : start + batch])
    return {name: Observation(torch.cat(seen.rows), seen.low, seen.high) for name, seen in collectors.items()}


@contextmanager
def looking(products: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `look(name, input)` whenever a product is called."""
    hooks = [
        product.register_forward_pre_hook(lambda _module, inputs, name=name: look(name, inputs[0]))
        for name, product in products.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
