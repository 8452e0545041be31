"""Token reduction with Python loops, token by token, as the papers word it: shares no code with what it checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def naive_match(
    metric: Sequence[Sequence[float]], r: int, protected: int, keep_order: bool
) -> tuple[list[int], list[int], list[int]]:
    """The merge decisions for one image, token by token, as design.md words them: src, dst, unm."""
    tokens = len(metric)
    free = range(protected, tokens)
    sources, destinations = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]

    def cosine(i: int, j: int) -> float:
        lengths = math.hypot(*metric[i]) * math.hypot(*metric[j])
        return math.fsum(p * q for p, q in zip(metric[i], metric[j], strict=True)) / lengths if lengths else 0.0

    best: dict[int, tuple[float, int]] = {}
    for i in sources:
        for j in destinations:
            if i not in best or cosine(i, j) > best[i][0]:
                best[i] = cosine(i, j), j
    ranked = sorted(sources, key=lambda i: (-best[i][0], i))
    r = min(r, (tokens - protected) // 2)
    src, unm = ranked[:r], ranked[r:]
    return src, [best[i][1] for i in src], sorted(unm) if keep_order else unm


def naive_merge(
    x: np.ndarray, token_size: np.ndarray, decisions: tuple[list[int], list[int], list[int]], protected: int
) -> tuple[np.ndarray, np.ndarray]:
    """One image's tokens [N, C] and sizes [N] after merging, summed token by token."""
    src, dst, unm = decisions
    tokens, sizes = [], []
    odd = [i for i in range(protected, len(x)) if i % 2 == 1]
    for position in [*range(protected), *unm, *odd]:
        members = [position] + [i for i, j in zip(src, dst, strict=True) if j == position]
        size = sum(float(token_size[i]) for i in members)
        tokens.append(sum(x[i].astype(np.float64) * float(token_size[i]) for i in members) / size)
        sizes.append(size)
    return np.stack(tokens), np.array(sizes)


def naive_select(attention: Sequence[float], r: int, protected: int) -> tuple[list[int], list[int]]:
    """The pruning decisions for one image: the least attended token goes, the last of equals, r + 1 times."""
    kept, dropped = list(range(protected, len(attention))), []
    for _ in range(r + 1):
        least = kept[0]
        for i in kept:
            if attention[i] <= attention[least]:
                least = i
        kept.remove(least)
        dropped.append(least)
    return kept, sorted(dropped)


def naive_prune(
    x: np.ndarray,
    token_size: np.ndarray,
    attention: Sequence[float],
    decisions: tuple[list[int], list[int]],
    protected: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One image's tokens [N, C] and sizes [N] after pruning; the plain mean where nothing dropped was attended."""
    kept, dropped = decisions
    total = math.fsum(float(attention[i]) for i in dropped)
    shares = [float(attention[i]) / total if total else 1 / len(dropped) for i in dropped]
    fused = sum(share * x[i].astype(np.float64) for share, i in zip(shares, dropped, strict=True))
    stay = [*range(protected), *kept]
    sizes = [float(token_size[i]) for i in stay] + [sum(float(token_size[i]) for i in dropped)]
    return np.stack([*(x[i].astype(np.float64) for i in stay), fused]), np.array(sizes)
