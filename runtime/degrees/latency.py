"""How long engines take, measured side by side so that a noisy machine is noisy for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..engines.base import EngineRunner
from ..errors import InputError

_WARM_UP_CALLS = 1


@dataclass(frozen=True)
class Latency:
    """Time of one call.

    Attributes:
        p50: Median, in ms.
        p99: 99th percentile, in ms; interpolated, so with few rounds it is close to the maximum.
        rounds: Calls that were measured.
        p25: Lower quartile, in ms.
        p75: Upper quartile, in ms.
        times_ms: Every call, in ms; engines that were measured together have theirs in the same rounds.
    """

    p50: float
    p99: float
    rounds: int
    p25: float = math.nan
    p75: float = math.nan
    times_ms: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def ratio_to(self, other: Latency) -> tuple[float, float, float]:
        """Quartiles (25th, 50th, 75th percentile) of this time over another one, round by round.

        What slows the machine for a while slows both calls of a round, so this is steadier than a ratio of medians.
        """
        ratios = np.asarray(self.times_ms) / np.asarray(other.times_ms)
        return tuple(map(float, np.percentile(ratios, (25, 50, 75))))


def measure(
    runners: Mapping[str, EngineRunner], batch: int, seconds: float = 2.0, min_rounds: int = 20
) -> dict[str, Latency]:
    """Times engines in rounds: one call of each, in an order that rotates, after a warm-up.

    Interleaving makes a slow minute of the machine hit every engine alike; rotating keeps any engine from always
    running after the same neighbour, on the caches and clock that one leaves behind.

    Args:
        runners: Open engines by name.
        batch: Images per call.
        seconds: How long to measure, all engines together, in seconds.
        min_rounds: Rounds to do even when they take longer than that.

    Returns:
        The latency of each engine, in the order of `runners`.

    Raises:
        InputError: There is nothing to measure, or a number is out of range.
    """
    if not runners:
        raise InputError("runners must hold at least one engine, got none")
    if batch < 1 or min_rounds < 1:
        raise InputError(f"batch and min_rounds must be 1 or more, got {batch} and {min_rounds}")
    if not (math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"seconds must be a finite number, 0 or more, got {seconds}")
    inputs = {name: _random_images(runner, batch) for name, runner in runners.items()}
    for name, runner in runners.items():
        for _ in range(_WARM_UP_CALLS):
            runner.infer(inputs[name])
    names = list(runners)
    times_ns: dict[str, list[int]] = {name: [] for name in names}
    start, rounds = time.perf_counter_ns(), 0
    while rounds < min_rounds or time.perf_counter_ns() - start < seconds * 1e9:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter_ns()
            runners[name].infer(inputs[name])
            times_ns[name].append(time.perf_counter_ns() - begin)
        rounds += 1
    return {name: _summary(times) for name, times in times_ns.items()}


def _random_images(runner: EngineRunner, batch: int) -> np.ndarray:
    """Normal noise: on zeros all tokens are equal, so that matching degenerates and denormals may creep in."""
    return np.random.default_rng(0).standard_normal((batch, *runner.input_size), dtype=np.float32)


def _summary(times_ns: list[int]) -> Latency:
    times_ms = np.asarray(times_ns) / 1e6
    p25, p50, p75, p99 = map(float, np.percentile(times_ms, (25, 50, 75, 99)))
    return Latency(p50=p50, p99=p99, rounds=len(times_ns), p25=p25, p75=p75, times_ms=tuple(map(float, times_ms)))
