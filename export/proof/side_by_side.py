"""Two observers side by side: where they decide differently, and how far their answers are apart.

Neither can be made to decide as the other does. So each is validated against its own reference first. Where both pass,
what is left is rounding, a tie that went the other way, or the difference of their weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
from torch.nn import functional

from tocom.export.proof.decisions import comparer_of
from tocom.export.proof.findings import PairFindings
from tocom.export.proof.observe import Observer
from tocom.export.proof.parts import divergences, logit_distance
from tocom.vit import ReducedViT


@dataclass
class PairTally:
    """What two observers differ in, over all images.

    Attributes:
        one: Name.
        other: Name.
        images: How many.
        decisions: About single tokens, of one of them.
        equal: How many of these are the same in both; where earlier blocks decided otherwise, positions stand for
            other tokens, so that little is equal behind a first difference.
        first_difference: Block -> images that decide otherwise there first.
        errors_alike: Distance of the logits of images in which all is decided alike.
        errors_otherwise: Likewise, where something is not.
        top1_equal: Images with the same class.
        cosines: Of the logits, of every image.
        divergences: KL(other || one), nats, likewise.
    """

    one: str
    other: str
    images: int = 0
    decisions: int = 0
    equal: int = 0
    first_difference: dict[int, int] = field(default_factory=dict)
    errors_alike: list[float] = field(default_factory=list)
    errors_otherwise: list[float] = field(default_factory=list)
    top1_equal: int = 0
    cosines: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def findings(self) -> PairFindings:
        """What was found, once every image is compared."""
        return PairFindings(
            one=self.one,
            other=self.other,
            images=self.images,
            agreement=self.equal / self.decisions if self.decisions else 1.0,
            images_alike=len(self.errors_alike),
            first_difference=dict(sorted(self.first_difference.items())),
            logit_error_alike=max(self.errors_alike, default=None),
            logit_error_otherwise=max(self.errors_otherwise, default=None),
            top1_agreement=self.top1_equal / self.images if self.images else 1.0,
            cosine=min(self.cosines, default=1.0),
            kl=mean(self.divergences) if self.divergences else 0.0,
        )


def compare_pair(one: Observer, other: Observer, reference: ReducedViT, batches: Iterable[np.ndarray]) -> PairFindings:
    """Runs two observers of the same network and schedule on the same images.

    Args:
        one: What is validated.
        other: What it is compared with.
        reference: For what decisions look like.
        batches: Normalized images, float32 [B, 3, H, W].
    """
    comparer, pair = comparer_of(reference.reduction), PairTally(one.name, other.name)
    for pixel_values in batches:
        observed, expected = one.observe(pixel_values), other.observe(pixel_values)
        logits, expected_logits = observed.logits.double(), expected.logits.double()
        errors = logit_distance(logits, expected_logits).tolist()
        for image, error in enumerate(errors):
            differing = []
            for block, chosen in sorted(observed.decisions.items()):
                pair.decisions += comparer.count(chosen)
                pair.equal += comparer.count_equal(expected.decisions[block], chosen, image)
                if not comparer.is_equal(expected.decisions[block], chosen, image):
                    differing.append(block)
            if differing:
                first = differing[0]
                pair.first_difference[first] = pair.first_difference.get(first, 0) + 1
            (pair.errors_otherwise if differing else pair.errors_alike).append(error)
        pair.images += len(errors)
        pair.top1_equal += int((logits.argmax(1) == expected_logits.argmax(1)).sum())
        pair.cosines += functional.cosine_similarity(logits, expected_logits).tolist()
        pair.divergences += divergences(logits, expected_logits)
    return pair.findings()
