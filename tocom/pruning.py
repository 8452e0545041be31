"""Token pruning (EViT, section 3): deciding which tokens the class token attends least, and fusing them into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WEIGHT_FLOOR = 1e-12  # where every weight underflows, the fused token is the plain mean instead of NaN


@dataclass(frozen=True)
class Pruning:
    """The pruning decisions of one block, as positions among the N tokens that enter it.

    Attributes:
        kept: Tokens that stay behind the prefix, in position order, [B, N - protected - r - 1] int64.
        dropped: Tokens that are fused into one, in position order, [B, r + 1] int64.
        protected: Prefix tokens, which stay first.
    """

    kept: Tensor
    dropped: Tensor
    protected: int


def select(attention: Tensor, r: int, *, protected: int = 1) -> Pruning:
    """Decides which r + 1 tokens are fused into one: those that the class token attends least (EViT, section 3.1).

    Args:
        attention: Attention of the class token to every token, mean over heads, [B, N].
        r: Tokens to remove; at most N - protected - 1.
        protected: Prefix tokens, never dropped.

    Returns:
        The decisions. Of tokens attended equally, the ones at lower positions stay.
    """
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    ranked = attention[:, protected:].argsort(dim=-1, descending=True, stable=True) + protected
    stay = ranked.shape[1] - r - 1
    return Pruning(
        kept=ranked[:, :stay].sort(dim=-1).values, dropped=ranked[:, stay:].sort(dim=-1).values, protected=protected
    )


def prune(x: Tensor, token_size: Tensor, attention: Tensor, pruning: Pruning) -> tuple[Tensor, Tensor]:
    """Fuses the dropped tokens into one: their attention-weighted mean (EViT, equation 4, normalized), sizes added.

    Args:
        x: Tokens, [B, N, C].
        token_size: Input patches each token stands for, [B, N, 1].
        attention: What `select` was given, [B, N].
        pruning: What it decided.

    Returns:
        Tokens [B, N - r, C] ordered prefix, kept tokens, fused token; and their sizes [B, N - r, 1].
    """
    prefix = pruning.protected

    def gather(values: Tensor, at: Tensor) -> Tensor:
        return values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    weight = attention.to(x.dtype).gather(1, pruning.dropped).unsqueeze(1) + _WEIGHT_FLOOR
    fused = weight @ gather(x, pruning.dropped) / weight.sum(dim=-1, keepdim=True)
    return (
        torch.cat([x[:, :prefix], gather(x, pruning.kept), fused], dim=1),
        torch.cat(
            [
                token_size[:, :prefix],
                gather(token_size, pruning.kept),
                gather(token_size, pruning.dropped).sum(dim=1, keepdim=True),
            ],
            dim=1,
        ),
    )
