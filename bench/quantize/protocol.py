"""What is measured: formats, methods, degrees, sheets; in full or quickly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tocom.calib.quantize.calibrate import OBSERVED
from tocom.calib.quantize.grids import FORMATS, INT4_WEIGHTS, INT8, Format, Grid

CALIBRATION_IMAGES = 128
POOL = 1024  # training sheets that calibration sheets are chosen from


def _both(bits: int) -> Format:
    end = 2 ** (bits - 1)
    name = f"INT{bits}"
    return Format(f"w{bits}a{bits}", Grid(name, 1 - end, end - 1), Grid(name, -end, end - 1))


STRESS = {each.name: each for each in (Format("w4a8", INT4_WEIGHTS, INT8), _both(6), _both(5), _both(4))}
"""Formats that no engine computes in here: eight bits leave methods too little to win back."""

HARDEST = "w4a4"
TITLES = {
    "int8": "INT8", "fp8": "FP8", "int8-weights": "INT8 weights only", "w4a8": "4-bit weights, 8-bit inputs",
    "w6a6": "6 bits", "w5a5": "5 bits", "w4a4": "4 bits",
}  # fmt: skip

ALL = {"range": "mse", "smooth": True, "widen": True, "reparameterize": True, "rounding": "gptq", "choice": "diverse"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "range percentile": {"range": "percentile"},
    "range mse": {"range": "mse"},
    "range entropy": {"range": "entropy"},
    "smooth": {"smooth": True},
    "widen": {"widen": True},
    "reparameterize": {"reparameterize": True},
    "reparameterize, range percentile": {"reparameterize": True, "range": "percentile"},
    "rounding gptq": {"rounding": "gptq"},
    "rounding quantease": {"rounding": "quantease"},
    "choice diverse": {"choice": "diverse"},
    "all of these": ALL,
}
RECONSTRUCTED: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "reconstruct": {"reconstruct": True},
    "all of these": ALL,
    "all of these, reconstruct": {**ALL, "reconstruct": True},
}
RULES: Mapping[str, tuple[int, ...] | None] = {
    "once, at 0, 8 and 16 together": OBSERVED,
    "at every degree by itself": None,
    "at 0 only": (0,),
    "at 16 only": (16,),
}


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        name: Of the folder that finished stages are kept in.
        seeds: Of the experiment's checkpoints.
        degrees: Of the default table and of ranges.
        few: Degrees of everything else.
        many_sheets: Test sheets of the default table.
        sheets: Test sheets of other tables.
        sensitivity_sheets: Test sheets of each product alone.
        counts: Numbers of calibration images.
        reconstructed: Subject -> formats that reconstruction is tried in: it takes minutes each.
    """

    name: str = "full"
    seeds: tuple[int, ...] = (0, 1, 2)
    degrees: tuple[int, ...] = (0, 4, 8, 12, 16)
    few: tuple[int, ...] = (0, 8, 16)
    many_sheets: int = 4096
    sheets: int = 512
    sensitivity_sheets: int = 256
    counts: tuple[int, ...] = (1, 4, 16, 64, 128, 512)
    reconstructed: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "board-0": (HARDEST,),
        }
    )  # fmt: skip


FULL = Effort()
QUICK = Effort(
    name="quick", seeds=(0,), degrees=(0, 16), few=(0, 16), many_sheets=64, sheets=32, sensitivity_sheets=8,
    counts=(1, 8), reconstructed={},
)  # fmt: skip


@contextmanager
def stress_formats() -> Iterator[None]:
    """Makes the formats that no engine computes in known to calibration, for a while."""
    FORMATS.update(STRESS)
    try:
        yield
    finally:
        for name in STRESS:
            del FORMATS[name]
