"""What validating an engine found: a report's contents, typed; JSON only at the edge.

The manifest has it as `validation`, report.json as `findings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


@dataclass
class BlockFindings:
    """What was compared in one block.

    Attributes:
        decisions: How many decisions about single tokens.
        equal: How many of them are the reference's.
        explained: Images that differ, where the choice is as good to within rounding.
        unexplained: Images that differ otherwise.
        margin: How much worse than the best its decisions are, at most.
        output_error: Distance (`.parts.distance`) of the tokens that leave it, decisions replayed; None
            where the engine does not tell its tokens.
        parts: Part -> distance of what it puts out from what the reference makes of its input: of the worst token.
        middles: Likewise, of the token in the middle of the worst image.
    """

    decisions: int = 0
    equal: int = 0
    explained: int = 0
    unexplained: int = 0
    margin: float = 0.0
    output_error: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    middles: dict[str, float] = field(default_factory=dict)


class NetworkGate(StrEnum):
    """What is measured of the network as a whole; the values are what people and files read."""

    WORST_LOGITS = "logits of the worst image"
    MEDIAN_LOGITS = "logits of the image in the middle"
    DEBUG_COPY = "debug copy"


@dataclass(frozen=True)
class Fault:
    """A gate that does not hold.

    Attributes:
        block: Where; None where it is about the network as a whole.
        part: One of `tocom.export.proof.parts.PARTS`, or a `NetworkGate`.
        found: What was measured.
        allowed: The gate.
        of: What of the part; empty for its worst token.
    """

    block: int | None
    part: str
    found: float
    allowed: float
    of: str = ""

    def __str__(self) -> str:
        place = self.part if self.block is None else f"block {self.block}, {self.part}"
        place += f" ({self.of})" if self.of else ""
        return f"{place}: {self.found:.1e}, allowed {self.allowed:.1e}"


@dataclass(frozen=True)
class GateFinding:
    """What was measured of the network as a whole, and what it may be."""

    found: float
    allowed: float


@dataclass(frozen=True)
class FreeFindings:
    """What a user sees: the engine beside the reference that decides by itself.

    Attributes:
        top1_agreement: Share of images with the same class.
        cosine: The lowest of the logits of an image.
        kl: KL(reference || engine) of the classes' probabilities, nats, mean over images.
    """

    top1_agreement: float | None
    cosine: float | None
    kl: float | None


@dataclass(frozen=True)
class PairFindings:
    """What two engines of the same network differ in, over all images.

    Attributes:
        one: Name.
        other: Name.
        images: How many.
        agreement: Share of decisions that are the same in both.
        images_alike: Images in which everything is decided alike.
        first_difference: Block -> images that decide otherwise there first.
        logit_error_alike: The largest distance of logits of images decided alike; None where there are none.
        logit_error_otherwise: Likewise, of the others.
        top1_agreement: Share of images with the same class.
        cosine: The lowest of the logits of an image.
        kl: KL(other || one), nats, mean over images.
    """

    one: str
    other: str
    images: int
    agreement: float
    images_alike: int
    first_difference: Mapping[int, int]
    logit_error_alike: float | None
    logit_error_otherwise: float | None
    top1_agreement: float
    cosine: float
    kl: float

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        blocks = {str(block): images for block, images in self.first_difference.items()}
        return asdict(self) | {"first_difference": blocks}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of engine and reference on labelled images, shares in 0..1."""

    top1: float
    reference_top1: float
    images: int


