"""Every part of the network by itself: the reference gets what the candidate put into a part, and both answer.

So errors do not add up on the way, a part may be as far off as its own rounding makes it, and one that is further off
is where the fault lies, whatever it did to all that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tocom.export.graph.operators import point_name
from tocom.export.proof.decisions import AnyDecision
from tocom.export.proof.observe import Observed
from tocom.vit import ReducedViT

# of a block, in order; "decision" is measured by its margin, the ends belong to the first and last block
PARTS = ("embedding", "attention", "signal", "decision", "reduction", "mlp", "head")

_SMALLEST = 1e-30  # nothing is divided by less


@dataclass
class Compared:
    """What the reference makes of a candidate's own numbers.

    Attributes:
        errors: (block, part) -> distance of the candidate's answer from the reference's: of every image's worst token.
        middles: Likewise, the token in the middle.
        natural: Block -> what the reference decides on the candidate's tokens.
        signals: Block -> what it decides that on.
    """

    errors: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    middles: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    natural: dict[int, AnyDecision] = field(default_factory=dict)
    signals: dict[int, Tensor] = field(default_factory=dict)

    def add(self, block: int, part: str, value: Tensor, expected: Tensor) -> None:
        """Compares what a part puts out, [B, N, C] or [B, N]."""
        errors = distances(value, expected[:, : value.shape[1]])
        self.errors[block, part] = errors.amax(dim=1)
        if errors.shape[1] > 1:
            self.middles[block, part] = errors.median(dim=1).values


@torch.no_grad()
def compare_parts(reference: ReducedViT, pixel_values: Tensor, observed: Observed, only: int | None = None) -> Compared:
    """Compares every part whose input and output the candidate puts out.

    Args:
        reference: In float32 or float64.
        pixel_values: [B, 3, H, W].
        observed: What the candidate or its debug copy answered; its decisions are valid.
        only: A block to compare, instead of all and of the ends.

    Returns:
        The comparison. Where the candidate does not put out the tokens between two parts, they are compared as one,
        under the later one's name.
    """
    compared = Compared()
    dtype = next(reference.model.parameters()).dtype
    values = {name: value.to(dtype) for name, value in observed.values.items()}
    depth = len(reference.model.blocks)

    def compare(block: int, part: str, expected: Tensor, point: str) -> None:
        if (value := values.get(point_name(block + (point == "tokens"), point))) is not None:
            compared.add(block, part, value, expected)

    if only is None and (entering := values.get(point_name(0, "tokens"))) is not None:
        compared.add(0, "embedding", entering, reference.embed(pixel_values.to(dtype)))
    token_size = None
    for block, r in enumerate(reference.schedule.removed):
        if only not in (None, block):
            token_size = values.get(point_name(block, "token_size"), token_size)
            continue
        x = values.get(point_name(block, "tokens"))
        if x is not None:
            x, signal = reference.attend(block, x, token_size)
            if r and block in observed.decisions:
                compared.natural[block] = reference.reduction.decide(signal, r, reference.model)
                compared.signals[block] = signal
                compare(block, "signal", signal, "signal")
                compare(block, "attention", x, "attended")
            else:
                compare(block, "attention", x, "remaining")
        if block in observed.decisions:
            before = values.get(point_name(block, "attended"), x)
            token_size = _reduced(reference, block, before, token_size, observed, values, compared)
        remaining = values.get(point_name(block, "remaining"))
        if remaining is not None:
            compare(block, "mlp", reference.feed_forward(block, remaining), "tokens")
    leaving = values.get(point_name(depth, "tokens"))
    if only is None and leaving is not None:
        logits = observed.logits.to(dtype)
        expected = reference.classify(leaving, _sizes_left(reference, token_size))
        compared.errors[depth - 1, "head"] = logit_distance(logits, expected)
    return compared


def _reduced(
    reference: ReducedViT,
    block: int,
    before: Tensor | None,
    token_size: Tensor | None,
    observed: Observed,
    values: Mapping[str, Tensor],
    compared: Compared,
) -> Tensor | None:
    """Compares what a block's reduction made, and returns the sizes that remain."""
    size = values.get(point_name(block, "token_size"))
    remaining = values.get(point_name(block, "remaining"))
    if before is None:
        return size
    ones = before.new_ones(*before.shape[:2], 1)
    signal = values.get(point_name(block, "signal"), compared.signals.get(block))
    chosen = observed.decisions[block]
    expected, expected_size = reference.reduction.apply(
        before, ones if token_size is None else token_size, signal, chosen
    )
    if remaining is not None:
        compared.add(block, "reduction", remaining, expected)
    if size is not None:
        error = _or_infinity(((size - expected_size).abs() / expected_size).amax(dim=(1, 2)))
        compared.errors[block, "reduction"] = error.maximum(compared.errors.get((block, "reduction"), error))
    return expected_size if size is None else size


def _sizes_left(reference: ReducedViT, token_size: Tensor | None) -> Tensor | None:
    """The sizes that the head may weigh by; a head that reads protected tokens only weighs none."""
    return None if reference.read_tokens is not None else token_size


def distance(one: Tensor, other: Tensor) -> Tensor:
    """How far apart the worst tokens are, [B]; see `distances`."""
    return distances(one, other).amax(dim=1)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """How far apart tokens are, [B, N], as a share of their length.

    A token that is shorter than the one in the middle counts as long as that one: what attention and residuals cancel
    to nearly nothing carries the rounding of what was cancelled.

    Args:
        one: [B, N, C], or [B, N] for one number per token, which count as one token.
        other: Likewise.

    >>> distances(torch.tensor([[[3.0, 4.5]]]), torch.tensor([[[3.0, 4.0]]]))
    tensor([[0.1000]])
    """
    if one.ndim == 2:
        one, other = one.unsqueeze(1), other.unsqueeze(1)
    length = other.norm(dim=-1)
    length = length.maximum(length.median(dim=1, keepdim=True).values).clamp_min(_SMALLEST)
    return _or_infinity((one - other).norm(dim=-1) / length)


def logit_distance(one: Tensor, other: Tensor) -> Tensor:
    """How far apart logits are, [B]: the largest difference, as a share of the largest logit where that exceeds 1.

    >>> logit_distance(torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, -4.0]]))
    tensor([0.2500])
    """
    largest = other.abs().amax(dim=1).clamp_min(1)
    return _or_infinity((one - other).abs().amax(dim=1) / largest)


def divergences(logits: Tensor, expected: Tensor) -> list[float]:
    """KL(expected || logits) of the classes' probabilities of every image, nats."""
    log_shares, expected_log_shares = logits.log_softmax(1), expected.log_softmax(1)
    return functional.kl_div(log_shares, expected_log_shares, log_target=True, reduction="none").sum(1).tolist()


def _or_infinity(errors: Tensor) -> Tensor:
    """NaN counts as infinitely far off."""
    return errors.nan_to_num(nan=torch.inf, posinf=torch.inf)


def in_order(parts: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Parts of blocks, first to last in the network.

    >>> in_order([(1, "mlp"), (1, "attention"), (0, "mlp")])
    [(0, 'mlp'), (1, 'attention'), (1, 'mlp')]
    """
    return sorted(parts, key=lambda place: (place[0], PARTS.index(place[1])))
