"""Tests runtime/degrees/latency.py with engines that only take time, by a clock that nothing else moves on."""

from types import SimpleNamespace

import numpy as np
import pytest

from tocom.runtime.degrees import latency as module
from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import EngineRunner
from tocom.runtime.errors import InputError

pytestmark = pytest.mark.timing


class Clock:
    """Stands still but for what sleepers take."""

    def __init__(self):
        self.now_ns = 0

    def perf_counter_ns(self):
        return self.now_ns


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter_ns=made.perf_counter_ns))
    return made


class Sleeper(EngineRunner):
    """Takes known times, in turns, and writes down that it was called."""

    backend, input_size, classes = "sleeper", (3, 4, 4), 2

    def __init__(self, name: str, times_ms: list[int], calls: list[str], clock: Clock) -> None:
        self.name, self.times_ms, self.calls, self.clock, self.last = name, times_ms, calls, clock, None

    def _close(self):
        pass

    def _infer(self, pixel_values):
        self.clock.now_ns += 1_000_000 * self.times_ms[self.calls.count(self.name) % len(self.times_ms)]
        self.calls.append(self.name)
        self.last = pixel_values
        return np.zeros((len(pixel_values), 2), np.float32)


def test_times_are_in_milliseconds_and_in_order(clock):
    calls = []
    runners = {"slow": Sleeper("slow", [6, 8, 7], calls, clock), "fast": Sleeper("fast", [2], calls, clock)}
    latency = measure(runners, batch=3, seconds=0, min_rounds=11)
    assert list(latency) == ["slow", "fast"]
    assert latency["slow"].rounds == latency["fast"].rounds == 11
    assert latency["slow"].p50 == 7 and 7.9 < latency["slow"].p99 <= 8
    assert latency["fast"].p50 == latency["fast"].p99 == 2
    assert sorted(latency["slow"].times_ms) == [6] * 3 + [7] * 4 + [8] * 4
    assert runners["fast"].last.shape == (3, 3, 4, 4) and runners["fast"].last.std() > 0.5


def test_calls_are_interleaved_in_rotated_order_after_the_warm_up(clock):
    calls = []
    measure({name: Sleeper(name, [0], calls, clock) for name in "abc"}, batch=1, seconds=0, min_rounds=4)
    warm_up = len(calls) - 12
    assert warm_up >= 3
    assert "".join(calls[warm_up:]) == "abc" + "bca" + "cab" + "abc"


def test_goes_on_until_the_time_is_up(clock):
    latency = measure({name: Sleeper(name, [4], [], clock) for name in "ab"}, batch=1, seconds=0.1, min_rounds=1)
    assert latency["a"].rounds == latency["b"].rounds == 13  # 8 ms each: 12 of them are not 100 ms yet


def test_bad_arguments_are_refused(clock):
    runner = {"a": Sleeper("a", [0], [], clock)}
    for arguments in (({}, 1), (runner, 0), (runner, 1, float("nan")), (runner, 1, -1.0), (runner, 1, 1.0, 0)):
        with pytest.raises(InputError):
            measure(*arguments)
