"""Token merging (ToMe, section 3): deciding which tokens merge, and merging them, as two separate steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NORM_FLOOR = 1e-12  # a zero vector has cosine 0 to everything instead of NaN


@dataclass(frozen=True)
class Matching:
    """The merge decisions of one block, as positions among the N tokens that enter it.

    Attributes:
        src: Tokens merged away, best match first, [B, r] int64.
        dst: The token each of them merges into, [B, r] int64.
        unm: Even-position tokens that stay, in output order, [B, A - r] int64.
        protected: Prefix tokens, which stay first.
    """

    src: Tensor
    dst: Tensor
    unm: Tensor
    protected: int


def first_positions(protected: int) -> tuple[int, int]:
    """First even and first odd position behind the prefix: where the a-tokens and the b-tokens begin.

    >>> first_positions(1), first_positions(2)
    ((2, 1), (2, 3))
    """
    return protected + protected % 2, protected + 1 - protected % 2


def cosine_scores(metric: Tensor, protected: int) -> Tensor:
    """Cosine similarity of every a-token to every b-token, in float32 (float64 if the metric is).

    Args:
        metric: What tokens are matched on, [B, N, D].
        protected: Prefix tokens, left out.

    Returns:
        Scores, [B, A, Nb], for a-tokens at even and b-tokens at odd positions behind the prefix.
    """
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(_NORM_FLOOR)
    first_a, first_b = first_positions(protected)
    with torch.autocast(metric.device.type, enabled=False):  # half precision flips decisions
        return unit[:, first_a::2] @ unit[:, first_b::2].transpose(-1, -2)


def match(metric: Tensor, r: int, *, protected: int = 1, keep_order: bool = True) -> Matching:
    """Decides which r tokens merge into which (ToMe, section 3, "bipartite soft matching").

    Every a-token picks the b-token it is most similar to, the lowest on ties; the r a-tokens with the highest scores
    (stable order) merge into their pick.

    Args:
        metric: The mean over heads of the attention keys, [B, N, D].
        r: Tokens to remove; clamped to (N - protected) // 2.
        protected: Prefix tokens, neither merged away nor merged into.
        keep_order: Unmerged a-tokens in position order (networks with a class token) or in score order, best first
            (networks without, as the original does).

    Returns:
        The decisions.
    """
    best, pick = cosine_scores(metric, protected).max(dim=-1)
    r = min(r, (metric.shape[1] - protected) // 2)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    src, unm = ranked[:, :r], ranked[:, r:]
    if keep_order:
        unm = unm.sort(dim=-1).values
    first_a, first_b = first_positions(protected)
    return Matching(
        src=first_a + 2 * src,
        dst=first_b + 2 * pick.gather(-1, src),
        unm=first_a + 2 * unm,
        protected=protected,
    )


def merge(x: Tensor, token_size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Merges tokens as decided: the token_size-weighted mean, sizes added (ToMe, section 3).

    Args:
        x: Tokens, [B, N, C].
        token_size: Input patches each token stands for, [B, N, 1].
        matching: What `match` decided for these N tokens.

    Returns:
        Tokens [B, N - r, C] ordered prefix, unmerged a-tokens, b-tokens; and their sizes [B, N - r, 1].
    """
    prefix, first_b = matching.protected, first_positions(matching.protected)[1]
    slot = ((matching.dst - first_b) // 2).unsqueeze(-1)

    def combine(values: Tensor) -> Tensor:
        """Sums every merged token into its destination: [B, N, D] -> [B, Nb, D]."""
        width = values.shape[-1]
        moved = values.gather(1, matching.src.unsqueeze(-1).expand(-1, -1, width))
        return values[:, first_b::2].scatter_add(1, slot.expand(-1, -1, width), moved)

    def keep(values: Tensor) -> Tensor:
        return values.gather(1, matching.unm.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    merged_size = combine(token_size)
    merged = combine(x * token_size) / merged_size
    return (
        torch.cat([x[:, :prefix], keep(x), merged], dim=1),
        torch.cat([token_size[:, :prefix], keep(token_size), merged_size], dim=1),
    )
