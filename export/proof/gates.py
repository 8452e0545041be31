"""How far an engine may be from the reference, in multiples of its number format's unit roundoff.

The unit roundoff u is the largest relative error of rounding one number to the format. A gate is a multiple of it:
about twice the most that healthy random networks came to (`python -m bench.proof`). `docs/proof.md` has the table and
the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tocom.runtime.backends import named

_UNKNOWN_TOKENS = 8  # times wider, where the tokens that an engine decided on are not known


@dataclass(frozen=True)
class Gates:
    """The gates of one number format, all but the first as multiples of it.

    Attributes:
        unit_roundoff: u. Of a quantized format, half a step as a share of the largest number; where activations are
            not quantized, that of the format that the rest may compute in.
        part: Distance of one part's output (attention, merging, MLP, ...) from what the reference makes of its input:
            of the worst token.
        middle: Likewise, of the token in the middle, which a code that flips or a saturated softmax rarely hits.
        merge: How much worse than the best a merge may be, in cosine.
        prune: How much worse a dropped token may be, in the logarithm of attention, as a share of its range.
        typical: Error of the logits with decisions replayed: of the image in the middle. Counted in what one rounding
            behind every part does to the logits of the network at hand, or in the root of its depth times u, if that
            is more.
        largest: Likewise, of the worst image; the debug copy's logits may be as far from the engine's.
    """

    unit_roundoff: float
    part: float
    middle: float
    merge: float
    prune: float
    typical: float
    largest: float

    def least_error(self, depth: int) -> float:
        """What roundings behind the parts of that many blocks, the embedding and the head add up to by chance."""
        return self.unit_roundoff * math.sqrt(depth + 2)


_FP16 = Gates(2**-11, part=16, middle=5, merge=4, prune=6, typical=4, largest=12)
GATES = {
    "fp64": Gates(2**-53, part=40, middle=20, merge=32, prune=256, typical=12, largest=36),
    "fp32": Gates(2**-24, part=40, middle=20, merge=16, prune=160, typical=12, largest=36),
    "fp16": _FP16,
    "bf16": Gates(2**-8, part=16, middle=5, merge=4, prune=6, typical=4, largest=12),
    "int8": Gates(2**-8, part=4, middle=0.1, merge=4, prune=6, typical=1, largest=4),
    "int8+half": Gates(2**-8, part=32, middle=8, merge=6, prune=6, typical=4, largest=12),
    "fp8": Gates(2**-4, part=8, middle=4, merge=2, prune=2, typical=4, largest=12),
    "int8-weights": _FP16,
    "int4-weights": _FP16,
}


def gates_row(backend: str, precision: str) -> str:
    """The row of `GATES` for an engine: int8 has another one where the rest of the network is in half precision.

    >>> gates_row("onnxruntime", "int8"), gates_row("openvino", "int8"), gates_row("openvino", "bf16")
    ('int8', 'int8+half', 'bf16')
    """
    return named(backend).checked_as(precision)


def margin_allowed(precision: str, reduction: str, *, on_its_tokens: bool = True) -> float:
    """How much worse than the best a decision may be by rounding.

    Args:
        precision: A row of `GATES`.
        reduction: Name of the reduction.
        on_its_tokens: Whether the margin was measured on the very tokens that the engine decided on.

    >>> round(margin_allowed("fp32", "merge"), 8)
    9.5e-07
    """
    gates = GATES[precision]
    wider = 1 if on_its_tokens else _UNKNOWN_TOKENS
    return getattr(gates, reduction) * gates.unit_roundoff * wider
