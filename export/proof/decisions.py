"""What the decisions of a token reduction look like in an engine's outputs, and how good they are.

Where two choices are equally good to within rounding, an engine may decide otherwise than the reference. The margin
says how much worse its choice is than the best one, computed in float64 on the same tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic

import numpy as np
import torch
from torch import Tensor, nn

from tocom.export.graph.operators import operator_of
from tocom.export.graph.trace import OUTPUT
from tocom.merging import Matching, cosine_scores, first_positions
from tocom.pruning import Pruning
from tocom.reduction import MERGE, PRUNE, Decision, Reduction
from tocom.vit import ReducedViT

AnyDecision = Matching | Pruning


class DecisionComparer(ABC, Generic[Decision]):
    """Reads and compares the decisions of one reduction. A decision covers a batch; questions are about one image."""

    @abstractmethod
    def read(self, positions: Sequence[Tensor], protected: int) -> Decision:
        """The decision that an operator's decision outputs hold, [B, count] int64 each."""

    @abstractmethod
    def is_valid(self, chosen: Decision, image: int, tokens: int) -> bool:
        """Whether it is a decision about that many tokens at all, so that it can be carried out."""

    @abstractmethod
    def count(self, chosen: Decision) -> int:
        """How many decisions about single tokens it holds per image."""

    @abstractmethod
    def count_equal(self, one: Decision, other: Decision, image: int) -> int:
        """How many of these are the same in both."""

    @abstractmethod
    def is_equal(self, one: Decision, other: Decision, image: int) -> bool:
        """Whether both leave the same tokens in the same order."""

    @abstractmethod
    def margin(self, signal: Tensor, chosen: Decision, image: int, model: nn.Module) -> float:
        """How much worse it is than the best decision on a float64 signal; 0 for the best, infinity for none at all."""


class MergeComparer(DecisionComparer[Matching]):
    """Which token merges into which; margins in cosine."""

    def read(self, positions: Sequence[Tensor], protected: int) -> Matching:
        """From src, dst and unm."""
        src, dst, unm = positions
        return Matching(src=src, dst=dst, unm=unm, protected=protected)

    def is_valid(self, chosen: Matching, image: int, tokens: int) -> bool:
        """Whether every a-token is named once, merged or unmerged, and every destination is a b-token."""
        first_a, first_b = first_positions(chosen.protected)
        positions = torch.cat([chosen.src[image], chosen.unm[image]]).sort().values
        return torch.equal(positions, torch.arange(first_a, tokens, 2)) and bool(
            torch.isin(chosen.dst[image], torch.arange(first_b, tokens, 2)).all()
        )

    def count(self, chosen: Matching) -> int:
        """Merged tokens."""
        return chosen.src.shape[1]

    def count_equal(self, one: Matching, other: Matching, image: int) -> int:
        """How many tokens merge into the same token in both."""
        pairs = [set(zip(match.src[image].tolist(), match.dst[image].tolist(), strict=True)) for match in (one, other)]
        return len(pairs[0] & pairs[1])

    def is_equal(self, one: Matching, other: Matching, image: int) -> bool:
        """Whether all of them do, and the others stay in the same order."""
        in_order = torch.equal(one.unm[image], other.unm[image])
        return in_order and self.count_equal(one, other, image) == self.count(one)

    def margin(self, signal: Tensor, chosen: Matching, image: int, model: nn.Module) -> float:
        """See `merge_margin`; the signal is the metric, [B, N, D]."""
        scores = cosine_scores(signal[image : image + 1], chosen.protected)[0]
        if not self.is_valid(chosen, image, signal.shape[1]):
            return float("inf")
        return merge_margin(scores, chosen, image, ordered_by_score=not model.has_class_token)


