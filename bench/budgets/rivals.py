"""Single degrees that a cascade is held against at equal mean cost, and the comparison image by image."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rival:
    """The best that single degrees do at a mean cost.

    Attributes:
        right: Per image, how often it is right: 0 or 1, or between where chance decides the degree; float64
            [n].
    """

    name: str  # "degree 8", or the two degrees that images are sent to at random, and how many to the cheaper one
    cost: float  # its mean cost
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """Top-1, a share."""
        return float(self.right.mean())

    def gain(self, of: np.ndarray) -> tuple[float, float]:
        """How much better something is, in points of top-1, with the standard error of the paired difference."""
        gains = 100 * (of.astype(float) - self.right)
        return float(gains.mean()), float(gains.std() / len(gains) ** 0.5)


def best_single(right: Mapping[int, np.ndarray], cost: Mapping[int, float], at: float) -> Rival | None:
    """The single degree of equal or lower cost that is right most often on these very images.

    That it is picked by what is reported favours it.

    Returns:
        None where every degree costs more.
    """
    within = [degree for degree in right if cost[degree] <= at]
    if not within:
        return None
    best = max(within, key=lambda degree: right[degree].mean())
    return Rival(f"degree {best}", cost[best], right[best].astype(float))


def best_mixture(right: Mapping[int, np.ndarray], cost: Mapping[int, float], at: float) -> Rival | None:
    """The best single degree, or pair of degrees between which images are drawn by lot, of exactly equal mean cost.

    It is the upper envelope of all lines between degrees, so it fills the gaps between them.

    Returns:
        None where every degree costs more.
    """
    best = best_single(right, cost, at)
    for cheap, dear in itertools.permutations(right, 2):
        if cost[cheap] <= at < cost[dear]:
            share = (cost[dear] - at) / (cost[dear] - cost[cheap])
            mixed = share * right[cheap] + (1 - share) * right[dear]
            if best is None or mixed.mean() > best.accuracy:
                best = Rival(f"{share:.0%} at {cheap}, the rest at {dear}", at, mixed)
    return best