@dataclass(frozen=True)
class QuantizationFindings:
    """What a quantized engine loses against the float network, and what it keeps in float for that.

    Attributes:
        format: Of the quantized products.
        products: How many are quantized.
        float_products: Names of those that are not.
        drop: Points of top-1; without labels, percent of images that are classified otherwise.
        drop_of: "top1" or "agreement".
        drop_images: How many images were looked at.
        float_top1: Top-1 of the float network; None without labels.
        top1: Of the engine; None without labels.
        max_drop: What it may lose; None for anything.
        sensitivity: Product -> what quantizing it alone does; empty where that was not measured.
    """

    format: str
    products: int
    float_products: list[str]
    drop: float
    drop_of: str
    drop_images: int
    float_top1: float | None
    top1: float | None
    max_drop: float | None
    sensitivity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What was compared, over all images. Errors of logits are shares of the largest logit where it exceeds 1.

    Attributes:
        passed: Whether every gate holds.
        precision: What the engine computes in: rounding is allowed for by it.
        images: How many.
        decisions: About single tokens.
        agreement: Share of decisions equal to the reference's; 1 where nothing goes.
        explained: Images that a block decides otherwise, as well as the best to within rounding.
        unexplained: Images that a block decides worse than that.
        largest_margin: How much worse than the best any decision is.
        margin_allowed: How much worse it may be by rounding.
        max_logit_error: Largest difference of a logit, decisions replayed.
        typical_logit_error: Of the image in the middle, a share.
        typical_quantization_error: What quantizing changes, likewise; None for an engine that is not quantized.
        max_logit: Largest logit of the reference.
        debug_copy_error: How far the debug copy's logits are from the engine's, at most.
        shaken: What one rounding behind every part does to the logits of the image in the middle, in the reference.
        top1_agreement: Share of images with the same class, decisions replayed.
        free: Beside the reference that decides by itself.
        faults: Gates that do not hold, in the order of the network.
        gates: What of the network as a whole -> measured and allowed.
        part_allowed: What a part's worst token may be off.
        middle_allowed: Likewise, the token in the middle.
        blocks: By block.
        candidate: Name of what was validated; None where it is the engine itself.
        reference: Name of what it was compared with, likewise.
        run: The library that ran it; None where its graph was emulated instead.
        float_blocks: Blocks that were kept in float32; None for quantized engines.
        quantization: Of a quantized engine.
        against: Of the other engine, where two were compared.
        pair: The two beside each other.
        accuracy: On labelled images, where it was measured.
    """

    passed: bool
    precision: str
    images: int
    decisions: int
    agreement: float
    explained: int
    unexplained: int
    largest_margin: float
    margin_allowed: float
    max_logit_error: float
    typical_logit_error: float
    typical_quantization_error: float | None
    max_logit: float
    debug_copy_error: float
    shaken: float | None
    top1_agreement: float
    free: FreeFindings
    faults: tuple[Fault, ...]
    gates: Mapping[NetworkGate, GateFinding]
    part_allowed: float
    middle_allowed: float
    blocks: Mapping[int, BlockFindings]
    candidate: str | None = None
    reference: str | None = None
    run: str | None = None
    float_blocks: tuple[int, ...] | None = None
    quantization: QuantizationFindings | None = None
    against: Findings | None = None
    pair: PairFindings | None = None
    accuracy: Accuracy | None = None

    @property
    def blocks_with_unexplained(self) -> list[int]:
        """Blocks that decide worse than rounding explains."""
        return [index for index, block in self.blocks.items() if block.unexplained]

    def to_json(self) -> dict[str, Any]:
        """For the manifest and for machines; of the last six, what was not measured is left out."""
        written: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        written |= {
            "free": asdict(self.free),
            "faults": [str(fault) for fault in self.faults],
            "first_fault": asdict(self.faults[0]) if self.faults else None,
            "blocks_with_unexplained": self.blocks_with_unexplained,
            "gates": {str(name): asdict(gate) for name, gate in self.gates.items()},
            "part_allowed": self.part_allowed,
            "middle_allowed": self.middle_allowed,
            "blocks": {str(index): asdict(block) for index, block in self.blocks.items()},
        }
        if self.candidate is not None:
            written |= {"candidate": self.candidate, "reference": self.reference}
        written["run"] = self.run
        if self.float_blocks is not None:
            written["float_blocks"] = list(self.float_blocks)
        if self.quantization is not None:
            written["quantization"] = asdict(self.quantization)
        if self.against is not None and self.pair is not None:
            written |= {"against": self.against.to_json(), "pair": self.pair.to_json()}
        if self.accuracy is not None:
            written["accuracy"] = asdict(self.accuracy)
        return written


_PLAIN = (
    "passed", "precision", "images", "decisions", "agreement", "explained", "unexplained", "largest_margin",
    "margin_allowed", "max_logit_error", "typical_logit_error", "typical_quantization_error", "max_logit",
    "debug_copy_error", "shaken", "top1_agreement",
)  # fmt: skip
