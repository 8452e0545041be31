"""Tests runtime/degrees/latency.py with engines that only take time."""

import time

import numpy as np
import pytest

from tocom.runtime.degrees.latency import measure
from tocom.runtime.engines.base import EngineRunner
from tocom.runtime.errors import InputError


class Sleeper(EngineRunner):
    """Takes a known time per call and writes down that it was called."""

    backend, input_size, classes = "sleeper", (3, 4, 4), 2

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        self.name, self.seconds, self.calls, self.last = name, seconds, calls, None

    def _close(self):
        pass

    def _infer(self, pixel_values):
        self.calls.append(self.name)
        self.last = pixel_values
        time.sleep(self.seconds)
        return np.zeros((len(pixel_values), 2), np.float32)


def test_times_are_in_milliseconds_and_in_order():
    calls = []
    runners = {"slow": Sleeper("slow", 0.006, calls), "fast": Sleeper("fast", 0.002, calls)}
    latency = measure(runners, batch=3, seconds=0, min_rounds=11)
    assert list(latency) == ["slow", "fast"]
    assert latency["slow"].rounds == latency["fast"].rounds == 11
    assert 6 <= latency["slow"].p50 <= latency["slow"].p99 < 600
    assert 2 <= latency["fast"].p50 < latency["slow"].p50
    assert runners["fast"].last.shape == (3, 3, 4, 4) and runners["fast"].last.std() > 0.5


def test_calls_are_interleaved_in_rotated_order_after_the_warm_up():
    calls = []
    measure({name: Sleeper(name, 0, calls) for name in "abc"}, batch=1, seconds=0, min_rounds=4)
    warm_up = len(calls) - 12
    assert warm_up >= 3
    assert "".join(calls[warm_up:]) == "abc" + "bca" + "cab" + "abc"


def test_goes_on_until_the_time_is_up():
    start = time.monotonic()
    latency = measure({"a": Sleeper("a", 0.001, [])}, batch=1, seconds=0.1, min_rounds=1)
    assert time.monotonic() - start >= 0.1 and latency["a"].rounds > 1


def test_bad_arguments_are_refused():
    runner = {"a": Sleeper("a", 0, [])}
    for arguments in (({}, 1), (runner, 0), (runner, 1, float("nan")), (runner, 1, -1.0), (runner, 1, 1.0, 0)):
        with pytest.raises(InputError):
            measure(*arguments)
