"""How a network is to be quantized: the choices there are, in a file that needs no torch.

So that a command can check them, and name them, before torch loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from tocom.runtime.errors import InputError

FORMATS = ("int8", "fp8", "int8-weights", "int4-weights")  # `tocom.calib.quantize.grids` has what they are
ROUNDINGS = ("nearest", "gptq", "quantease")
CHOICES = ("spread", "diverse")
RANGES = ("minmax", "percentile", "mse", "entropy")  # `tocom.calib.quantize.ranges` has what they are


@dataclass(frozen=True)
class Method:
    """What calibration does; every part can be switched by itself.

    Attributes:
        format: Name of the number format, one of `FORMATS`.
        images: How many images are looked at.
        choice: Which: "spread" evenly over the folder, or "diverse" by density and diversity (EDA-DM).
        range: Which range of an input its grid covers, one of `RANGES`.
        smooth: Whether range moves from inputs into weights (SmoothQuant), alpha searched.
        widen: Whether weights' unsaturated channels are widened (DilateQuant).
        reparameterize: Whether norms are given one range for all channels (RepQuant).
        rounding: How weights are rounded, one of `ROUNDINGS`.
        reconstruct: Whether weights' rounding is then learnt, block by block (MGRQ).
        shared: Whether all degrees share one calibration.

    Raises:
        InputError: If there is no such choice.
    """

    format: str = "int8"
    images: int = 128
    choice: str = "spread"
    range: str = "minmax"
    smooth: bool = False
    widen: bool = False
    reparameterize: bool = False
    rounding: str = "nearest"
    reconstruct: bool = False
    shared: bool = True

    def __post_init__(self) -> None:
        known = {"format": FORMATS, "choice": CHOICES, "range": RANGES, "rounding": ROUNDINGS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise InputError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}.")
        if self.images < 1:
            raise InputError(f"images must be 1 or more, got {self.images}.")
