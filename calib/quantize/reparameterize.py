"""Ranges of single channels behind a layer norm, turned into one range for all of them.

A norm's output has channels whose ranges differ by an order of magnitude and lie off zero, so that one symmetric scale
serves none of them. A scale and a zero point for every channel would; here they go into the norm's affine and the next
weight and bias, and one symmetric scale is left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tocom.calib.quantize.migrations import Migration, readers_of, takes_shift
from tocom.calib.quantize.network import Observation

CLIPPED = 0.001  # share of a channel's numbers that are left out at either end

_LEAST = 2.0**-6  # of the mean range: what hardly moved in calibration would leave a narrower one at the next image


@torch.no_grad()
def reparameterize(model: nn.Module, seen: Mapping[str, Observation], clip: bool = True) -> dict[str, Migration]:
    """Scale reparameterization for layer norms (Li et al. 2023, RepQ-ViT; Li et al. 2024, RepQuant).

    shift_j is the middle of a channel's range and factor_j its width, over the mean width. Where product or norm has no
    bias, or a gate stands between them, nothing is shifted and factor_j is the channel's largest magnitude, over their
    mean. Computes; `migrations.migrate` applies.

    Args:
        model: A timm VisionTransformer, float.
        seen: Product -> what was seen going into it.
        clip: Whether the outermost numbers of each channel are left out of its range, at either end by itself (the
            dual clipping of RepQuant, by percentiles instead of learned bounds). Meant for a range of the whole input
            that is chosen by a method which clips too: with `minmax` those numbers determine the scale.

    Returns:
        Product -> its change, for all products that read a layer norm with an affine.
    """
    migrations: dict[str, Migration] = {}
    for origin, products in readers_of(model).items():
        if not isinstance(model.get_submodule(origin), nn.LayerNorm):
            continue
        low, high = _ends(seen[products[0]], CLIPPED if clip else 0.0)
        shift = (low + high) / 2 if all(takes_shift(model, name) for name in products) else None
        width = torch.maximum(low.abs(), high.abs()) if shift is None else (high - low) / 2
        mean = width.mean()
        factor = (width / mean).clamp_min(_LEAST) if mean > 0 else torch.ones_like(width)
        migrations |= dict.fromkeys(products, Migration(factor, shift))
    return migrations


def _ends(seen: Observation, clipped: float) -> tuple[Tensor, Tensor]:
    """Both ends of each channel's range [C], the outermost numbers left out; all are in it where rows are few."""
    beyond = int(len(seen.rows) * clipped)
    if beyond == 0:
        return seen.low, seen.high
    return tuple(seen.rows.kthvalue(k, dim=0).values for k in (beyond + 1, len(seen.rows) - beyond))
