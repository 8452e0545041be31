"""How much each product's quantization alone changes what a network says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tocom.calib.quantize.network import Quantization, quantized_model
from tocom.reduction import MERGE, Reduction
from tocom.schedule import MergeSchedule
from tocom.vit import ReducedViT

_BATCH = 16


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    schedule: MergeSchedule,
    quantization: Quantization,
    pixels: Tensor,
    reduction: Reduction = MERGE,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """KL divergence of the float network's class probabilities from those with one product quantized.

    Args:
        model: The timm model; its own weights are not looked at, but the quantization's.
        schedule: Tokens removed per block.
        quantization: Of the degree.
        pixels: Normalized images, float32 [B, 3, H, W].
        reduction: How tokens are removed.
        tell: (products done, products).

    Returns:
        Product -> divergence in nats, mean over the images; the worst product first.
    """
    names = list(quantization.weights)

    def log_probabilities(kept: Quantization) -> Tensor:
        network = ReducedViT(quantized_model(model, kept), schedule, reduction=reduction)
        parts = [network(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]
        return torch.cat(parts).log_softmax(dim=1)

    expected = log_probabilities(quantization.without(names))
    losses = {}
    for done, name in enumerate(names):
        alone = log_probabilities(quantization.without([other for other in names if other != name]))
        losses[name] = float(functional.kl_div(alone, expected, reduction="batchmean", log_target=True))
        if tell is not None:
            tell(done + 1, len(names))
    return dict(sorted(losses.items(), key=lambda item: -item[1]))
