"""The narrow number formats, and what the products of a network keep in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HALF_SPACING = 2.0**-10  # float16 keeps 11 bits


@dataclass(frozen=True)
class Grid:
    """The numbers of a format, before they are scaled.

    Attributes:
        name: As ONNX's data types are named.
        lowest: The smallest, negative.
        largest: The largest that a symmetric scale maps a range's end to.
    """

    name: str
    lowest: float
    largest: float

    def nearest(self, x: Tensor) -> Tensor:
        """The grid's numbers nearest to x, ties to even, what lies outside clipped; in x's type."""
        x = x.clamp(self.lowest, self.largest)
        if self.name == "FLOAT8E4M3FN":
            return x.to(torch.float8_e4m3fn).to(x.dtype)
        return x.round()


INT8 = Grid("INT8", -128, 127)
INT8_WEIGHTS = Grid("INT8", -127, 127)
INT4_WEIGHTS = Grid("INT4", -7, 7)
FP8 = Grid("FLOAT8E4M3FN", -448, 448)


@dataclass(frozen=True)
class Format:
    """What a product keeps its weight and its input in.

    Attributes:
        name: As users write it.
        weight: Per output channel, symmetric.
        activation: Per tensor, symmetric; None leaves the input in float.
    """

    name: str
    weight: Grid
    activation: Grid | None


FORMATS = {
    form.name: form
    for form in (
        Format("int8", INT8_WEIGHTS, INT8),
        Format("fp8", FP8, FP8),
        Format("int8-weights", INT8_WEIGHTS, None),
        Format("int4-weights", INT4_WEIGHTS, None),
    )
}


def scale_for(largest: Tensor, grid: Grid) -> Tensor:
    """The scale that maps a symmetric range onto a grid, rounded up to what float16 holds.

    A graph of which the rest computes in float16 keeps its scales in float16 too; rounded here, they are the same in
    every engine.

    Args:
        largest: End of each range, 0 or more, any shape.
        grid: The grid.
    """
    scale = (largest.double() / grid.largest).clamp_min(2.0**-14)  # float16's smallest with all its bits
    step = torch.exp2(torch.floor(torch.log2(scale))) * _HALF_SPACING
    return (torch.ceil(scale / step) * step).float()
