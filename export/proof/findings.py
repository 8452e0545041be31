"""What a comparison of an engine with the reference found, and when that passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

# By precision; times the largest logit where that exceeds 1.
LOGIT_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2,
                   "int8": 5e-2, "fp8": 5e-2, "int8-weights": 2e-2, "int4-weights": 2e-2}  # fmt: skip
# Likewise, of the image in the middle. A number half-way between two of a grid's may be rounded to either, a whole step
# apart, so single images of a quantized engine are further off than the typical one.
TYPICAL_TOLERANCE = {**LOGIT_TOLERANCE, "int8": 2e-2, "fp8": 2e-2}
# Where the rest of a quantized network is in half precision, every rounding there may move a code by a whole step: then
# logits may be as far from the quantized network's as these are from float32's, times this (the largest, the typical).
AS_FAR = (2.0, 1.25)
DEBUG_TOLERANCE = 1e-6  # the debug copy may be optimized differently, not compute something else


@dataclass
class BlockFindings:
    """What was compared in one block.

    Attributes:
        decisions: How many decisions about single tokens.
        equal: How many of them are the reference's.
        explained: Images that differ, where the choice is as good to within rounding.
        unexplained: Images that differ otherwise.
        token_error: Largest difference of a number in the tokens that remain, decisions replayed, as a share of the
            largest number in them; None where the engine does not tell its tokens.
    """

    decisions: int = 0
    equal: int = 0
    explained: int = 0
    unexplained: int = 0
    token_error: float | None = None


@dataclass
class Findings:
    """What was compared, over all images so far.

    Attributes:
        precision: What the engine computes in: rounding is judged by it.
        debug_tolerance: How far the logits of the debug copy may be from the engine's, times the largest logit where
            that exceeds 1.
        blocks: By block.
        logit_errors: Largest difference of a logit, of every image.
        quantization_errors: What quantizing changes, likewise: the reference's logits against float32, decisions
            replayed; empty for an engine that is not quantized.
    """

    precision: str = "fp32"
    debug_tolerance: float = DEBUG_TOLERANCE
    images: int = 0
    blocks: dict[int, BlockFindings] = field(default_factory=dict)
    largest_margin: float = 0.0
    max_logit_error: float = 0.0
    max_logit: float = 0.0
    logit_errors: list[float] = field(default_factory=list)
    quantization_errors: list[float] = field(default_factory=list)
    top1_equal: int = 0
    debug_copy_error: float = 0.0

    def block(self, index: int) -> BlockFindings:
        """Of one block, to be added to."""
        return self.blocks.setdefault(index, BlockFindings())

    def total(self, name: str) -> int:
        """A count of `BlockFindings` over all blocks."""
        return sum(getattr(block, name) for block in self.blocks.values())

    @property
    def agreement(self) -> float:
        """Share of decisions (who merges into whom, who is dropped) equal to the reference's; 1 where nothing goes."""
        decisions = self.total("decisions")
        return self.total("equal") / decisions if decisions else 1.0

    @property
    def typical_logit_error(self) -> float:
        """Of the image in the middle."""
        return median(self.logit_errors) if self.logit_errors else 0.0

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        largest = max(1.0, self.max_logit)
        as_far = (0.0, 0.0)
        if self.quantization_errors:
            as_far = AS_FAR[0] * max(self.quantization_errors), AS_FAR[1] * median(self.quantization_errors)
        return (
            self.total("unexplained") == 0
            and self.max_logit_error <= max(LOGIT_TOLERANCE[self.precision] * largest, as_far[0])
            and self.typical_logit_error <= max(TYPICAL_TOLERANCE[self.precision] * largest, as_far[1])
            and self.debug_copy_error <= self.debug_tolerance * largest
        )

    def to_json(self) -> dict[str, Any]:
        """For the manifest and for machines."""
        return {
            "passed": self.passed,
            "precision": self.precision,
            "images": self.images,
            "decisions": self.total("decisions"),
            "agreement": self.agreement,
            "explained": self.total("explained"),
            "unexplained": self.total("unexplained"),
            "largest_margin": self.largest_margin,
            "max_logit_error": self.max_logit_error,
            "typical_logit_error": self.typical_logit_error,
            "typical_quantization_error": median(self.quantization_errors) if self.quantization_errors else None,
            "max_logit": self.max_logit,
            "debug_copy_error": self.debug_copy_error,
            "top1_agreement": self.top1_equal / self.images if self.images else 1.0,
            "blocks_with_unexplained": [index for index, block in sorted(self.blocks.items()) if block.unexplained],
            "blocks": {str(index): asdict(block) for index, block in sorted(self.blocks.items())},
        }
