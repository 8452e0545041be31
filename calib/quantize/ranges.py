"""Which range of a product's input a grid is to cover: what lies outside is clipped, what lies inside is rounded.

- minmax: everything that was seen.
- percentile: all but the outermost 0.01% of the numbers (Wu et al. 2020, "Integer quantization for deep learning
  inference").
- mse: the range of which clipping and rounding together have the least squared error.
- entropy: the range of which the histogram loses the least information (Migacz 2017, TensorRT's calibrator).
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import Tensor

from tocom.calib.quantize.grids import Grid, scale_for
from tocom.calib.quantize.network import Observation

PERCENTILE = 99.99

_SHARES = 60  # ranges that are tried for the least squared error, as shares of the largest number
_BINS, _LEVELS = 2048, 128  # as TensorRT's entropy calibrator has them
_AT_MOST = 1 << 20  # numbers that are looked at


def scale_of(seen: Observation, grid: Grid, method: str) -> float:
    """The scale of a product's input.

    Args:
        seen: What went into it.
        grid: Its format.
        method: One of `tocom.calib.quantize.method.RANGES`.
    """
    largest = seen.largest.max()
    if method != "minmax" and largest > 0:
        numbers = seen.rows.flatten().abs()
        numbers = numbers[:: -(-len(numbers) // _AT_MOST)]
        largest = {"percentile": _percentile, "mse": _least_error, "entropy": _least_loss}[method](
            numbers, float(largest), grid
        )
    return float(scale_for(torch.as_tensor(largest), grid))


def _percentile(numbers: Tensor, _largest: float, _grid: Grid) -> float:
    return float(np.percentile(numbers.numpy(), PERCENTILE))


def _least_error(numbers: Tensor, largest: float, grid: Grid) -> float:
    def error(end: float) -> float:
        scale = end / grid.largest
        return float((grid.nearest(numbers / scale) * scale - numbers).square().mean())

    return min((largest * share / _SHARES for share in range(_SHARES, _SHARES // 8, -1)), key=error)


def _least_loss(numbers: Tensor, largest: float, _grid: Grid) -> float:
    from onnxruntime.quantization.calibrate import HistogramCollector  # an engine library's tool, for this alone

    collector = HistogramCollector("entropy", True, _BINS, _LEVELS, PERCENTILE, "same")
    # signed, because the collector's histogram is symmetric around zero
    signed = torch.cat([numbers, -numbers, torch.tensor([largest, -largest])])
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
        collector.collect({"input": [signed.numpy()]})
        ends = collector.get_entropy_threshold(collector.histogram_dict["input"], _LEVELS)
    return max(abs(float(end)) for end in ends)
