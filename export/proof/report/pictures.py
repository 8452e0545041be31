"""An image and what was decided on it -> pictures of which input patches are one token, block by block.

Every token behind the prefix stands for a set of input patches. A decision says where each token goes among the tokens
that leave the block, so the sets are followed by positions alone, from block to block, whatever carried them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tocom.export.proof.decisions import AnyDecision, comparer_of
from tocom.export.proof.observe import Observer
from tocom.export.proof.reference import replay
from tocom.merging import Matching, first_positions
from tocom.runtime.manifest import InputSpec
from tocom.vit import ReducedViT


@dataclass(frozen=True)
class MergePicture:
    """Which patches of one image are one token behind each block, by one decider.

    Attributes:
        name: Who decided.
        reduction: "merge" or "prune".
        image: What was looked at, [H, W, 3] uint8.
        groups: Block -> the position, among the tokens that leave it, of the token that each patch is part of,
            [grid_h, grid_w] int64. Blocks that reduce nothing are missing, and so are all from the first one on whose
            decision is none that could be carried out.
    """

    name: str
    reduction: str
    image: np.ndarray
    groups: Mapping[int, np.ndarray]


def merge_pictures(
    observer: Observer, reference: ReducedViT, pixel_values: np.ndarray, spec: InputSpec
) -> tuple[MergePicture, MergePicture]:
    """What a candidate and the reference, each deciding by itself, make one token of an image.

    Args:
        observer: The candidate.
        reference: Of the same degree.
        pixel_values: One prepared image, float32 [1, 3, H, W].
        spec: How it was prepared.

    Returns:
        The candidate's picture and the reference's.
    """
    chosen = observer.observe(pixel_values).decisions
    natural = replay(reference, torch.from_numpy(pixel_values), {}).natural
    image = colours(pixel_values[0], spec)
    return (
        MergePicture(observer.name, reference.reduction.name, image, patch_groups(chosen, reference)),
        MergePicture("reference", reference.reduction.name, image, patch_groups(natural, reference)),
    )


def colours(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """A prepared image [3, H, W] as colours again, [H, W, 3] uint8."""
    shares = pixels.transpose(1, 2, 0) * np.asarray(spec.std) + np.asarray(spec.mean)
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)


def patch_groups(decisions: Mapping[int, AnyDecision], reference: ReducedViT, image: int = 0) -> dict[int, np.ndarray]:
    """Follows every patch through the decisions of the blocks.

    Args:
        decisions: Block -> what was decided there.
        reference: Of the same degree, for its schedule and its grid of patches.
        image: Which of the batch.

    Returns:
        See `MergePicture.groups`.
    """
    comparer, model = comparer_of(reference.reduction), reference.model
    grid = model.patch_embed.grid_size
    position = model.num_prefix_tokens + np.arange(grid[0] * grid[1])
    found = {}
    for block in reference.deciding_blocks:
        tokens = reference.schedule.tokens[block]
        if block not in decisions or not comparer.is_valid(decisions[block], image, tokens):
            break
        position = moved(decisions[block], tokens, image)[position]
        found[block] = position.reshape(grid)
    return found


def moved(decision: AnyDecision, tokens: int, image: int = 0) -> np.ndarray:
    """Where every token that enters a block is among those that leave it, [N] int64.

    Args:
        decision: What was decided in the block; valid.
        tokens: How many enter it, N.
        image: Which of the batch.

    >>> merged = Matching(src=torch.tensor([[4]]), dst=torch.tensor([[1]]), unm=torch.tensor([[2]]), protected=1)
    >>> moved(merged, 5).tolist()
    [0, 2, 1, 3, 2]
    """
    protected = decision.protected
    to = np.full(tokens, -1)
    to[:protected] = np.arange(protected)
    if isinstance(decision, Matching):
        src, dst, unm = (each[image].numpy() for each in (decision.src, decision.dst, decision.unm))
        destinations = np.arange(first_positions(protected)[1], tokens, 2)
        to[unm] = protected + np.arange(len(unm))
        to[destinations] = protected + len(unm) + np.arange(len(destinations))
        to[src] = to[dst]
    else:
        kept, dropped = decision.kept[image].numpy(), decision.dropped[image].numpy()
        to[kept] = protected + np.arange(len(kept))
        to[dropped] = protected + len(kept)
    return to


def differing(one: MergePicture, other: MergePicture, block: int) -> np.ndarray | None:
    """Patches of which both make something else behind a block, [grid_h, grid_w] bool.

    Merging: patches whose token stands for other patches. Pruning: patches that are still tokens of their own in one
    and fused in the other. None where either has no groups behind that block.
    """
    if block not in one.groups or block not in other.groups:
        return None
    first, second = (group_indices(each.groups[block]) for each in (one, other))
    alone = [np.bincount(each.ravel())[each] == 1 for each in (first, second)]
    if one.reduction == "prune":
        return alone[0] != alone[1]
    shared = np.bincount((first * first.size + second).ravel())[first * first.size + second]
    sizes = (np.bincount(each.ravel())[each] for each in (first, second))
    return np.logical_or.reduce([size != shared for size in sizes])


def group_indices(groups: np.ndarray) -> np.ndarray:
    """Groups numbered from 0 on, whatever their positions, in the same shape."""
    return np.unique(groups, return_inverse=True)[1].reshape(groups.shape)
