"""One side of a comparison in words: what `tocom validate --candidate` and `--against` take. Needs no torch.

engines                 the family's engines, as listed
torch:fp64|fp32|bf16|fp16   the PyTorch reference in that number format
BACKEND:PRECISION       the family's graph in another engine library, as far as the graph allows it
DIR                     the engines of another family of the same checkpoint: with or without the compensator, quantized
or not, of any library
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tocom.runtime.backends import BACKENDS, engine_module
from tocom.runtime.errors import InputError, one_line
from tocom.runtime.family_files import MANIFEST

ENGINES, REFERENCE = "engines", "torch:fp64"
FORMATS = ("fp64", "fp32", "bf16", "fp16")  # that the reference is computed in


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        kind: See above.
        backend: Of kind "graph".
        precision: Of kinds "torch" and "graph".
        folder: Of kind "family".
    """

    kind: Literal["engines", "torch", "graph", "family"]
    backend: str = ""
    precision: str = ""
    folder: Path = Path()

    @classmethod
    def read(cls, text: str) -> Side:
        """Reads what the command takes.

        Raises:
            InputError: If it is none of the above.

        >>> Side.read("torch:bf16").precision
        'bf16'
        """
        if text == ENGINES:
            return cls("engines")
        name, colon, precision = text.partition(":")
        if name == "torch" and colon:
            if precision not in FORMATS:
                raise InputError(f"torch computes in {', '.join(FORMATS)}, got {one_line(precision)}.")
            return cls("torch", precision=precision)
        if name in BACKENDS:
            precision = precision or "fp32"
            known = BACKENDS[name].precisions
            if precision not in known:
                raise InputError(f"{name} computes in {', '.join(known)}, got {one_line(precision)}.")
            engine_module(name)  # refuses one that is not installed
            return cls("graph", backend=name, precision=precision)
        if (Path(text) / MANIFEST).is_file():
            return cls("family", folder=Path(text))
        libraries = ", ".join(BACKENDS)
        raise InputError(f"what is compared must be {ENGINES}, torch:FORMAT, BACKEND:PRECISION ({libraries}) or the "
                         f"folder of a family, got {one_line(text)}.")  # fmt: skip

    @property
    def is_exact(self) -> bool:
        """Whether it is the reference itself, in a format that others are compared with."""
        return self.kind == "torch" and self.precision in ("fp64", "fp32")
