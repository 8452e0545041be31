"""How far an engine may be from the reference, in multiples of its number format's unit roundoff.

The unit roundoff u is the largest relative error of rounding one number to the format. A gate is a multiple of it that
was measured: what healthy engines come to, times about three. `docs/proof.md` has the table and the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gates:
    """The gates of one number format, all but the first as multiples of it.

    Attributes:
        unit_roundoff: u. Of a quantized format, half a step as a share of the largest number; where activations are
            not quantized, that of the format that the rest may compute in.
        part: Distance of one part's output (attention, merging, MLP, ...) from what the reference makes of its input.
        merge: How much worse than the best a merge may be, in cosine.
        prune: How much worse a dropped token may be, in the logarithm of attention, as a share of its range.
        typical: Error of the logits with decisions replayed, times the root of the depth: of the image in the middle.
        largest: Likewise, of the worst image; the debug copy's logits may be as far from the engine's.
    """

    unit_roundoff: float
    part: float
    merge: float
    prune: float
    typical: float
    largest: float

    def logits(self, depth: int) -> tuple[float, float]:
        """What logits may be off in a network of so many blocks: the image in the middle, and the worst one."""
        grown = self.unit_roundoff * math.sqrt(depth)
        return self.typical * grown, self.largest * grown


_FP16 = Gates(2**-11, part=6, merge=4, prune=4, typical=3, largest=6)
GATES = {
    "fp64": Gates(2**-53, part=64, merge=32, prune=256, typical=8, largest=24),
    "fp32": Gates(2**-24, part=32, merge=16, prune=160, typical=8, largest=24),
    "fp16": _FP16,
    "bf16": Gates(2**-8, part=6, merge=4, prune=4, typical=3, largest=6),
    "int8": Gates(2**-8, part=10, merge=8, prune=8, typical=3, largest=6),
    "fp8": Gates(2**-4, part=8, merge=1, prune=1, typical=3, largest=6),
    "int8-weights": _FP16,
    "int4-weights": _FP16,
}


# Where the rest of a quantized network is in half precision, every rounding there may move a code by a whole step: then
# logits may be as far from the quantized network's as these are from float32's, times this (the largest, the typical).
AS_FAR = (2.0, 1.25)


def margin_allowed(precision: str, reduction: str) -> float:
    """How much worse than the best a decision may be by rounding.

    >>> round(margin_allowed("fp32", "merge"), 8)
    9.5e-07
    """
    gates = GATES[precision]
    return getattr(gates, reduction) * gates.unit_roundoff
