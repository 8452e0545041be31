"""Factors that make a product's input easier to quantize at the expense of its weight, or of nothing.

Both functions compute; `migrations.migrate` applies, and `Observation.changed` tells what would have been seen then.
Where the origin is a product (the values' rows of `attn.qkv` ahead of `attn.proj`), its rows are divided and their
scales with them, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tocom.calib.quantize.grids import Format, scale_for
from tocom.calib.quantize.migrations import Migration, readers_of
from tocom.calib.quantize.network import Observation, round_to_nearest
from tocom.calib.quantize.ranges import scale_of

Candidates = Callable[[Tensor, Observation], Iterator[Tensor]]
"""(weight [out, in], what was seen going into it) -> factors to try, [in] each."""

ALPHAS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)

_ROWS = 1024  # that the error is measured on
_LEAST = 1e-4  # of the largest channel: smaller ones count as this, so that float16 holds what factors leave
_ENDS = 6  # ranges that are tried
_WIDEST = 2.0**10
_JUST_BELOW = 1 - 2.0**-20  # keeps float32's rounding of a widened number from exceeding its row's largest


@torch.no_grad()
def smooth(
    model: nn.Module, seen: Mapping[str, Observation], format: Format, range_method: str = "minmax"
) -> dict[str, Migration]:
    """SmoothQuant's migration (Xiao et al. 2023, equation 4), with an alpha for every origin.

    factor_j = max|x_j|^alpha / max|W_j|^(1 - alpha), W being the weights of all products that read x, and of all
    factors their geometric mean taken out. Of `ALPHAS` and no change at all, the one with the least squared error of
    the quantized product is taken.

    Args:
        model: A timm VisionTransformer, float.
        seen: Product -> what was seen going into it.
        format: The format of both factors; where the input stays float, only the weight's rounding counts.
        range_method: How the input's range is chosen, one of `method.RANGES`.

    Returns:
        Product -> its change. One that is better left as it is is not among them.
    """

    def candidates(weight: Tensor, observed: Observation) -> Iterator[Tensor]:
        largest = _kept_from_zero(observed.largest), _kept_from_zero(weight.abs().amax(dim=0))
        for alpha in ALPHAS:
            logs = alpha * largest[0].log() - (1 - alpha) * largest[1].log()
            yield (logs - logs.mean()).exp()

    return _chosen(model, seen, candidates, format, range_method)


@torch.no_grad()
def widen(
    model: nn.Module, seen: Mapping[str, Observation], format: Format, range_method: str = "minmax"
) -> dict[str, Migration]:
    """Weight dilation (Liu et al. 2024, DilateQuant): widens channels of the weight that determine no row's range.

    A channel in which no row of the weight has its largest number is unsaturated: it can grow, and its input shrink,
    by factor_j <= min over rows o of max|W_o| / |W_oj|, and every scale of the weight stays what it was. The paper goes
    to the limit everywhere, which rounds inputs the more coarsely the further they shrink. Here, for each of several
    ranges that the limits allow the input to shrink to, a channel is widened as far as that range needs it, and
    further where the noise of both factors together is least:
    factor_j^4 = (sum of squared steps of the rows * mean x_j^2) / (squared step of the input * sum of W_j^2).
    Of these and no change, the one with the least squared error of the quantized product is taken.

    Args:
        model: A timm VisionTransformer, float.
        seen: Product -> what was seen going into it.
        format: The format of both factors; where the input stays float, channels are widened to their limits.
        range_method: How the input's range is chosen, one of `method.RANGES`.

    Returns:
        Product -> its change. One that is better left as it is is not among them.
    """

    def candidates(weight: Tensor, observed: Observation) -> Iterator[Tensor]:
        limit = widening_limit(weight)
        if format.activation is None:
            yield limit
            return
        rows = scale_for(weight.abs().amax(dim=1), format.weight)
        noise = rows.square().sum() * observed.rows.square().mean(dim=0) / weight.square().sum(dim=0)
        largest = _kept_from_zero(observed.largest)
        for end in _between((largest / limit).max(), largest.max()):
            balanced = (noise / (end / format.activation.largest).square()).pow(0.25)
            yield torch.minimum(torch.maximum(balanced.nan_to_num(1.0), largest / end).clamp_min(1), limit)

    return _chosen(model, seen, candidates, format, range_method)


def widening_limit(weight: Tensor) -> Tensor:
    """How far each channel of a weight [out, in] can be widened without raising any row's largest number, [in]."""
    magnitude = weight.abs()
    room = (magnitude.amax(dim=1, keepdim=True) / magnitude).nan_to_num(torch.inf, posinf=torch.inf)
    limit = room.amin(dim=0).clamp_max(_WIDEST)
    return torch.where(limit > 1, limit * _JUST_BELOW, 1.0).clamp_min(1)


def product_error(
    weight: Tensor, observed: Observation, factor: Tensor, format: Format, range_method: str = "minmax"
) -> float:
    """Mean squared error of a quantized product's output, its input divided by a factor and its weight multiplied.

    Args:
        weight: [out, in].
        observed: What was seen going into it; the error is measured on up to 1,024 of its rows.
        factor: [in].
        format: The format.
        range_method: How the input's range is chosen.
    """
    changed = observed.changed(factor)
    every = -(-len(observed.rows) // _ROWS)
    x = changed.rows[::every]
    if format.activation is not None:
        scale = scale_of(changed, format.activation, range_method)
        x = format.activation.nearest(x / scale) * scale
    values = round_to_nearest(weight * factor, format.weight).values
    return float((x @ values.T - observed.rows[::every] @ weight.T).square().mean())


def _chosen(
    model: nn.Module, seen: Mapping[str, Observation], candidates: Candidates, format: Format, range_method: str
) -> dict[str, Migration]:
    """For every origin the factor of the least error, and nothing where that is no change."""
    migrations: dict[str, Migration] = {}
    for products in readers_of(model).values():
        weight = torch.cat([model.get_submodule(name).weight for name in products])
        observed = seen[products[0]]
        best, least = None, product_error(weight, observed, torch.ones_like(observed.low), format, range_method)
        for factor in candidates(weight, observed):
            error = product_error(weight, observed, factor, format, range_method)
            if error < least:
                best, least = factor, error
        if best is not None:
            migrations |= dict.fromkeys(products, Migration(best))
    return migrations


def _kept_from_zero(largest: Tensor) -> Tensor:
    return largest.clamp_min(max(_LEAST * float(largest.max()), torch.finfo(largest.dtype).tiny))


def _between(low: Tensor, high: Tensor) -> list[Tensor]:
    """Geometrically spaced, both ends included."""
    return [low * (high / low) ** (step / (_ENDS - 1)) for step in range(_ENDS)]
