"""How long calls take on a CUDA device, in rounds that every contender has a part in.

A round runs a contender several times, one call right behind the other, because a single one may be shorter than what
a clock or a launch costs. What counts is the mean time of a call in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import torch

from tocom.runtime.degrees.latency import Latency

Key = TypeVar("Key", bound=Hashable)
Timed = Callable[[int], float]
"""Makes so many calls, one right behind the other; returns the mean time of one, in ms."""

_WARM_UP = 3  # torch.compile compiles in the first call, records its graph in the second, replays it in the third
_BLOCK_MS, _MOST_CALLS = 10.0, 50  # how long a contender's turn lasts


def by_events(call: Callable[[], object]) -> Timed:
    """Times what a function queues on torch's current stream, by CUDA events."""

    def timed(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return timed


def by_wall(call: Callable[[], object]) -> Timed:
    """Times a function that waits for what it does."""

    def timed(calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start) / 1e6 / calls

    return timed


def warm_up(timed: Timed) -> int:
    """Runs a contender for the first times.

    Returns:
        How many calls its turn is to have.
    """
    for _ in range(_WARM_UP):
        once = timed(1)
    return min(_MOST_CALLS, max(1, math.ceil(_BLOCK_MS / max(once, 1e-3))))


def interleaved(
    timed: Mapping[Key, Timed], calls: Mapping[Key, int], seconds: float, min_rounds: int = 15
) -> tuple[dict[Key, Latency], dict[Key, Exception]]:
    """Times contenders in rounds: a turn of each, in an order that rotates, as `degrees.latency.measure` does.

    Returns:
        The time of a call of each, and what those raised that failed on the way and have none.
    """
    times: dict[Key, list[float]] = {key: [] for key in timed}
    failures: dict[Key, Exception] = {}
    start, rounds = time.monotonic(), 0
    while times and (rounds < min_rounds or time.monotonic() - start < seconds):
        keys = list(times)
        first = rounds % len(keys)
        for key in keys[first:] + keys[:first]:
            try:
                times[key].append(timed[key](calls[key]))
            except Exception as error:  # noqa: BLE001 - one contender's failure must not end the run
                failures[key] = error
                del times[key]
        rounds += 1
    return {key: latency(each) for key, each in times.items()}, failures


def latency(times_ms: Iterable[float]) -> Latency:
    """Sums up the rounds of one contender."""
    times = tuple(map(float, times_ms))
    p25, p50, p75, p99 = map(float, np.percentile(times, (25, 50, 75, 99)))
    return Latency(p50=p50, p99=p99, rounds=len(times), p25=p25, p75=p75, times_ms=times)


def matmul_rate(products: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: str = "cuda") -> float:
    """What the GPU reaches in matrix products, in TFLOP/s: all of some, as often as each other."""
    work, ms = 0, 0.0
    for rows, columns, depth in products:
        # of zeros, it would be faster than of anything a network computes
        one, other = torch.randn(rows, depth, device=device), torch.randn(depth, columns, device=device)
        one, other, out = one.to(dtype), other.to(dtype), torch.empty(rows, columns, dtype=dtype, device=device)
        timed = by_events(lambda one=one, other=other, out=out: torch.mm(one, other, out=out))
        calls = warm_up(timed)
        ms += float(np.median([timed(calls) for _ in range(10)]))
        work += 2 * rows * columns * depth
    return work / ms / 1e9