def merge_margin(scores: Tensor, chosen: Matching, image: int, *, ordered_by_score: bool) -> float:
    """How much worse valid merge decisions for one image are than the best ones, in cosine.

    Args:
        scores: Cosine of every a-token to every b-token, float64 [A, Nb].
        chosen: The decisions.
        image: Which image of the batch.
        ordered_by_score: Whether unmerged tokens are to stand in score order, best first.

    Returns:
        The largest of: best score of a merged token minus the score of its destination; best score among the tokens
        left unmerged minus the lowest best score among the merged; the largest step up within the unmerged order.
        Infinity if unmerged tokens are to stand in position order and do not.
    """
    first_a, first_b = first_positions(chosen.protected)
    src, unm = (chosen.src[image] - first_a) // 2, (chosen.unm[image] - first_a) // 2
    dst = (chosen.dst[image] - first_b) // 2
    best = scores.max(dim=1).values
    margins = [(best[src] - scores[src, dst]).max()]
    if len(unm):
        margins.append(best[unm].max() - best[src].min())
        if ordered_by_score:
            highest_behind = best[unm].flip(0).cummax(0).values.flip(0)
            margins.append((highest_behind - best[unm]).max())
        elif not torch.equal(unm, unm.sort().values):
            return float("inf")
    return float(torch.stack(margins).max().clamp_min(0))  # NaN stays NaN, which explains nothing


class PruneComparer(DecisionComparer[Pruning]):
    """Which tokens are dropped; margins in the logarithm of attention, which is a logit, as a share of its range."""

    def read(self, positions: Sequence[Tensor], protected: int) -> Pruning:
        """From kept and dropped."""
        kept, dropped = positions
        return Pruning(kept=kept, dropped=dropped, protected=protected)

    def is_valid(self, chosen: Pruning, image: int, tokens: int) -> bool:
        """Whether every token behind the prefix is named once, kept or dropped, each kind in position order."""
        kinds = chosen.kept[image], chosen.dropped[image]
        positions = torch.cat(kinds).sort().values
        in_order = all(torch.equal(kind, kind.sort().values) for kind in kinds)
        return in_order and torch.equal(positions, torch.arange(chosen.protected, tokens))

    def count(self, chosen: Pruning) -> int:
        """Dropped tokens."""
        return chosen.dropped.shape[1]

    def count_equal(self, one: Pruning, other: Pruning, image: int) -> int:
        """How many tokens both drop."""
        return int(torch.isin(one.dropped[image], other.dropped[image]).sum())

    def is_equal(self, one: Pruning, other: Pruning, image: int) -> bool:
        """Whether all dropped tokens are the same: the others are kept, in position order."""
        return torch.equal(one.dropped[image], other.dropped[image])

    def margin(self, signal: Tensor, chosen: Pruning, image: int, model: nn.Module) -> float:  # noqa: ARG002
        """See `prune_margin`; the signal is the attention, [B, N]."""
        if not self.is_valid(chosen, image, signal.shape[1]):
            return float("inf")
        return prune_margin(signal[image], chosen, image)


def prune_margin(attention: Tensor, chosen: Pruning, image: int) -> float:
    """How much more attended the most attended dropped token is than the least attended kept one.

    Args:
        attention: Attention of the class token to every token, mean over heads, float64 [N].
        chosen: Valid decisions.
        image: Which image of the batch they are for.

    Returns:
        The difference of the logarithms, as a share of their range over all tokens that could be dropped, or of 1 where
        that is less: rounding moves a logit in proportion to its size.
    """
    least = torch.finfo(torch.float32).tiny  # what float32 cannot tell from zero is equally little
    level = attention.clamp_min(least).log()
    kept, dropped, free = level[chosen.kept[image]], level[chosen.dropped[image]], level[chosen.protected :]
    if not len(kept):
        return 0.0
    margin = (dropped.max() - kept.min()) / (free.max() - free.min()).clamp_min(1)
    return float(margin.clamp_min(0))  # NaN stays NaN, which explains nothing


_COMPARERS: dict[str, DecisionComparer] = {MERGE.name: MergeComparer(), PRUNE.name: PruneComparer()}


def comparer_of(reduction: Reduction) -> DecisionComparer:
    """What reads and compares the decisions of a reduction."""
    return _COMPARERS[reduction.name]


def decisions_of(outputs: Mapping[str, np.ndarray], reference: ReducedViT) -> dict[int, AnyDecision]:
    """The engine's decisions by block, from the outputs of its debug copy."""
    operator, comparer = operator_of(reference.reduction), comparer_of(reference.reduction)
    decisions, images = {}, len(outputs[OUTPUT])
    for block in reference.deciding_blocks:
        flat = [torch.from_numpy(outputs[name]) for name in operator.decision_names(block)]
        # by hand, because libraries lose the batch of a decision that holds no position, where every token goes
        positions = [values.reshape(images, values.numel() // images) for values in flat]
        decisions[block] = comparer.read(positions, reference.model.num_prefix_tokens)
    return decisions
