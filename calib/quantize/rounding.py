"""Rounding a weight so that the product's output changes least, not the weight itself.

With X the rows that go into a product, the error of channel w is |X (w - q)|^2 = (w - q) H (w - q) with H = X^T X: it
needs second-order knowledge of the input only, and channels are apart from each other. Where inputs are quantized too,
pass rows as quantized as the engine's are: q then also makes the best of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tocom.calib.quantize.grids import Grid, scale_for
from tocom.calib.quantize.network import QuantizedWeight, round_to_nearest

_BLOCK = 128  # columns whose effect on later ones is applied at once
_SHARES = [1 - 0.0125 * step for step in range(41)]  # ends of range that are tried, down to half


@torch.no_grad()
def gptq(
    weight: Tensor,
    rows: Tensor,
    grid: Grid,
    damp: float = 0.01,
    scales: Literal["minmax", "squares"] = "minmax",
) -> QuantizedWeight:
    """Column by column, each rounding error made up for by the columns that are left (Frantar et al. 2023, GPTQ).

    Columns come in order of decreasing diagonal of H. A channel that plain rounding happens to serve better on these
    rows keeps it, so that no channel's error is larger than `round_to_nearest`'s.

    Args:
        weight: [out, in].
        rows: What goes into the product, [n, in]: float, or already quantized.
        grid: The weight's format.
        damp: Added to H's diagonal, as a share of the diagonal's mean.
        scales: `minmax` covers each channel's range; `squares` takes, for each channel, the range of which plain
            rounding has the least squared error, columns weighted with H's diagonal.
    """
    hessian = _hessian(rows, damp)
    order = hessian.diagonal().argsort(descending=True)
    scale = round_to_nearest(weight, grid).scale if scales == "minmax" else _least_squares(weight, hessian, grid)
    # row i of this factor: how columns i, i + 1, ... move for an error in column i, columns before being fixed
    factor = torch.linalg.cholesky(hessian[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    left = weight.double()[:, order]
    codes = torch.empty_like(left)
    for block in _blocks(len(order)):
        errors = torch.empty_like(left[:, block])
        for index, column in enumerate(range(block.start, block.stop)):
            codes[:, column] = grid.nearest(left[:, column] / scale)
            errors[:, index] = (left[:, column] - codes[:, column] * scale) / factor[column, column]
            left[:, column : block.stop] -= errors[:, index, None] * factor[column, column : block.stop]
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    rounded = QuantizedWeight(codes[:, order.argsort()].float(), scale)
    return _better(weight, rows, rounded, round_to_nearest(weight, grid))


@torch.no_grad()
def quantease(
    weight: Tensor,
    rows: Tensor,
    grid: Grid,
    sweeps: int = 10,
    damp: float = 0.01,
    start: QuantizedWeight | None = None,
) -> QuantizedWeight:
    """Cyclic coordinate descent (Behdin et al. 2023, QuantEase): each column to its best, others fixed.

    Args:
        weight: [out, in].
        rows: What goes into the product, [n, in]: float, or already quantized.
        grid: The weight's format.
        sweeps: How often all columns are gone through, at most; stops where nothing moves any more.
        damp: Added to H's diagonal, as a share of the diagonal's mean.
        start: Where to start, `gptq`'s for instance; None rounds to the nearest. Its scales are kept.

    Returns:
        A weight of which no channel's error on these rows is larger than the start's.
    """
    start = start or round_to_nearest(weight, grid)
    hessian = _hessian(rows, damp)
    scale, codes = start.scale.double(), start.codes.double()
    for _ in range(sweeps):
        before = codes.clone()
        slope = (codes * scale[:, None] - weight) @ hessian  # half the error's gradient
        for block in _blocks(len(hessian)):
            for column in range(block.start, block.stop):
                best = codes[:, column] - slope[:, column] / hessian[column, column] / scale
                moved = (grid.nearest(best) - codes[:, column]) * scale
                codes[:, column] = grid.nearest(best)
                slope[:, block] += moved[:, None] * hessian[column, block]
            moved = (codes[:, block] - before[:, block]) * scale[:, None]
            slope[:, block.stop :] += moved @ hessian[block, block.stop :]
        if torch.equal(codes, before):
            break
    return _better(weight, rows, QuantizedWeight(codes.float(), start.scale), start)


def channel_errors(weight: Tensor, rows: Tensor, rounded: QuantizedWeight) -> Tensor:
    """Squared error of every output channel, summed over rows [n, in], for a weight [out, in]: [out]."""
    return (rows @ (rounded.values - weight).T).square().sum(dim=0)


def _better(weight: Tensor, rows: Tensor, rounded: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """Of two roundings the better one, channel by channel; the other one of equals."""
    better = channel_errors(weight, rows, rounded) < channel_errors(weight, rows, other)
    codes = torch.where(better[:, None], rounded.codes, other.codes)
    return QuantizedWeight(codes, torch.where(better, rounded.scale, other.scale))


def _hessian(rows: Tensor, damp: float) -> Tensor:
    """H with its diagonal raised, positive definite, float64 [in, in]."""
    hessian = (rows.T @ rows).double()
    mean = float(hessian.diagonal().mean())
    # where nothing ever goes in, any roundings are equal
    hessian.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return hessian


def _least_squares(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    largest = weight.abs().amax(dim=1)

    def errors(share: float) -> Tensor:
        scale = scale_for(largest * share, grid)[:, None]
        return (grid.nearest(weight / scale) * scale - weight).square() @ hessian.diagonal().to(weight)

    best = torch.stack([errors(share) for share in _SHARES]).argmin(dim=0)
    return scale_for(largest * torch.tensor(_SHARES, device=weight.device)[best], grid)


def _blocks(width: int) -> Iterator[slice]:
    for first in range(0, width, _BLOCK):
        yield slice(first, min(first + _BLOCK, width))
