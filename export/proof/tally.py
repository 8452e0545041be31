"""Adds up, image by image, what comparing an engine with the reference shows, and holds it against the gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean, median

from tocom.export.proof.findings import BlockFindings, Fault, Findings, FreeFindings, GateFinding
from tocom.export.proof.gates import GATES, margin_allowed
from tocom.export.proof.parts import in_order


@dataclass
class Tally:
    """What was compared, over all images so far. Errors of logits are shares of the largest logit where it exceeds 1.

    Attributes:
        precision: What the engine computes in: rounding is allowed for by it.
        reduction: Name of the reduction, by which margins are measured.
        depth: Blocks of the network.
        images: How many.
        blocks: By block.
        max_logit_error: Largest difference of a logit, decisions replayed.
        max_logit: Largest logit of the reference.
        logit_errors: The largest of every image, as shares.
        shaken: What one rounding behind every part does to the logits of every image, likewise, in the reference.
        quantization_errors: What quantizing changes, likewise: the reference's logits against float32, decisions
            replayed; empty for an engine that is not quantized.
        top1_equal: Images with the same class, decisions replayed.
        debug_copy_errors: How far the debug copy's logits are from the engine's, of every image.
        free_top1_equal: Images with the same class where the reference decides by itself.
        cosines: Of the logits, where the reference decides by itself, of every image.
        divergences: KL(reference || engine) of the classes' probabilities, likewise, nats.
    """

    precision: str = "fp32"
    reduction: str = "merge"
    depth: int = 1
    images: int = 0
    blocks: dict[int, BlockFindings] = field(default_factory=dict)
    max_logit_error: float = 0.0
    max_logit: float = 0.0
    logit_errors: list[float] = field(default_factory=list)
    shaken: list[float] = field(default_factory=list)
    quantization_errors: list[float] = field(default_factory=list)
    top1_equal: int = 0
    debug_copy_errors: list[float] = field(default_factory=list)
    free_top1_equal: int = 0
    cosines: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def block(self, index: int) -> BlockFindings:
        """Of one block, to be added to."""
        return self.blocks.setdefault(index, BlockFindings())

    def total(self, name: str) -> int:
        """A count of `BlockFindings` over all blocks."""
        return sum(getattr(block, name) for block in self.blocks.values())

    @property
    def margin_allowed(self) -> float:
        """How much worse than the best a decision may be by rounding."""
        return margin_allowed(self.precision, self.reduction)

    @property
    def agreement(self) -> float:
        """Share of decisions (what merges into what, what is dropped) equal to the reference's; 1 where none."""
        decisions = self.total("decisions")
        return self.total("equal") / decisions if decisions else 1.0

    @property
    def largest_margin(self) -> float:
        """How much worse than the best any decision is."""
        return max((block.margin for block in self.blocks.values()), default=0.0)

    @property
    def faults(self) -> list[Fault]:
        """Gates that do not hold: those of parts first, in the order of the network."""
        gates = GATES[self.precision]
        part_allowed, middle_allowed = gates.part * gates.unit_roundoff, gates.middle * gates.unit_roundoff
        local: dict[tuple[int, str], Fault] = {}
        for index, block in self.blocks.items():
            for part, error in block.parts.items():
                middle = block.middles.get(part, 0.0)
                if not error <= part_allowed:
                    local[index, part] = Fault(index, part, error, part_allowed)
                elif not middle <= middle_allowed:
                    local[index, part] = Fault(index, part, middle, middle_allowed, "token in the middle")
            if block.unexplained:
                local[index, "decision"] = Fault(index, "decision", block.margin, self.margin_allowed)
        return [local[place] for place in in_order(local)] + [
            Fault(None, part, error, allowed) for part, error, allowed in self._whole() if not error <= allowed
        ]

    def _whole(self) -> list[tuple[str, float, float]]:
        """What is measured of the network as a whole: its name, the error, and what is allowed."""
        gates, least = GATES[self.precision], GATES[self.precision].least_error(self.depth)
        expected = [max(least, error) for error in self.shaken] or [least]
        return [
            ("logits of the worst image", *_worst(self.logit_errors, expected, gates.largest)),
            ("logits of the image in the middle", self.typical_logit_error, gates.typical * median(expected)),
            ("debug copy", *_worst(self.debug_copy_errors, expected, gates.largest)),
        ]

    @property
    def typical_logit_error(self) -> float:
        """Of the image in the middle."""
        return median(self.logit_errors) if self.logit_errors else 0.0

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return not self.faults

    def findings(self) -> Findings:
        """What was found, once every image is compared."""
        faults, gates = tuple(self.faults), GATES[self.precision]
        return Findings(
            passed=not faults,
            precision=self.precision,
            images=self.images,
            decisions=self.total("decisions"),
            agreement=self.agreement,
            explained=self.total("explained"),
            unexplained=self.total("unexplained"),
            largest_margin=self.largest_margin,
            margin_allowed=self.margin_allowed,
            max_logit_error=self.max_logit_error,
            typical_logit_error=self.typical_logit_error,
            typical_quantization_error=median(self.quantization_errors) if self.quantization_errors else None,
            max_logit=self.max_logit,
            debug_copy_error=max(self.debug_copy_errors, default=0.0),
            shaken=median(self.shaken) if self.shaken else None,
            top1_agreement=self.top1_equal / self.images if self.images else 1.0,
            free=FreeFindings(
                top1_agreement=self.free_top1_equal / len(self.cosines) if self.cosines else None,
                cosine=min(self.cosines, default=None),
                kl=mean(self.divergences) if self.divergences else None,
            ),
            faults=faults,
            gates={part: GateFinding(error, allowed) for part, error, allowed in self._whole()},
            part_allowed=gates.part * gates.unit_roundoff,
            middle_allowed=gates.middle * gates.unit_roundoff,
            blocks=dict(sorted(self.blocks.items())),
        )


def _worst(errors: list[float], expected: list[float], times: float) -> tuple[float, float]:
    """The error of the image that is furthest off for what is expected of it, and what it may be."""
    if not errors:
        return 0.0, times * min(expected)
    expected = expected if len(expected) == len(errors) else [min(expected)] * len(errors)
    error, usual = max(zip(errors, expected, strict=True), key=lambda pair: pair[0] / pair[1])
    return error, times * usual
