"""When requests are sent: decided beforehand, so that a server that is slow cannot slow down what is asked of it."""

from __future__ import annotations

import numpy as np


def poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times of arrivals of a Poisson process, rising, in seconds from its start.

    Args:
        rate: Arrivals a second, on average.
        seconds: How long.
        seed: Of what is drawn.
    """
    draw = np.random.default_rng(seed)
    times, last = [], 0.0
    while last < seconds:
        gaps = draw.exponential(1 / rate, max(int(1.2 * rate * seconds), 16))
        times.append(last + np.cumsum(gaps))
        last = float(times[-1][-1])
    found = np.concatenate(times)
    return found[found < seconds]


def order(count: int, length: int, seed: int) -> np.ndarray:
    """Which of `count` bodies each of `length` requests has: all of them equally often, shuffled anew every round."""
    draw = np.random.default_rng(seed)
    rounds = [draw.permutation(count) for _ in range(length // count + 1)]
    return np.concatenate(rounds)[:length]
