"""Whether something grew: the slope of the second half of a run, with its confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCKS = 12  # of which the second half is made: means of blocks are nearly independent, single seconds are not
_T95 = 2.228  # Student's t at 97.5% for _BLOCKS - 2 degrees of freedom
_SHARE = 0.03  # of its level that something may grow over the second half


@dataclass(frozen=True)
class Slope:
    """Growth over the second half of a run.

    Attributes:
        level: Mean of the second half.
        most: Of the whole run.
        growth: Over the second half, by the line through it.
        low: Of its 95% interval.
        high: Likewise.
    """

    level: float
    most: float
    growth: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether no growth is seen, or one that is small against the level."""
        return self.low <= 0 or self.growth <= _SHARE * self.level


def slope(values: Sequence[float]) -> Slope:
    """The line through the second half.

    Args:
        values: One a second, at least 24.
    """
    half = np.asarray(values[len(values) // 2 :], np.float64)
    means = np.array([block.mean() for block in np.array_split(half, _BLOCKS)])
    at = np.linspace(0.5 / _BLOCKS, 1 - 0.5 / _BLOCKS, _BLOCKS)  # as a share of the half
    middle = at - at.mean()
    growth = float((middle * means).sum() / (middle**2).sum())
    rest = means - means.mean() - growth * middle
    error = float(np.sqrt((rest**2).sum() / (_BLOCKS - 2) / (middle**2).sum()))
    return Slope(float(half.mean()), float(np.max(values)), growth, growth - _T95 * error, growth + _T95 * error)
